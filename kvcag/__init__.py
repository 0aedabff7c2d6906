"""kvcag: documents encoded once into KV caches, merged per question, answered from in LangChain and LlamaIndex.

```python
from kvcag import HFEngine, KVCacheMemory

engine = HFEngine.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
memory = KVCacheMemory(engine, head="Answer from the documents.")
item = memory.extract("The Eiffel tower was completed in 1889.")
memory.add(item)
print(engine.generate(past_key_values=memory.merge([item.id], "When was the tower completed?")))
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcag.cache.hf import ContextCache as ContextCache
    from kvcag.config import ExtractorLLM as ExtractorLLM
    from kvcag.config import HFLLMConfig as HFLLMConfig
    from kvcag.config import KVCacheMemoryConfig as KVCacheMemoryConfig
    from kvcag.context import ContextPrompt as ContextPrompt
    from kvcag.context import MergedContext as MergedContext
    from kvcag.context import MergeReport as MergeReport
    from kvcag.context import ServedContext as ServedContext
    from kvcag.cube.memory_cube import MemoryCube as MemoryCube
    from kvcag.engines.base import Chunk as Chunk
    from kvcag.engines.base import Usage as Usage
    from kvcag.engines.calibrate import Calibration as Calibration
    from kvcag.engines.constrain import Choices as Choices
    from kvcag.engines.constrain import Grammar as Grammar
    from kvcag.engines.constrain import JsonSchema as JsonSchema
    from kvcag.engines.constrain import Regex as Regex
    from kvcag.engines.hf import HFEngine as HFEngine
    from kvcag.engines.sampling import Sampling as Sampling
    from kvcag.engines.session import Session as Session
    from kvcag.engines.vllm import VLLMEngine as VLLMEngine
    from kvcag.errors import KVCAGError as KVCAGError
    from kvcag.fingerprint import ModelFingerprint as ModelFingerprint
    from kvcag.items import ActivationMemoryItem as ActivationMemoryItem
    from kvcag.items import KVCacheItem as KVCacheItem
    from kvcag.items import KVCacheRecords as KVCacheRecords
    from kvcag.items import TextualMemoryItem as TextualMemoryItem
    from kvcag.items import VLLMKVCacheItem as VLLMKVCacheItem
    from kvcag.memory import KVCacheMemory as KVCacheMemory
    from kvcag.notices import CacheWarning as CacheWarning
    from kvcag.notices import ServerWarning as ServerWarning
    from kvcag.prompt import ChatTemplate as ChatTemplate
    from kvcag.prompt import Document as Document
    from kvcag.prompt import Prompt as Prompt
    from kvcag.scheduler.scheduler import CacheScheduler as CacheScheduler
    from kvcag.tools import plan_tools as plan_tools

__version__ = "0.1.0"

_HOMES = {
    "ActivationMemoryItem": "kvcag.items",
    "CacheScheduler": "kvcag.scheduler.scheduler",
    "CacheWarning": "kvcag.notices",
    "Calibration": "kvcag.engines.calibrate",
    "ChatTemplate": "kvcag.prompt",
    "Choices": "kvcag.engines.constrain",
    "Chunk": "kvcag.engines.base",
    "ContextCache": "kvcag.cache.hf",
    "ContextPrompt": "kvcag.context",
    "Document": "kvcag.prompt",
    "ExtractorLLM": "kvcag.config",
    "Grammar": "kvcag.engines.constrain",
    "HFEngine": "kvcag.engines.hf",
    "HFLLMConfig": "kvcag.config",
    "JsonSchema": "kvcag.engines.constrain",
    "KVCAGError": "kvcag.errors",
    "KVCacheItem": "kvcag.items",
    "KVCacheMemory": "kvcag.memory",
    "KVCacheMemoryConfig": "kvcag.config",
    "KVCacheRecords": "kvcag.items",
    "MemoryCube": "kvcag.cube.memory_cube",
    "MergeReport": "kvcag.context",
    "MergedContext": "kvcag.context",
    "ModelFingerprint": "kvcag.fingerprint",
    "Prompt": "kvcag.prompt",
    "Regex": "kvcag.engines.constrain",
    "Sampling": "kvcag.engines.sampling",
    "ServedContext": "kvcag.context",
    "ServerWarning": "kvcag.notices",
    "Session": "kvcag.engines.session",
    "TextualMemoryItem": "kvcag.items",
    "Usage": "kvcag.engines.base",
    "VLLMEngine": "kvcag.engines.vllm",
    "VLLMKVCacheItem": "kvcag.items",
    "plan_tools": "kvcag.tools",
}
"""Where each public name lives. They are imported when they are first used, since torch and transformers take seconds,
and `kvcag --version` needs neither."""

__all__ = [
    "ActivationMemoryItem",
    "CacheScheduler",
    "CacheWarning",
    "Calibration",
    "ChatTemplate",
    "Choices",
    "Chunk",
    "ContextCache",
    "ContextPrompt",
    "Document",
    "ExtractorLLM",
    "Grammar",
    "HFEngine",
    "HFLLMConfig",
    "JsonSchema",
    "KVCAGError",
    "KVCacheItem",
    "KVCacheMemory",
    "KVCacheMemoryConfig",
    "KVCacheRecords",
    "MemoryCube",
    "MergeReport",
    "MergedContext",
    "ModelFingerprint",
    "Prompt",
    "Regex",
    "Sampling",
    "ServedContext",
    "ServerWarning",
    "Session",
    "TextualMemoryItem",
    "Usage",
    "VLLMEngine",
    "VLLMKVCacheItem",
    "plan_tools",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvcag' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
