"""KVCacheLLM: a local model as a LlamaIndex LLM that encodes each document once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from os import PathLike
from typing import Any

import llama_index.core
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.chat_engine.types import AgentChatResponse
from llama_index.core.constants import DEFAULT_NUM_OUTPUTS
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.program.utils import get_program_for_llm
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.tools.types import BaseTool
from llama_index.core.types import TokenAsyncGen, TokenGen
from pydantic import Field, PrivateAttr

from kvcag.adapters import (
    MERGE_SETTINGS,
    SAMPLING_SETTINGS,
    LazyMemory,
    call_settings,
    checked_fields,
    choice_of,
    with_tools,
)
from kvcag.chat_template import Message, Prompt
from kvcag.concurrency import in_thread
from kvcag.core import DEFAULT_RATIO, MAX_KL, Strategy
from kvcag.cube.memory_cube import MemoryCube
from kvcag.engines.base import Engine, Sampling
from kvcag.errors import ContextLengthError, InvalidInputError
from kvcag.llama_index.messages import (
    Answer,
    Chunks,
    Opener,
    aeach,
    alast,
    each,
    last,
    selections,
    to_messages,
    tool_specs,
)
from kvcag.memory import KVCacheMemory
from kvcag.stores.base import KVStore

_RENDERING = {"messages_to_prompt", "completion_to_prompt"}
"""Fields of LlamaIndex's `LLM` that format prompts for models without a chat template."""

_REACT = {"react_chat_formatter", "output_parser"}
"""Arguments of `predict_and_call` for a ReAct step: LlamaIndex uses ReAct for models that cannot call tools."""


