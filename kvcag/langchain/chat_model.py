"""ChatKVCAG: a local Hugging Face model as a LangChain chat model that keeps what it has read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict
from os import PathLike
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field, PrivateAttr, model_validator
from typing_extensions import Self

from kvcag.aio import iterate
from kvcag.engines.base import Chunk, Usage
from kvcag.engines.hf import HFEngine
from kvcag.errors import FingerprintMismatchError, InvalidInputError
from kvcag.langchain.messages import neutral
from kvcag.memory import KVCacheMemory, Strategy
from kvcag.shared import LazyEngine, open_store
from kvcag.stores.base import KVStore

_REMOTE_ONLY = {"api_key", "base_url", "timeout", "max_retries", "streaming"}
"""Standard parameters of chat models that speak to a server. Accepted, so that changing the class is enough; there is
no network here that they could be about."""

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
    engine: HFEngine | None = Field(default=None, exclude=True)
    """A live engine, to be shared with other chat models, or with a `KVCacheMemory`."""
    fingerprint: str | None = None
    """The digest of the model that this has to be; another one is refused when it is loaded. With `engine`, its own."""
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to `HFEngine.from_pretrained`."""
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

    _lazy: LazyEngine | None = PrivateAttr(default=None)
    _memories: dict[str, KVCacheMemory] = PrivateAttr(default_factory=dict)

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
        """What is serialised beyond the fields: the store, where it is a path."""
        return {"store": str(self.store)} if isinstance(self.store, str | PathLike) else {}

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that can change an answer: LangChain's response cache goes by it."""
        kept_out = {"store", "engine", "profile", "name", "custom_get_token_ids", "output_version"}
        own = ChatKVCAG.model_fields.keys() - BaseChatModel.model_fields.keys() - kept_out
        return {name: getattr(self, name) for name in sorted(own)}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "kvcag"
        return params

    def _resolve_model_profile(self) -> Any:
        return None

    # --- the model ---------------------------------------------------------------------------------------------

    def memory(self, model: str | None = None) -> KVCacheMemory:
        """The memory that answers; the first call loads the weights.

        Args:
            model: another model than this object's own.

        Raises:
            FingerprintMismatchError: the loaded weights are not those that `fingerprint` names.
        """
        name = model or self.model
        if name not in self._memories:
            engine = self._engine(name)
            self._memories[name] = KVCacheMemory(engine, open_store(self.store, engine))
        return self._memories[name]

    def _engine(self, model: str) -> HFEngine:
        own = model == self.model
        engine = self.engine if own and self.engine is not None else self._lazy_engine(model).engine()
        if own and self.fingerprint not in (None, engine.fingerprint.digest):
            wanted = f"fingerprint {engine.fingerprint.digest}, not {self.fingerprint}"
            raise FingerprintMismatchError(f"this ChatKVCAG's model {model!r}", [wanted])
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
                yield self._generation_chunk(chunk, kwargs)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with aclosing(iterate(lambda: self._open(messages, stop, kwargs))) as chunks:
            async for chunk in chunks:
                yield self._generation_chunk(chunk, kwargs)

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
        unknown = given.keys() - {"model", *_SAMPLING, *_MERGING, *_TRACING_ONLY}
        if unknown:
            raise InvalidInputError(f"unknown argument {', '.join(sorted(unknown))}")
        settings = {name: given.get(name, getattr(self, name)) for name in (*_SAMPLING, *_MERGING)}
        memory = self.memory(given.get("model"))
        strategy, ratio = settings.pop("merge_strategy"), settings.pop("recompute_ratio")
        stops = stop if stop is not None else self.stop
        sampling = memory.engine.sampling(**settings, stop=stops or None, strip_thinking=self.strip_thinking or None)
        return cast(
            "Generator[Chunk, None, None]",
            memory.stream(neutral(messages), strategy=strategy, ratio=ratio, sampling=sampling),
        )

    def _generation_chunk(self, chunk: Chunk, given: dict[str, Any]) -> ChatGenerationChunk:
        if chunk.usage is None:
            return ChatGenerationChunk(message=AIMessageChunk(content=chunk.text))
        message = AIMessageChunk(
            content=chunk.text,
            usage_metadata=_usage_metadata(chunk.usage),
            response_metadata={
                "model_name": given.get("model") or self.model,
                "model_provider": "kvcag",
                "finish_reason": chunk.finish_reason,
                "kvcag": _report(chunk.usage),
            },
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)


def _usage_metadata(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens, cache_creation=usage.created_tokens),
    )


def _report(usage: Usage) -> dict[str, Any]:
    """How the answer was made, for `response_metadata["kvcag"]`: counts, names and seconds, no tensors."""
    made = asdict(usage.context) if usage.context else {"mode": "exact" if usage.cached_tokens else "encoded"}
    return {**made, "ttft_s": usage.ttft_s, "total_s": usage.total_s}
