"""MemOS-shaped configuration: the same names, so that a configuration written for it reads the same here."""

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
    """MemOS writes its own class's name here; it is accepted and not used."""

    @property
    def _defaults(self) -> dict[str, Any]:
        """The settings of every answer."""
        return {
            "temperature": self.temperature,
            "max_new_tokens": self.max_tokens,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "strip_thinking": self.remove_think_prefix,
        }


class HFLLMConfig(_LLMConfig):
    """A Hugging Face model and how it generates. `do_sample=False` is greedy.

    `add_generation_prompt` exists because MemOS's configurations carry it; an answer cannot begin without one.
    """

    do_sample: bool = False
    add_generation_prompt: Literal[True] = True

    def engine(self) -> HFEngine:
        """Load the model, with these settings as the engine's defaults."""
        return HFEngine.from_pretrained(
            self.model_name_or_path, defaults={**self._defaults, "do_sample": self.do_sample}
        )


class VLLMLLMConfig(_LLMConfig):
    """A model on a vLLM server, and how it generates: see `VLLMEngine`. MemOS samples there; 0 is greedy."""

    api_base: str = "http://localhost:8088/v1"
    api_key: str = ""
    temperature: float = Field(default=0.7, ge=0)
    enable_thinking: bool | None = None
    """Passed to the chat template, where it is set."""

    def engine(self) -> VLLMEngine:
        """The server, with these settings as the engine's defaults. It need not run yet."""
        from kvcag.engines.vllm.engine import VLLMEngine  # an extra, needed by those who have a server

        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return VLLMEngine(
            self.api_base,
            self.model_name_or_path,
            api_key=self.api_key or None,
            template_variables=thinking,
            defaults=self._defaults,
        )


class ExtractorLLM(BaseModel):
    """Which engine encodes. `huggingface_singleton` shares one engine among equal configurations."""

    model_config = ConfigDict(extra="forbid")

    backend: Literal["huggingface", "huggingface_singleton", "vllm"]
    config: HFLLMConfig | VLLMLLMConfig

    @field_validator("config", mode="before")
    @classmethod
    def _of_the_backend(cls, value: Any, info: ValidationInfo) -> Any:
        made = VLLMLLMConfig if info.data.get("backend") == "vllm" else HFLLMConfig
        return made.model_validate(value)

    def engine(self) -> HFEngine | VLLMEngine:
        """Load the model, or take the engine that an equal configuration loaded; or the server."""
        if self.backend == "huggingface" or isinstance(self.config, VLLMLLMConfig):
            return self.config.engine()
        key = self.config.model_dump_json()
        with _shared_lock:
            engine = _shared.get(key)
            if engine is None:
                engine = _shared[key] = self.config.engine()
        return engine


class KVCacheMemoryConfig(BaseModel):
    """MemOS's configuration of a `KVCacheMemory`, and what it lacks: `instruction`."""

    model_config = ConfigDict(extra="forbid")

    extractor_llm: ExtractorLLM
    memory_filename: str = Field(default="kv_cache_memories.json", pattern=r"^[^/\\]+$")
    instruction: str | None = None


_shared: WeakValueDictionary[str, HFEngine] = WeakValueDictionary()
_shared_lock = threading.Lock()


def parse(config: KVCacheMemoryConfig | dict[str, Any]) -> KVCacheMemoryConfig:
    """A configuration from a dict, or as it is."""
    return config if isinstance(config, KVCacheMemoryConfig) else KVCacheMemoryConfig.model_validate(config)