class KVCacheLLM(FunctionCallingLLM):
    """An LLM that encodes each document once.

    Every prompt reuses the longest prefix that was encoded before. The text before a `CachePoint` is cached in `store`,
    and found there after a restart. Documents (`kvcag.llama_index.DOCUMENT_END`) are cached one by one, and their
    caches are merged. `raw["usage"]` of a response counts reused and encoded tokens. The constructor loads no weights.

    ```python
    llm = KVCacheLLM(model="HuggingFaceTB/SmolLM2-135M-Instruct", store="kv/")
    print(llm.complete("What is the capital of France?"))
    ```

    Args:
        model: a Hugging Face hub id or a folder. The weights are loaded on first use, once for all LLMs with the same
            settings. Not needed with `engine` or `memory`.
        engine: a loaded `kvcag.engines.base.Engine`: an `HFEngine`, a `VLLMEngine` or an `EchoEngine`.
        memory: a `MemoryCube` or a `KVCacheMemory`, whose engine, store and namespace are used.
        store: stores the caches: a `KVStore`, or a folder. None: in memory, shared by all users of the engine.
        model_kwargs: further arguments of `HFEngine.from_pretrained`. They are not serialised.
        **settings: the fields below, and those of LlamaIndex's `LLM`.

    Raises:
        InvalidInputError: there is no model, two arguments contradict each other, or a setting is unknown or out of
            range.
    """

    model: str = Field(default="", description="A Hugging Face hub id or a folder.")
    dtype: str = Field(default="auto", description="The weights' dtype; `auto` is the checkpoint's own.")
    device: str = Field(default="auto", description="Where the model runs; `auto` is CUDA, then MPS, then the CPU.")
    store: str | None = Field(default=None, description="The folder of the caches, if the store is a folder.")
    merge_strategy: Strategy = Field(default="auto", description="How the caches of documents are merged.")
    recompute_ratio: float = Field(
        default=DEFAULT_RATIO, ge=0, le=1, description="The share of context tokens that a merge recomputes."
    )
    max_kl: float = Field(default=MAX_KL, ge=0, description="The error that 'auto' allows, in nats per token.")
    max_new_tokens: int | None = Field(default=None, description="The most tokens to generate; None: engine's default.")
    temperature: float | None = Field(default=None, description="0 is greedy; None: the engine's default.")
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = Field(default=None, description="Strings that end the answer.")
    strip_thinking: bool | None = Field(
        default=None, description="Remove the model's thinking. Otherwise it is a `ThinkingBlock` of the message."
    )
    context_window: int | None = Field(
        default=None, ge=1, description="The tokens that a prompt and its answer may have; None: the model's context."
    )
    namespace: str = Field(
        default="", description="Separates recent contexts and cache files from those of other namespaces."
    )

    _memory: LazyMemory = PrivateAttr()

    def __init__(
        self,
        model: str | PathLike[str] = "",
        *,
        engine: Engine | None = None,
        memory: KVCacheMemory | MemoryCube | None = None,
        store: KVStore | str | PathLike[str] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        settings.pop("class_name", None)  # `model_dump` writes it
        unknown = sorted(settings.keys() - type(self).model_fields.keys())
        if unknown:
            known = sorted({*type(self).model_fields, "engine", "memory", "model_kwargs"} - _RENDERING)
            raise InvalidInputError(
                f"unknown argument {', '.join(unknown)}. Known arguments: {', '.join(known)}. Arguments of "
                "HFEngine.from_pretrained and of transformers, such as revision, go into model_kwargs."
            )
        rendering = sorted(name for name in _RENDERING & settings.keys() if settings[name] is not None)
        if rendering:
            raise InvalidInputError(
                f"{', '.join(rendering)} would not be used: the model's own chat template makes the prompt. Leave it "
                "out. For another template, save the model's tokenizer with another chat_template."
            )
        folder = None if store is None or isinstance(store, KVStore) else str(store)
        Sampling.of(**{name: value for name, value in settings.items() if name in SAMPLING_SETTINGS})
        with checked_fields():
            super().__init__(model=str(model), store=folder, **settings)
        self._memory = LazyMemory(
            model,
            engine=engine,
            memory=memory,
            store=store,
            namespace=self.namespace,
            dtype=self.dtype,
            device=self.device,
            **(model_kwargs or {}),
        )
        self.model, self.namespace = self._memory.model, self._memory.namespace

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SAMPLING_SETTINGS:  # checked here: at a query, LlamaIndex's `Refine` would swallow the ValueError
            Sampling.of(**{name: value})
        if name in MERGE_SETTINGS:
            with checked_fields():
                self.__pydantic_validator__.validate_assignment(self, name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process loads the model again. Callbacks are not copied. See `LazyMemory.__reduce__`."""
        return partial(type(self).from_dict, self.to_dict()), (), {"_memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._memory = state["_memory"]

    @classmethod
    def class_name(cls) -> str:
        """The name under which this class is serialised."""
        return "KVCacheLLM"

    @property
    def memory(self) -> KVCacheMemory:
        """The memory that this LLM answers from.

        The first access loads the weights, and warns if another model filled the store.
        """
        return self._memory.memory()

    @property
    def engine(self) -> Engine:
        """The engine that this LLM answers with. The first access loads the weights."""
        return self.memory.engine

    @property
    def metadata(self) -> LLMMetadata:
        """Context window, kind of model and name. Loads the weights."""
        engine = self.engine
        window = self.context_window or engine.context_length
        return LLMMetadata(
            context_window=window,
            num_output=self.max_new_tokens or min(DEFAULT_NUM_OUTPUTS, window // 4),
            is_chat_model=engine.template.has_template,
            is_function_calling_model=engine.template.has_template and find_spec("llguidance") is not None,
            model_name=self.model,
        )

    def count_tokens(self, messages: Sequence[ChatMessage]) -> int:
        """The number of tokens in the prompt of these messages, including the chat template's own tokens."""
        return len(self.engine.template.prompt(to_messages(messages)).token_ids)

    # --- LlamaIndex's eight methods that answer ----------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages.

        Args:
            messages: the conversation. Its blocks are text.
            **kwargs: settings for this call: `max_new_tokens` (or `max_tokens`), `temperature`, `top_k`, `top_p`,
                `min_p`, `repetition_penalty`, `seed`, `stop`, `strip_thinking`, `merge_strategy`,
                `recompute_ratio`, `max_kl`.

        Raises:
            InvalidInputError: a setting is unknown or out of range, or there are no messages.
            ContextLengthError: the prompt and the answer exceed the model's context.
            UnsupportedContentError: a message contains an image, audio or other content that is not text.
        """
        opener, answer = self._call(to_messages(messages), kwargs)
        return last(each(opener(), answer.chat))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat`, as a stream. Closing the stream stops the model."""
        opener, answer = self._call(to_messages(messages), kwargs)
        return each(opener(), answer.chat)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Asynchronous `chat`. Cancelling it stops the model."""
        opener, answer = self._call(to_messages(messages), kwargs)
        return await alast(aeach(opener, answer.chat))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Asynchronous `stream_chat`."""
        opener, answer = self._call(to_messages(messages), kwargs)
        chunks = await in_thread(opener)
        return aeach(lambda: chunks, answer.chat)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt.

        Args:
            prompt: a user message; for a model without a chat template, a text that the model continues.
            formatted: the prompt has the model's own format already, so the chat template is not applied.
            **kwargs: as for `chat`.

        Raises:
            InvalidInputError: a setting is unknown or out of range, or the prompt is not a str.
            ContextLengthError: the prompt and the answer exceed the model's context.
        """
        opener, answer = self._call(self._asked(prompt, formatted), kwargs)
        return last(each(opener(), answer.completion))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`complete`, as a stream. Closing the stream stops the model."""
        opener, answer = self._call(self._asked(prompt, formatted), kwargs)
        return each(opener(), answer.completion)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Asynchronous `complete`. Cancelling it stops the model."""
        opener, answer = self._call(self._asked(prompt, formatted), kwargs)
        return await alast(aeach(opener, answer.completion))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Asynchronous `stream_complete`."""
        opener, answer = self._call(self._asked(prompt, formatted), kwargs)
        chunks = await in_thread(opener)
        return aeach(lambda: chunks, answer.completion)

    def stream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenGen:
        """`predict`, as a stream of texts. No text is empty."""
        pieces = super().stream(prompt, **prompt_args)
        return (piece for piece in pieces if piece)

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """Asynchronous `stream`."""
        pieces = await super().astream(prompt, **prompt_args)
        return (piece async for piece in pieces if piece)

    # --- tools -------------------------------------------------------------------------------------------------

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `chat` for a call with tools. A grammar enforces a required tool."""
        asked = [ChatMessage(content=user_msg)] if isinstance(user_msg, str) else [user_msg] if user_msg else []
        shown = tool_specs(tools)
        return {
            "messages": [*(chat_history or []), *asked],
            "tools": shown,
            "tool_choice": choice_of(tool_choice, [tool["function"]["name"] for tool in shown], required=tool_required),
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def predict_and_call(self, *args: Any, **kwargs: Any) -> AgentChatResponse:
        """Call the tools that the model chooses. If a ReAct formatter or parser is given, take one step of ReAct."""
        if kwargs.keys() & _REACT:
            return super(FunctionCallingLLM, self).predict_and_call(*args, **kwargs)
        return super().predict_and_call(*args, **kwargs)

    async def apredict_and_call(self, *args: Any, **kwargs: Any) -> AgentChatResponse:
        """Asynchronous `predict_and_call`."""
        if kwargs.keys() & _REACT:
            return await super(FunctionCallingLLM, self).apredict_and_call(*args, **kwargs)
        return await super().apredict_and_call(*args, **kwargs)

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tool calls in a response.

        Raises:
            InvalidInputError: the response has no tool call, and `error_on_no_tool_call` is True.
        """
        calls = selections(response)
        if not calls and error_on_no_tool_call:
            raise InvalidInputError(f"the model called no tool. It answered {response.message.content!r}.")
        return calls

    def _structured_stream_call(self, output_cls: Any, prompt: Any, llm_kwargs: Any = None, **prompt_args: Any) -> Any:
        program = self._forced_program(output_cls, prompt)
        return program.stream_call(llm_kwargs=llm_kwargs, **prompt_args)

    async def _structured_astream_call(
        self, output_cls: Any, prompt: Any, llm_kwargs: Any = None, **prompt_args: Any
    ) -> Any:
        program = self._forced_program(output_cls, prompt)
        return await program.astream_call(llm_kwargs=llm_kwargs, **prompt_args)

    def _forced_program(self, output_cls: Any, prompt: Any) -> Any:
        """LlamaIndex's program with a required tool call. LlamaIndex requires the call only if it does not stream."""
        forced = {"tool_choice": "any"} if self.metadata.is_function_calling_model else {}
        return get_program_for_llm(output_cls, prompt, self, self.pydantic_program_mode, **forced)

    # --- private -----------------------------------------------------------------------------------------------

    def _asked(self, prompt: str, formatted: bool) -> list[Message] | Prompt:
        if not isinstance(prompt, str):
            raise InvalidInputError(f"the prompt is a {type(prompt).__name__}: pass a str")
        return self.engine.template.verbatim(prompt) if formatted else [{"role": "user", "content": prompt}]

    def _call(self, messages: list[Message] | Prompt, kwargs: dict[str, Any]) -> tuple[Opener, Answer]:
        """A function that opens the answer's stream, and the reader of its chunks. Wrong settings raise here."""
        memory = self.memory
        template = memory.engine.template
        tools, choice = kwargs.pop("tools", None), kwargs.pop("tool_choice", None) or "auto"
        parallel = kwargs.pop("parallel_tool_calls", True)
        plan = None
        if not isinstance(messages, Prompt):
            messages, plan = with_tools(template, messages, tools, choice, parallel)
        options = call_settings(memory.engine, self, kwargs)
        sampling = options["sampling"]
        options["sampling"] = replace(sampling, strip_thinking=True)
        if plan is not None:
            options |= {"tools": plan.tools, "constraint": plan.constraint}
        ids = None if isinstance(messages, Prompt) else ()

        def opener() -> Chunks:
            try:
                return memory.stream(messages, ids, **options)
            except ContextLengthError as too_long:
                counts = llama_index.core.global_tokenizer
                if counts is None or len(counts(_COUNTED)) != len(template.encode(_COUNTED)):
                    too_long.args = (f"{too_long} {_HINT}",)
                raise

        thinks = not sampling.strip_thinking
        return opener, Answer(self.model, plan.parser() if plan else None, thinks=thinks)


_COUNTED = "Forty-two unmistakable words, counted in tokens: 3.14159, naïveté."
_HINT = (
    "LlamaIndex's synthesizers and splitters count tokens with Settings.tokenizer, which is not this model's. If one "
    "of them cut the texts, set Settings.tokenizer = llm.engine.template.encode, or answer with a CAGSynthesizer."
)
