"""ChatKVCAG: a local Hugging Face model as a LangChain chat model that keeps what it has read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, closing
from os import PathLike
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel, LangSmithParams, ModelProfile
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompts import BasePromptTemplate
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr, SkipValidation, model_validator
from tqdm import tqdm  # type: ignore[import-untyped]
from typing_extensions import Self

from kvcag.aio import iterate
from kvcag.compose import Strategy
from kvcag.engines.base import Chunk, Engine
from kvcag.errors import ChatTemplateError, FingerprintMismatchError, InvalidInputError
from kvcag.handles import ContextHandles
from kvcag.langchain.ahead import encoding_ahead
from kvcag.langchain.documents import DOCUMENT_SEPARATOR, DocumentsPrompt
from kvcag.langchain.messages import neutral
from kvcag.langchain.responses import generation_chunk
from kvcag.memory import KVCacheMemory
from kvcag.notices import warn_if_foreign
from kvcag.prompt import ChatTemplate
from kvcag.shared import LazyEngine, open_store
from kvcag.stores.base import KVStore

_REMOTE_ONLY = {"api_key", "base_url", "timeout", "max_retries", "streaming"}
"""Standard parameters of chat models that speak to a server. Accepted, so that changing the class is enough; there is
no network here that they could be about."""

_NOT_TEXT = ("image_inputs", "audio_inputs", "pdf_inputs", "video_inputs", "image_outputs", "audio_outputs")
_SAMPLING = ("temperature", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_MERGING = ("merge_strategy", "recompute_ratio")
_TRACING_ONLY = {"stream", "ls_structured_output_format", "structured_output_format"}


class ChatKVCAG(BaseChatModel):
    """A chat model whose documents are encoded once.

    Text blocks of a message are segments that are found again by their content, in any order (see
    `kvcag.langchain.messages`); a prompt without documents reuses the longest prefix that was encoded before, so every
    turn of a chat reuses the last. Making one loads no weights and needs no network.

    ```python
    llm = ChatKVCAG(model="HuggingFaceTB/SmolLM2-135M-Instruct", store="kv/", max_tokens=200)
    llm.invoke("What is the capital of France?").content
    ```
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = ""
    """A hub id or a folder. Not needed with `engine`."""
    engine: SkipValidation[Engine | None] = Field(default=None, exclude=True)
    """A live engine, to be shared with other chat models, or with a `KVCacheMemory`."""
    fingerprint: str | None = None
    """The digest of the model that this has to be; another one is refused when it is loaded. With `engine`, its own."""
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict, exclude=True)
    """Passed to `HFEngine.from_pretrained`. A `token` among them is neither serialised nor traced."""
    template_variables: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, as `enable_thinking=False`. With `engine`, set them there."""

    temperature: float | None = None
    """0, or unset, is greedy, unless the engine's defaults say otherwise."""
    max_tokens: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    strip_thinking: bool = False
    """Leave `<think>…</think>` out of the answer."""

    store: KVStore | str | PathLike[str] | None = Field(default=None, exclude=True)
    """Where documents are kept: a store, or a folder. None: in memory, for all chat models over the same engine."""
    merge_strategy: Strategy = "query"
    """How cached documents are put together: see `KVCacheMemory.merge`."""
    recompute_ratio: float = Field(default=0.2, ge=0, le=1)
    tenant: str = ""
    """Keeps what this object reads apart from other tenants' in a shared engine: their timing tells them nothing."""

    _lazy: LazyEngine | None = PrivateAttr(default=None)
    _memories: dict[str, KVCacheMemory] = PrivateAttr(default_factory=dict)
    _contexts: dict[str, ContextHandles] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _drop_remote_only(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if name not in _REMOTE_ONLY}

    @model_validator(mode="after")
    def _which_model(self) -> Self:
        if self.engine is None:
            if not self.model:
                raise InvalidInputError("no model: pass model=, a hub id or a folder, or engine=, a live HFEngine")
            self._lazy = self._lazy_engine(self.model)
            return self
        if self.model not in ("", self.engine.model_name):
            raise InvalidInputError(
                f"model={self.model!r}, and an engine of {self.engine.model_name!r}: pass one of them"
            )
        self.model = self.engine.model_name
        self.fingerprint = self.fingerprint or self.engine.fingerprint.digest
        return self

    # --- what it is --------------------------------------------------------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "kvcag"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Whether `langchain_core.load.dumps` writes it: with settings alone, never weights or caches."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """What is serialised beyond the fields: the store, where it is a folder, and what the model was loaded with."""
        folder = {"store": str(self.store)} if isinstance(self.store, str | PathLike) else {}
        return {**folder, **({"model_kwargs": self._shown_model_kwargs} if self._shown_model_kwargs else {})}

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that can change an answer: LangChain's response cache goes by it."""
        own = ChatKVCAG.model_fields.keys() - BaseChatModel.model_fields.keys() - {"engine", "store", "tenant"}
        params = {name: getattr(self, name) for name in sorted(own)}
        return {**params, "model_kwargs": self._shown_model_kwargs}

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
        """What the model's configuration says, without loading it."""
        length = self.engine.context_length if self.engine else self._lazy_engine(self.model).context_length()
        profile = ModelProfile(text_inputs=True, text_outputs=True, temperature=True, open_weights=True)
        profile |= dict.fromkeys(_NOT_TEXT, False)  # type: ignore[typeddict-item]
        return profile | {"max_input_tokens": length, "max_output_tokens": length} if length else profile

    # --- the model ---------------------------------------------------------------------------------------------

    def memory(self, model: str | None = None) -> KVCacheMemory:
        """The memory that answers; the first call loads the weights.

        Args:
            model: another model than this object's own.

        Raises:
            FingerprintMismatchError: the loaded weights are not those that `fingerprint` names.
            ChatTemplateError: the model has no chat template.
        """
        name = model or self.model
        if name not in self._memories:
            engine = self._engine(name)
            if not engine.template.has_template:
                raise ChatTemplateError(
                    f"{name!r} has no chat template, so its tokenizer cannot write down who said what. Use an instruct "
                    "model, or set one: engine.tokenizer.chat_template = …"
                )
            store = open_store(self.store, engine)
            warn_if_foreign(store, engine.fingerprint)
            self._memories.setdefault(name, KVCacheMemory(engine, store, tenant=self.tenant))
        return self._memories[name]

    def _engine(self, model: str) -> Engine:
        own = model == self.model
        engine = self.engine if own and self.engine is not None else self._lazy_engine(model).engine()
        if own and self.fingerprint not in (None, engine.fingerprint.digest):
            wanted = f"fingerprint {engine.fingerprint.digest}, not {self.fingerprint}"
            raise FingerprintMismatchError(f"what this ChatKVCAG expects of {model!r}", [wanted])
        return engine

    def _lazy_engine(self, model: str) -> LazyEngine:
        revision = {"revision": self.revision} if self.revision and model == self.model else {}
        return LazyEngine.of(
            model,
            dtype=self.dtype,
            device=self.device,
            template_variables=self.template_variables,
            **revision,
            **self.model_kwargs,
        )

    def get_token_ids(self, text: str) -> list[int]:
        """The text's token ids, by the model's tokenizer, which is loaded without the weights."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return list(self._template.encode(text))

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """How many tokens the model reads for these messages, the chat template's own included."""
        schemas = [convert_to_openai_tool(tool) for tool in tools or ()]
        return len(self._template.prompt(neutral(messages), tools=schemas).token_ids)

    @property
    def _template(self) -> ChatTemplate:
        if self.engine is not None:
            return self.engine.template
        return ChatTemplate(self._lazy_engine(self.model).tokenizer(), self.template_variables)

    # --- ahead of the questions --------------------------------------------------------------------------------

    def precompute(
        self,
        documents: Iterable[Document],
        prompt: BasePromptTemplate[Any] | None = None,
        *,
        progress: bool = True,
        **prompt_settings: Any,
    ) -> list[str]:
        """Encode documents before anybody asks, and return the ids under which they are kept.

        Args:
            documents: what a retriever may find. Those that are kept already are not encoded again.
            prompt: the prompt that they will be asked with, as for `create_cag_documents_chain`. With it, the same
                tokens stand before them now as then, which keeps merged answers closer to the model's own; without
                it they are encoded for any prompt.
            progress: show a progress bar.
            **prompt_settings: `document_prompt`, `document_separator` and `document_variable_name`, as for the chain.

        Raises:
            InvalidInputError: something that is not known yet stands before the documents in the prompt.
        """
        listed, steps = self._encoding_ahead(documents, prompt, prompt_settings)
        return list(tqdm(steps(), total=len(listed), desc="encoding", unit="document", disable=not progress))

    async def aprecompute(
        self,
        documents: Iterable[Document],
        prompt: BasePromptTemplate[Any] | None = None,
        *,
        progress: bool = True,
        **prompt_settings: Any,
    ) -> list[str]:
        """`precompute`, in worker threads."""
        listed, steps = self._encoding_ahead(documents, prompt, prompt_settings)
        with tqdm(total=len(listed), desc="encoding", unit="document", disable=not progress) as bar:
            async with aclosing(iterate(steps)) as ids:
                return [id async for id in ids if bar.update() or True]

    def create_context(self, documents: Iterable[Document | str], instruction: str = "") -> str:
        """Encode a corpus whole, and return a short id for it: `llm.bind(cached_content=id)` answers from it.

        Args:
            documents: in the order in which they shall stand.
            instruction: stands before them in the system message; what the system message of a call says stands after.
        """
        texts = (document if isinstance(document, str) else document.page_content for document in documents)
        return self._handles().create(texts, instruction)

    async def acreate_context(self, documents: Iterable[Document | str], instruction: str = "") -> str:
        """`create_context`, in a worker thread."""
        return await asyncio.to_thread(self.create_context, documents, instruction)

    def _handles(self, model: str | None = None) -> ContextHandles:
        memory = self.memory(model)
        return self._contexts.setdefault(memory.engine.model_name, ContextHandles(memory))

    def _encoding_ahead(
        self, documents: Iterable[Document], prompt: BasePromptTemplate[Any] | None, settings: dict[str, Any]
    ) -> tuple[list[Document], Callable[[], Iterator[str]]]:
        listed = list(documents)
        shown = DocumentsPrompt(prompt=prompt, **settings) if prompt is not None else None
        separator = settings.get("document_separator", DOCUMENT_SEPARATOR)
        return listed, lambda: encoding_ahead(self.memory(), listed, shown, separator)

    # --- answering ---------------------------------------------------------------------------------------------

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with closing(self._open(messages, stop, kwargs)) as chunks:
            for chunk in chunks:
                yield generation_chunk(chunk, kwargs.get("model") or self.model)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with aclosing(iterate(lambda: self._open(messages, stop, kwargs))) as chunks:
            async for chunk in chunks:
                yield generation_chunk(chunk, kwargs.get("model") or self.model)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop=stop, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop=stop, **kwargs))

    def _open(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, given: dict[str, Any]
    ) -> Generator[Chunk, None, None]:
        """Check everything, make the context, and give the answer's chunks. Closing it stops the model."""
        unknown = given.keys() - {"model", "cached_content", *_SAMPLING, *_MERGING, *_TRACING_ONLY}
        if unknown:
            raise InvalidInputError(
                f"unknown argument {', '.join(sorted(unknown))}. A call takes model, cached_content, "
                f"{', '.join((*_SAMPLING, *_MERGING))}."
            )
        settings = {name: given.get(name, getattr(self, name)) for name in (*_SAMPLING, *_MERGING)}
        memory = self.memory(given.get("model"))
        strategy, ratio = settings.pop("merge_strategy"), settings.pop("recompute_ratio")
        stops = stop if stop is not None else self.stop
        sampling = memory.engine.sampling(**settings, stop=stops or None, strip_thinking=self.strip_thinking or None)
        asked = neutral(messages)
        if context := given.get("cached_content"):
            asked = self._handles(given.get("model")).place(context, asked)
        return memory.stream(asked, strategy=strategy, ratio=ratio, sampling=sampling)
