"""Which model a chat model is: its settings, its engine and memory, and what is said about it."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

import torch
from langchain_core.language_models import BaseChatModel, LangSmithParams, ModelProfile
from langchain_core.messages import BaseMessage
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr, SkipValidation, model_validator
from typing_extensions import Self

from kvcag.chat_template import ChatTemplate
from kvcag.contexts import MAX_KL, Strategy
from kvcag.cube.memory_cube import MemoryCube, activation
from kvcag.engines.base import Engine
from kvcag.engines.loading import LazyEngine
from kvcag.errors import ChatTemplateError, FingerprintMismatchError, InvalidInputError
from kvcag.langchain.messages import to_messages
from kvcag.langchain.tools import ask
from kvcag.memory import KVCacheMemory, open_store
from kvcag.stores.base import KVStore

_REMOTE_ONLY = {"api_key", "base_url", "timeout", "max_retries"}
"""Standard parameters of chat models that speak to a server. Accepted, so that changing the class is enough; there is
no network here that they could be about."""

_NOT_IN_ANSWERS = {"engine", "kept", "store", "namespace", "streaming"}
"""Fields that change no answer; an engine is identified by its fingerprint."""

_NOT_TEXT = ("image_inputs", "audio_inputs", "pdf_inputs", "video_inputs", "image_outputs", "audio_outputs")


class LocalChatModel(BaseChatModel):
    """A chat model on an engine of this process. Making one loads no weights and needs no network."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

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
    streaming: bool = False
    """True: `invoke` too gives its tokens to callbacks as they come. False, if given: `stream` gives one piece."""

    kept: SkipValidation[KVCacheMemory | MemoryCube | None] = Field(default=None, alias="memory", exclude=True)
    """Given as `memory`: a `MemoryCube` or a `KVCacheMemory` that answers, with its engine, store and namespace."""
    store: KVStore | str | PathLike[str] | None = Field(default=None, exclude=True)
    """Where documents are kept: a store, or a folder. None: in memory, up to 4 GiB, for all over the same engine."""
    merge_strategy: Strategy = "query"
    """How cached documents are put together: see `KVCacheMemory.merge`."""
    recompute_ratio: float = Field(default=0.2, ge=0, le=1)
    max_kl: float = Field(default=MAX_KL, ge=0)
    """What `merge_strategy="auto"` allows, nats a token: see `HFEngine.calibrate`."""
    namespace: str = ""
    """Keeps what this object reads apart from what other namespaces' read: their timing tells them nothing of it. A
    `KVStore` is taken as it is: give each namespace its own."""

    _lazy: LazyEngine | None = PrivateAttr(default=None)
    _memories: dict[str, KVCacheMemory] = PrivateAttr(default_factory=dict)

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
        if self.kept is not None:
            memory = activation(self.kept, engine=self.engine, store=self.store, namespace=self.namespace)
            self.engine, self.store, self.namespace = memory.engine, memory.store, memory.namespace
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
        own = type(self).model_fields.keys() - BaseChatModel.model_fields.keys() - _NOT_IN_ANSWERS
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
        profile |= {"tool_calling": True, "tool_choice": True, "structured_output": True}
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
            if self.kept is not None and engine is self.engine:
                return self._memories.setdefault(name, activation(self.kept))
            store = open_store(self.store, engine, self.namespace)
            memory = self._memories.setdefault(name, KVCacheMemory(engine, store, namespace=self.namespace))
            memory.documents.warn_if_foreign()
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
        template = self._template
        asked = ask(template, to_messages(messages), {"tools": [convert_to_openai_tool(tool) for tool in tools or ()]})
        return len(template.prompt(asked.messages, tools=asked.tools).token_ids)

    @property
    def _template(self) -> ChatTemplate:
        if self.engine is not None:
            return self.engine.template
        return ChatTemplate(self._lazy_engine(self.model).tokenizer(), self.template_variables)
