"""Configuration with the field names of MemOS, so that a configuration written for MemOS works with kvcag."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from kvcag.engines.hf import HFEngine

if TYPE_CHECKING:
    from kvcag.engines.vllm.engine import VLLMEngine


class _LLMConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model_name_or_path: str
    temperature: float = 0.7
    max_tokens: int = Field(default=512, ge=1)
    top_p: float = 0.95
    top_k: int = 20
    remove_think_prefix: bool = False
    model_schema: str | None = None
    """The name of MemOS's own configuration class. It is accepted and not used."""

    @property
    def _defaults(self) -> dict[str, Any]:
        """The default sampling settings of the engine."""
        return {
            "temperature": self.temperature,
            "max_new_tokens": self.max_tokens,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "strip_thinking": self.remove_think_prefix,
        }


class HFLLMConfig(_LLMConfig):
    """A Hugging Face model, and the sampling settings of its answers.

    Attributes:
        model_name_or_path: a hub id or a folder.
        temperature: as in `Sampling`; so are `top_p` and `top_k`.
        max_tokens: `max_new_tokens` of `Sampling`.
        remove_think_prefix: `strip_thinking` of `Sampling`.
        do_sample: False decodes greedily.
        add_generation_prompt: must be true; accepted because MemOS's configurations have it.
    """

    do_sample: bool = False
    add_generation_prompt: Literal[True] = True

    def engine(self) -> HFEngine:
        """Load the model, with these settings as the engine's defaults.

        Raises:
            KVCAGError: as `HFEngine.from_pretrained`.
        """
        return HFEngine.from_pretrained(
            self.model_name_or_path, defaults={**self._defaults, "do_sample": self.do_sample}
        )


class VLLMLLMConfig(_LLMConfig):
    """A model on a vLLM server, and the sampling settings of its answers, as in `HFLLMConfig`.

    Attributes:
        api_base: the URL of the server's API.
        api_key: sent as a bearer token; empty: none is sent.
        temperature: 0 decodes greedily.
    """

    api_base: str = "http://localhost:8088/v1"
    api_key: str = ""
    temperature: float = Field(default=0.7, ge=0)
    enable_thinking: bool | None = None
    """Passed to the chat template unless it is None."""

    def engine(self) -> VLLMEngine:
        """Return an engine over the server, with these settings as its defaults. The server need not run yet."""
        from kvcag.engines.vllm.engine import VLLMEngine  # not above: it needs the extra `vllm`

        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return VLLMEngine(
            self.api_base,
            self.model_name_or_path,
            api_key=self.api_key or None,
            template_variables=thinking,
            defaults=self._defaults,
        )


class ExtractorLLM(BaseModel):
    """The engine that encodes and answers.

    Attributes:
        backend: `huggingface_singleton` shares one engine among equal configurations.
        config: the model; a `VLLMLLMConfig` with the backend `vllm`, else a `HFLLMConfig`.
    """

    model_config = ConfigDict(extra="forbid")

    backend: Literal["huggingface", "huggingface_singleton", "vllm"]
    config: HFLLMConfig | VLLMLLMConfig

    @field_validator("config", mode="before")
    @classmethod
    def _of_the_backend(cls, value: Any, info: ValidationInfo) -> Any:
        made = VLLMLLMConfig if info.data.get("backend") == "vllm" else HFLLMConfig
        return made.model_validate(value)

    def engine(self) -> HFEngine | VLLMEngine:
        """Load the model, or return the engine that an equal configuration loaded, or an engine over the server."""
        if self.backend == "huggingface" or isinstance(self.config, VLLMLLMConfig):
            return self.config.engine()
        key = self.config.model_dump_json()
        with _shared_lock:
            engine = _shared.get(key)
            if engine is None:
                engine = _shared[key] = self.config.engine()
        return engine


class KVCacheMemoryConfig(BaseModel):
    """MemOS's configuration of a `KVCacheMemory`, with one more field, `instruction`.

    Attributes:
        extractor_llm: the engine.
        memory_filename: the name of the manifest that `dump` writes, without a folder.
        instruction: as for `KVCacheMemory`.
    """

    model_config = ConfigDict(extra="forbid")

    extractor_llm: ExtractorLLM
    memory_filename: str = Field(default="kv_cache_memories.json", pattern=r"^[^/\\]+$")
    instruction: str | None = None


_shared: WeakValueDictionary[str, HFEngine] = WeakValueDictionary()
_shared_lock = threading.Lock()


def parse(config: KVCacheMemoryConfig | dict[str, Any]) -> KVCacheMemoryConfig:
    """Validate a configuration that is a dict; return a `KVCacheMemoryConfig` unchanged."""
    return config if isinstance(config, KVCacheMemoryConfig) else KVCacheMemoryConfig.model_validate(config)
