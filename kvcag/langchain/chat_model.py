"""ChatKVCAG: a local model as a LangChain chat model whose documents are encoded once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from functools import partial
from os import PathLike, fspath
from typing import Any, Literal, cast

import torch
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import (
    ConfigurableField,
    Runnable,
    RunnableBinding,
    RunnableConfig,
    RunnableSerializable,
    RunnableWithFallbacks,
)
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.config import get_config_list
from langchain_core.runnables.configurable import (
    DynamicRunnable,
    RunnableConfigurableAlternatives,
    RunnableConfigurableFields,
)
from langchain_core.runnables.retry import RunnableRetry
from langchain_core.tools import BaseTool
from pydantic import ConfigDict, Field, PrivateAttr, SkipValidation, model_validator
from tqdm import tqdm  # type: ignore[import-untyped]
from typing_extensions import Self

from kvcag.adapters import MERGE_SETTINGS, SAMPLING_SETTINGS, LazyMemory, call_settings, choice_of
from kvcag.concurrency import async_twin, at_once, in_thread, iterate
from kvcag.core import DEFAULT_RATIO, MAX_KL, Strategy
from kvcag.cube.memory_cube import MemoryCube
from kvcag.engines.base import Engine
from kvcag.errors import ChatTemplateError, FingerprintMismatchError, InvalidInputError
from kvcag.langchain.documents_chain import encode_ahead, fitting, read_documents
from kvcag.langchain.messages import (
    ask,
    call_parser,
    generation_chunks,
    json_parser,
    parsing,
    response_format,
    schema_of,
    shown_tools,
    to_messages,
)
from kvcag.memory import KVCacheMemory
from kvcag.stores.base import SOURCE_FIELDS, KVStore
from kvcag.sync import Context

_SAMPLING = tuple("max_tokens" if name == "max_new_tokens" else name for name in SAMPLING_SETTINGS if name != "stop")
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
_CALL = ("model", "cached_content", "n", "logprobs", "top_logprobs", *_SAMPLING, *MERGE_SETTINGS, *_TOOLS)
"""The keyword arguments of a call, in addition to `stop`."""

_TRACING_ONLY = ("stream", "ls_structured_output_format", "structured_output_format")

_REMOTE_ONLY = {"api_key", "base_url", "timeout", "max_retries"}
"""Standard parameters of chat models that call a server. They are accepted and have no effect, so that an application
only has to change the class."""

_NOT_IN_ANSWERS = {"engine", "kept", "store", "namespace", "streaming"}
"""Fields that do not change an answer. An engine is identified by its fingerprint."""

_NOT_TEXT = ("image_inputs", "audio_inputs", "pdf_inputs", "video_inputs", "image_outputs", "audio_outputs")


class KeepsContext(RunnableSerializable[LanguageModelInput, AIMessage]):
    """A `ChatKVCAG` or a runnable that wraps one. `bind(cached_content=id)` sets the field of the model.

    LangChain drops bound arguments in `bind_tools`, `with_structured_output` and agents (langchain#30983), but it keeps
    fields. The methods below return runnables of this class, so that wrapping a model keeps this behaviour.
    """

    @classmethod
    def lc_id(cls) -> list[str]:
        """The id that `langchain_core.load.dumps` writes: for a wrapper, that of LangChain's own class."""
        return next((core.lc_id() for core, ours in _OURS.items() if issubclass(cls, ours)), super().lc_id())

    def _with_context(self, context: str | None) -> Any:
        """A copy that answers from the context with this id, from `create_context`."""
        return self.model_copy(update={"cached_content": context})

    def bind(self, **kwargs: Any) -> Any:
        """`Runnable.bind`. `cached_content` becomes a field of a copy of the model."""
        if "cached_content" not in kwargs:
            return _keeping(super().bind(**kwargs))
        made = self._with_context(kwargs.pop("cached_content"))
        return made.bind(**kwargs) if kwargs else made

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """`Runnable.with_config`."""
        return _keeping(super().with_config(config, **kwargs))

    def with_listeners(self, **kwargs: Any) -> Any:
        """`Runnable.with_listeners`."""
        return _keeping(super().with_listeners(**kwargs))

    def with_alisteners(self, **kwargs: Any) -> Any:
        """`Runnable.with_alisteners`."""
        return _keeping(super().with_alisteners(**kwargs))

    def with_types(self, *args: Any, **kwargs: Any) -> Any:
        """`Runnable.with_types`."""
        return _keeping(super().with_types(*args, **kwargs))

    def with_retry(self, **kwargs: Any) -> Any:
        """`Runnable.with_retry`."""
        return _keeping(super().with_retry(**kwargs))

    def with_fallbacks(self, fallbacks: Sequence[Runnable[Any, Any]], **kwargs: Any) -> Any:
        """`Runnable.with_fallbacks`."""
        return _keeping(super().with_fallbacks(fallbacks, **kwargs))

    def configurable_fields(self, **kwargs: Any) -> Any:
        """`RunnableSerializable.configurable_fields`."""
        return _keeping(super().configurable_fields(**kwargs))

    def configurable_alternatives(self, which: ConfigurableField, **kwargs: Any) -> Any:
        """`RunnableSerializable.configurable_alternatives`."""
        return _keeping(super().configurable_alternatives(which, **kwargs))


class ChatKVCAG(KeepsContext, BaseChatModel):
    """A chat model that encodes each document once.

    Text blocks of a message are documents (`kvcag.langchain.messages.to_messages` says which blocks). Their caches are
    found by content, in any order. A prompt without documents reuses the longest prefix that was encoded before, so
    every turn of a chat reuses the turns before it. The constructor loads no weights and needs no network.

    ```python
    llm = ChatKVCAG(model="HuggingFaceTB/SmolLM2-135M-Instruct", store="kv/", max_tokens=200)
    llm.invoke("What is the capital of France?").content
    ```

    Raises:
        pydantic.ValidationError: a field is wrong or unknown, as with every LangChain chat model.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

    model: str = ""
    """A Hugging Face hub id or a folder. Not needed with `engine` or `memory`."""
    engine: SkipValidation[Engine | None] = Field(default=None, exclude=True)
    """A loaded engine. Other chat models and memories may share it."""
    fingerprint: str | None = None
    """The digest of the expected model; a model with another digest is refused. By default, the digest of `engine`."""
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict, exclude=True)
    """Further arguments of `HFEngine.from_pretrained`. A `token` among them is neither serialised nor traced."""
    template_variables: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, such as `{"enable_thinking": False}`. An `engine` has its own."""

    temperature: float | None = None
    """0 is greedy. None takes the engine's default, which is greedy unless the engine sets another value."""
    max_tokens: int | None = None
    """The maximum number of tokens in an answer. None takes the engine's default."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    strip_thinking: bool | None = None
    """Remove `<think>…</think>` from the answer."""
    n: int = 1
    """The number of answers that `generate` gives for each prompt, with the seeds `seed`, `seed + 1`, …"""
    logprobs: bool = False
    """Put each token's log-probability into `response_metadata`, in OpenAI's form."""
    top_logprobs: int | None = None
    """Add the log-probabilities of this many of the likeliest tokens at each position, 0 to 20."""
    streaming: bool = False
    """True: `invoke` passes each token to callbacks at once. If set to False explicitly, `stream` yields one chunk."""

    kept: SkipValidation[KVCacheMemory | MemoryCube | None] = Field(default=None, alias="memory", exclude=True)
    """Passed as `memory`: a `MemoryCube` or a `KVCacheMemory`, whose engine, store and namespace are used."""
    store: SkipValidation[KVStore | str | PathLike[str] | None] = Field(default=None, exclude=True)
    """Stores the caches: a store, or a folder. None: in memory, up to 4 GiB, shared by all users of the engine."""
    cached_content: str | None = None
    """The id of a context from `create_context`. Every answer uses this context. Tools, structured output and agents
    made from this model use it, too; so do those of `bind(cached_content=id)`."""
    merge_strategy: Strategy = "auto"
    """How cached documents are merged: see `KVCacheMemory.merge`."""
    recompute_ratio: float = Field(default=DEFAULT_RATIO, ge=0, le=1)
    """The share of context tokens that a merge recomputes, 0 to 1."""
    max_kl: float = Field(default=MAX_KL, ge=0)
    """The error that `merge_strategy="auto"` allows, in nats per token: see `kvcag.calibrate`."""
    namespace: str = ""
    """Separates the recent contexts and the files of one user or corpus from those of others, so that the time of an
    answer does not reveal what others read. A `KVStore` is not separated: give each namespace its own store."""

    _memories: dict[tuple[object, ...], LazyMemory] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _as_settings(cls, values: Any) -> Any:
        settings = {name: value for name, value in values.items() if name not in _REMOTE_ONLY}
        if isinstance(settings.get("model"), PathLike):
            settings["model"] = fspath(settings["model"])
        if isinstance(settings.get("dtype"), torch.dtype):
            settings["dtype"] = str(settings["dtype"]).removeprefix("torch.")
        return settings

    @model_validator(mode="after")
    def _which_model(self) -> Self:
        own = self._lazy_memory()
        self.model, self.engine, self.store, self.namespace = own.model, own.engine, own.store, own.namespace
        if self.engine is not None:
            self.fingerprint = self.fingerprint or self.engine.fingerprint.digest
        return self

    # --- the model and its memory ------------------------------------------------------------------------------

    def memory(self, model: str | None = None) -> KVCacheMemory:
        """The memory that this chat model answers from. The first call loads the weights.

        Args:
            model: the name of another model, in place of this object's own.

        Raises:
            FingerprintMismatchError: the loaded model's digest is not `fingerprint`.
            ChatTemplateError: the model has no chat template.
        """
        name = model or self.model
        memory = self._lazy_memory(name).memory()
        engine = memory.engine
        if name == self.model and self.fingerprint not in (None, engine.fingerprint.digest):
            wanted = f"fingerprint {engine.fingerprint.digest}, not {self.fingerprint}"
            raise FingerprintMismatchError(f"the fingerprint that this ChatKVCAG expects of {name!r}", [wanted])
        if not engine.template.has_template:
            raise ChatTemplateError(
                f"{name!r} has no chat template, so it cannot tell system, human and AI messages apart. Use an "
                "instruct model, or set engine.tokenizer.chat_template."
            )
        return memory

    def _lazy_memory(self, model: str | None = None) -> LazyMemory:
        """The memory of a model, by default of this object's own. Loads nothing."""
        own = model in (None, self.model)
        key = (model or self.model, self.namespace, id(self.store) if isinstance(self.store, KVStore) else self.store)
        if key not in self._memories:
            made = LazyMemory(
                model or self.model,
                engine=self.engine if own else None,
                memory=self.kept if own else None,
                store=self.store,
                namespace=self.namespace,
                dtype=self.dtype,
                device=self.device,
                template_variables=self.template_variables,
                revision=self.revision if own else None,
                **self.model_kwargs,
            )
            return self._memories.setdefault(key, made)
        return self._memories[key]

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy with settings of its own. The engine, the memory, the store and LangChain's cache are shared."""
        shared = (self.engine, self.kept, self.store, self.cache, self.rate_limiter, self._memories)
        return super().__deepcopy__({**(memo or {}), **{id(one): one for one in shared if one is not None}})

    # --- LangChain's hooks -------------------------------------------------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "kvcag"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """True: `langchain_core.load.dumps` writes the settings, without weights and caches."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """Further attributes to serialise: `store` if it is a folder, and `model_kwargs` without the token."""
        folder = {"store": str(self.store)} if isinstance(self.store, str | PathLike) else {}
        return {**folder, **({"model_kwargs": self._shown_model_kwargs} if self._shown_model_kwargs else {})}

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that can change an answer. LangChain's response cache uses these parameters as its key."""
        own = type(self).model_fields.keys() - BaseChatModel.model_fields.keys() - _NOT_IN_ANSWERS
        params = {name: getattr(self, name) for name in sorted(own)}
        return {**params, "model_kwargs": self._shown_model_kwargs, "drift": self._lazy_memory().drift()}

    @property
    def _shown_model_kwargs(self) -> dict[str, Any]:
        return {name: value for name, value in self.model_kwargs.items() if name != "token"}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        return f"{super()._get_llm_string(stop=stop, **kwargs)}---{self._identifying_params}"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "kvcag"
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        """The profile from the model's configuration. Does not load the weights."""
        length = self._lazy_memory().context_length()
        profile = ModelProfile(text_inputs=True, text_outputs=True, temperature=True, open_weights=True)
        profile |= {"tool_calling": True, "tool_choice": True, "structured_output": True}
        profile |= dict.fromkeys(_NOT_TEXT, False)  # type: ignore[typeddict-item]
        return profile | {"max_input_tokens": length, "max_output_tokens": length} if length else profile

    def get_token_ids(self, text: str) -> list[int]:
        """The text's token ids. Loads the tokenizer, but not the weights."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return list(self._lazy_memory().template().encode(text))

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """The number of tokens in the prompt of these messages, including the chat template's own tokens."""
        template = self._lazy_memory().template()
        asked = ask(template, to_messages(messages), {"tools": tools})
        return len(template.prompt(asked.messages, tools=asked.tools).token_ids)

    # --- before a question comes -------------------------------------------------------------------------------

    def precompute(
        self,
        documents: object,
        prompt: BasePromptTemplate[Any] | None = None,
        *,
        context: Context | None = None,
        progress: bool = True,
        **prompt_settings: Any,
    ) -> list[str]:
        """Encode documents before a question comes, and return the ids of the stored documents, in order.

        Args:
            documents: the documents that a retriever may find: LangChain Documents, or any text that
                `KVCacheMemory.add` takes. A str is one document. A document that is stored already is not encoded
                again. A document that is empty, or that exceeds the model's context, is left out with a warning.
            prompt: the prompt that will contain the documents, as for `create_cag_documents_chain`. Documents are
                encoded after the prompt's text before them, which keeps merged answers closer to those of a full
                prefill. Without a prompt, they are encoded after the opening of a system turn.
            context: as for `KVCacheMemory.add`: `"previous"`, or a retriever.
            progress: show a progress bar, which counts documents that are left out.
            **prompt_settings: `document_prompt`, `document_separator` and `document_variable_name`, as for the chain.

        Raises:
            InvalidInputError: the prompt has another variable before the documents, or a document has no text.
        """
        listed = read_documents(documents)
        ids: list[str] = []
        with tqdm(total=len(listed), desc="encoding", unit="document", disable=not progress) as bar:
            for id in encode_ahead(self.memory(), listed, prompt, context, **prompt_settings):
                bar.update()
                if id:
                    ids.append(id)
                else:
                    bar.set_postfix_str(f"{bar.n - len(ids)} left out")
        return ids

    def create_context(self, documents: object, instruction: str = "") -> str:
        """Encode documents together, in this order, and return a short id for `llm.bind(cached_content=id)`.

        Args:
            documents: as for `precompute`. A document that no longer fits into the model's context is left out with a
                warning.
            instruction: stands before the documents in the system message. The system message of a call follows them.

        Raises:
            EmptyPromptError: there is nothing to encode.
            ContextLengthError: no document fits.
        """
        memory, given = self.memory(), read_documents(documents)
        listed = fitting(memory, given, instruction) or given
        metadata = [document.metadata for document in listed]
        sources = [str(about[field]) for about in metadata for field in SOURCE_FIELDS if about.get(field)]
        return memory.create_context([document.page_content for document in listed], instruction, sources)

    aprecompute = async_twin(precompute)
    acreate_context = async_twin(create_context)

    # --- tools and structured output ---------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        response_format: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return a model that can call tools. A grammar makes every call follow its tool's schema.

        Args:
            tools: functions, LangChain tools, pydantic models, or OpenAI's, Anthropic's or JSON-schema dicts.
            tool_choice: `"auto"` (or None, False): the model decides. `"any"` (or `"required"`, True): it calls a
                tool. A name, or OpenAI's or Anthropic's dict: it calls this tool. `"none"`: it calls no tool.
            parallel_tool_calls: allow several calls in one answer. By default, only if `tool_choice` is `"auto"`.
            strict: accepted and ignored, since arguments always follow the schema.
            response_format: OpenAI's `response_format`, for an answer that calls no tool.
            **kwargs: further arguments of every call, as for `invoke`.

        Raises:
            InvalidInputError: `tool_choice` names an unknown tool, `response_format` has an unknown form, a tool has
                an unknown form or runs on a provider's server, or an argument is unknown.
        """
        _check_names(kwargs)
        shown = shown_tools(tools)
        choice_of(tool_choice, [tool["function"]["name"] for tool in shown])
        schema_of(response_format)
        bound = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls} if shown else {}
        if response_format is not None:
            bound["response_format"] = response_format
        given = {name: value for name, value in bound.items() if value is not None}
        bound_model: Runnable[LanguageModelInput, AIMessage] = self.bind(
            **({"tools": shown} if shown else {}), **given, **kwargs
        )
        return bound_model

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a model whose answers follow a schema. A grammar enforces the schema.

        Args:
            schema: a pydantic model, of which an instance is returned; or a TypedDict or a JSON schema, for which a
                dict is returned. None, with `"json_mode"`: any JSON object.
            method: with `"json_schema"` and `"json_mode"`, the answer's text is the JSON. With `"function_calling"`,
                the JSON is the arguments of a tool call, and the prompt contains the schema.
            include_raw: return `{"raw": message, "parsed": object, "parsing_error": error or None}`.
            strict: accepted and ignored, since answers always follow the schema.
            **kwargs: further arguments of every call, as for `invoke`.

        Raises:
            InvalidInputError: the method or an argument is unknown, or the schema is missing or has an unknown form.
        """
        _check_names(kwargs)
        if method not in ("json_schema", "function_calling", "json_mode"):
            raise InvalidInputError(f"unknown method {method!r}: use 'json_schema', 'function_calling' or 'json_mode'")
        if schema is None and method != "json_mode":
            raise InvalidInputError(f"method {method!r} needs a schema: pass a pydantic model, a TypedDict or a dict")
        traced = {"kwargs": {"method": method, "strict": strict}, "schema": schema or {"type": "object"}}
        kwargs["ls_structured_output_format"] = traced
        if method == "function_calling":
            bound = self.bind_tools([cast("type", schema)], tool_choice="any", **kwargs)
            return parsing(bound, call_parser(schema), include_raw=include_raw)
        bound = self.bind(response_format=response_format(schema, method), **kwargs)
        return parsing(bound, json_parser(schema), include_raw=include_raw)

    # --- answering ---------------------------------------------------------------------------------------------

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        self._answers(kwargs, streams=True)
        with closing(self._open(messages, stop, kwargs)) as chunks:
            yield from chunks

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        self._answers(kwargs, streams=True)
        async with aclosing(iterate(lambda: self._open(messages, stop, kwargs))) as chunks:
            async for chunk in chunks:
                yield chunk

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """`Runnable.batch`. `max_concurrency` is by default the number of answers that the engine gives at once."""
        most = self.memory().engine.answers_at_once if len(inputs) > 1 else 1
        configs = get_config_list(config, len(inputs))
        limited = [{**each, "max_concurrency": each.get("max_concurrency") or most} for each in configs]
        return super().batch(
            inputs, cast("list[RunnableConfig]", limited), return_exceptions=return_exceptions, **kwargs
        )

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        answers = [partial(self._stream, messages, stop, **settings) for settings in self._answers(kwargs)]
        calls = [lambda answer=answer: generate_from_stream(answer()) for answer in answers]
        if len(calls) == 1:
            return calls[0]()
        results = at_once(calls, self.memory(kwargs.get("model")).engine.answers_at_once)
        return ChatResult(generations=[result.generations[0] for result in results])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await in_thread(self._generate, messages, stop, **kwargs)

    def _answers(self, given: Mapping[str, Any], *, streams: bool = False) -> list[dict[str, Any]]:
        """The arguments of each of the `n` answers. Each answer has its own seed.

        Raises:
            InvalidInputError: `n` is less than 1, or several answers are to be streamed.
        """
        n, seed = given.get("n", self.n), given.get("seed", self.seed)
        if not isinstance(n, int) or n < 1:
            raise InvalidInputError(f"n is {n!r}: ask for one answer or more")
        if n > 1 and streams:
            raise InvalidInputError(f"n={n} answers cannot be streamed: call generate, or set n=1")
        seeds = [{} if seed is None else {"seed": seed + number} for number in range(n)]
        return [{**given, "n": 1, **own} for own in seeds]

    def _open(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, given: dict[str, Any]
    ) -> Generator[ChatGenerationChunk, None, None]:
        """Check the arguments, make the context, and return the answer's chunks. Closing the chunks stops the model."""
        _check_names(given)
        memory = self.memory(given.get("model"))
        settings = {name: given[name] for name in (*_SAMPLING, *MERGE_SETTINGS) if name in given}
        top = given.get("top_logprobs", self.top_logprobs)
        top = 0 if top is None and given.get("logprobs", self.logprobs) else top
        if stop is not None:
            settings["stop"] = stop
        options = call_settings(memory.engine, self, settings, top_logprobs=top)
        conversation = to_messages(messages)
        if context := given.get("cached_content", self.cached_content):
            conversation = memory.with_context(context, conversation)
        asked = ask(memory.engine.template, conversation, given)
        chunks = memory.stream(asked.messages, (), tools=asked.tools, constraint=asked.constraint, **options)
        model_name = given.get("model") or self.model
        return generation_chunks(chunks, model_name, asked.plan, json_answer=given.get("response_format") is not None)


def _check_names(given: Mapping[str, Any]) -> None:
    unknown = given.keys() - {*_CALL, *_TRACING_ONLY, "stop"}
    if unknown:
        raise InvalidInputError(
            f"unknown argument {', '.join(sorted(unknown))}. A call takes {', '.join(_CALL)} and stop."
        )


def chat_model_in(model: object) -> ChatKVCAG | None:
    """The ChatKVCAG that a runnable calls first, through bound arguments, configuration, retries and fallbacks."""
    while not isinstance(model, ChatKVCAG):
        if isinstance(model, RunnableBindingBase):
            model = model.bound
        elif isinstance(model, RunnableWithFallbacks):
            model = model.runnable
        elif isinstance(model, DynamicRunnable):
            model = model.default
        else:
            return None
    return model


# --- wrappers of a chat model that set its `cached_content` -------------------------------------------------------


class _Binding(KeepsContext, RunnableBinding[LanguageModelInput, AIMessage]):
    def _with_context(self, context: str | None) -> Any:
        return self.model_copy(update={"bound": _answering_from(self.bound, context)})


class _Retry(KeepsContext, RunnableRetry[LanguageModelInput, AIMessage]):
    def _with_context(self, context: str | None) -> Any:
        return self.model_copy(update={"bound": _answering_from(self.bound, context)})


class _Fallbacks(KeepsContext, RunnableWithFallbacks[LanguageModelInput, AIMessage]):
    def _with_context(self, context: str | None) -> Any:
        others = [_answering_from(fallback, context) for fallback in self.fallbacks]
        return self.model_copy(update={"runnable": _answering_from(self.runnable, context), "fallbacks": others})


class _Fields(KeepsContext, RunnableConfigurableFields[LanguageModelInput, AIMessage]):
    def _with_context(self, context: str | None) -> Any:
        return self.model_copy(update={"default": _answering_from(self.default, context)})


class _Alternatives(KeepsContext, RunnableConfigurableAlternatives[LanguageModelInput, AIMessage]):
    def _with_context(self, context: str | None) -> Any:
        others = {name: _answering_from(other, context) for name, other in self.alternatives.items()}
        return self.model_copy(update={"default": _answering_from(self.default, context), "alternatives": others})


_OURS: dict[type[Any], type[Any]] = {
    RunnableBinding: _Binding,
    RunnableRetry: _Retry,
    RunnableWithFallbacks: _Fallbacks,
    RunnableConfigurableFields: _Fields,
    RunnableConfigurableAlternatives: _Alternatives,
}
"""LangChain's wrapper classes, each with its counterpart in this module."""


def _keeping(made: Any) -> Any:
    """Convert a wrapper of LangChain's class to its counterpart in this module."""
    if isinstance(made, KeepsContext):
        return made
    ours = next((ours for core, ours in _OURS.items() if isinstance(made, core)), None)
    return ours.model_construct(**dict(made)) if ours else made


def _answering_from(runnable: Any, context: str | None) -> Any:
    """The runnable, answering from the context if it wraps a `ChatKVCAG`. An alternative may be a factory function."""
    if isinstance(runnable, KeepsContext):
        return runnable._with_context(context)
    return runnable if isinstance(runnable, Runnable) else partial(_made, runnable, context)


def _made(make: Callable[[], Any], context: str | None) -> Any:
    return _answering_from(make(), context)
