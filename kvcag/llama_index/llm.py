"""KVCacheLLM: a local model as a LlamaIndex LLM whose documents are encoded once."""

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
"""Fields of LlamaIndex's `LLM` that take the chat template's place in models that have none."""

_REACT = {"react_chat_formatter", "output_parser"}
"""Arguments of `predict_and_call` that are for a step of ReAct, which models without tools take."""


class KVCacheLLM(FunctionCallingLLM):
    """An LLM whose documents are encoded once.

    Every prompt reuses the longest prefix that was encoded before. The text that a `CachePoint` closes is kept in
    `store` and found there after a restart. Documents (`kvcag.llama_index.DOCUMENT_END`) are found one by one and put
    together. `raw["usage"]` of a response counts what was reused and encoded. The constructor loads no weights.

    ```python
    llm = KVCacheLLM(model="HuggingFaceTB/SmolLM2-135M-Instruct", store="kv/")
    print(llm.complete("What is the capital of France?"))
    ```

    Args:
        model: a hub id or a folder. The weights are loaded on first use, once for all LLMs with the same settings.
            Not needed with `engine` or `memory`.
        engine: a live `kvcag.engines.base.Engine`: an `HFEngine`, a `VLLMEngine`, an `EchoEngine`.
        memory: a `MemoryCube` or a `KVCacheMemory` that answers, with its engine, store and namespace.
        store: where documents are kept: a `KVStore`, or a folder. None: in memory, shared over the same engine.
        model_kwargs: further arguments of `HFEngine.from_pretrained`. They are not serialised.
        **settings: the fields below, and those of LlamaIndex's `LLM`.

    Raises:
        InvalidInputError: there is no model, two arguments contradict each other, or a setting is unknown or out of
            range.
    """

    model: str = Field(default="", description="A hub id or a folder.")
    dtype: str = Field(default="auto", description="The weights' dtype; `auto` is the checkpoint's own.")
    device: str = Field(default="auto", description="Where the model runs; `auto` is CUDA, then MPS, then the CPU.")
    store: str | None = Field(default=None, description="The folder where documents are kept, if it is one.")
    merge_strategy: Strategy = Field(default="auto", description="How cached documents are put together.")
    recompute_ratio: float = Field(
        default=DEFAULT_RATIO, ge=0, le=1, description="The share of context tokens that a merge computes again."
    )
    max_kl: float = Field(default=MAX_KL, ge=0, description="The error that 'auto' allows, in nats per token.")
    max_new_tokens: int | None = Field(default=None, description="The most to generate; None: the engine's.")
    temperature: float | None = Field(default=None, description="0 is greedy; None: the engine's.")
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = Field(default=None, description="Strings that end the answer.")
    strip_thinking: bool | None = Field(default=None, description="Leave thinking out; else it is a `ThinkingBlock`.")
    context_window: int | None = Field(
        default=None, ge=1, description="What LlamaIndex may fill with prompt and answer; None: the model's context."
    )
    namespace: str = Field(default="", description="Separates its recent contexts and files from other namespaces'.")

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
        settings.pop("class_name", None)  # of what `model_dump` wrote
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
                f"{', '.join(rendering)}: the model's own chat template makes the prompt, so leave this out. For "
                "another template, save the model's tokenizer with another chat_template."
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
        if name in SAMPLING_SETTINGS:  # here and not in a query, where core's `Refine` swallows a ValueError
            Sampling.of(**{name: value})
        if name in MERGE_SETTINGS:
            with checked_fields():
                self.__pydantic_validator__.validate_assignment(self, name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process the model is loaded anew. Callbacks stay here. See `LazyMemory.__reduce__`."""
        return partial(type(self).from_dict, self.to_dict()), (), {"_memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._memory = state["_memory"]

    @classmethod
    def class_name(cls) -> str:
        """The name under which this class is serialised."""
        return "KVCacheLLM"

    @property
    def memory(self) -> KVCacheMemory:
        """The memory that answers. The first access loads the weights, and warns if another model filled the store."""
        return self._memory.memory()

    @property
    def engine(self) -> Engine:
        """The engine that answers."""
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
        """The number of tokens of the prompt that these messages make."""
        return len(self.engine.template.prompt(to_messages(messages)).token_ids)

    # --- the eight methods -------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages.

        Args:
            messages: with text only.
            **kwargs: settings for this call: `max_new_tokens` (or `max_tokens`), `temperature`, `top_k`, `top_p`,
                `min_p`, `repetition_penalty`, `seed`, `stop`, `strip_thinking`, `merge_strategy`,
                `recompute_ratio`, `max_kl`.

        Raises:
            InvalidInputError: an unknown setting or no messages.
            ContextLengthError: the prompt and the answer exceed the model's context.
            UnsupportedContentError: a message holds an image or audio.
        """
        opener, answer = self._call(to_messages(messages), kwargs)
        return last(each(opener(), answer.chat))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat`, piece by piece. Closing the stream stops the model."""
        opener, answer = self._call(to_messages(messages), kwargs)
        return each(opener(), answer.chat)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat`, in worker threads. Cancelling stops the model."""
        opener, answer = self._call(to_messages(messages), kwargs)
        return await alast(aeach(opener, answer.chat))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat`, in worker threads."""
        opener, answer = self._call(to_messages(messages), kwargs)
        chunks = await in_thread(opener)
        return aeach(lambda: chunks, answer.chat)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt.

        Args:
            prompt: a user message, or, for a model without a chat template, the beginning of a text.
            formatted: the prompt is in the model's own format and is used as it is.
            **kwargs: as for `chat`.
        """
        opener, answer = self._call(self._asked(prompt, formatted), kwargs)
        return last(each(opener(), answer.completion))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`complete`, piece by piece."""
        opener, answer = self._call(self._asked(prompt, formatted), kwargs)
        return each(opener(), answer.completion)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete`, in worker threads."""
        opener, answer = self._call(self._asked(prompt, formatted), kwargs)
        return await alast(aeach(opener, answer.completion))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete`, in worker threads."""
        opener, answer = self._call(self._asked(prompt, formatted), kwargs)
        chunks = await in_thread(opener)
        return aeach(lambda: chunks, answer.completion)

    def stream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenGen:
        """`predict`, piece by piece. No piece is empty."""
        pieces = super().stream(prompt, **prompt_args)
        return (piece for piece in pieces if piece)

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """`stream`, in worker threads."""
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
        """Call the tools that the model chooses: by a step of ReAct where its formatter or parser is given."""
        if kwargs.keys() & _REACT:
            return super(FunctionCallingLLM, self).predict_and_call(*args, **kwargs)
        return super().predict_and_call(*args, **kwargs)

    async def apredict_and_call(self, *args: Any, **kwargs: Any) -> AgentChatResponse:
        """`predict_and_call`, in worker threads."""
        if kwargs.keys() & _REACT:
            return await super(FunctionCallingLLM, self).apredict_and_call(*args, **kwargs)
        return await super().apredict_and_call(*args, **kwargs)

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls in a response.

        Raises:
            InvalidInputError: there is none, and `error_on_no_tool_call` is True.
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
        """Core's program, with a required call: core requires it only for answers that are not streamed."""
        forced = {"tool_choice": "any"} if self.metadata.is_function_calling_model else {}
        return get_program_for_llm(output_cls, prompt, self, self.pydantic_program_mode, **forced)

    # --- inside ------------------------------------------------------------------------------------------------

    def _asked(self, prompt: str, formatted: bool) -> list[Message] | Prompt:
        if not isinstance(prompt, str):
            raise InvalidInputError(f"a prompt is a str, not {type(prompt).__name__}")
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
    "If a synthesizer or a splitter of LlamaIndex cut the texts: it counts with Settings.tokenizer, which is not this "
    "model's. Set Settings.tokenizer = llm.engine.template.encode, or answer with a CAGSynthesizer."
)
