"""kvcag: documents encoded once into KV caches, merged per question, answered from in LangChain and LlamaIndex.

```python
import kvcag

memory = kvcag.KVCacheMemory("HuggingFaceTB/SmolLM2-135M-Instruct", store="kv/")
memory.add(["The Eiffel tower was completed in 1889.", "It stands in Paris."])
print(memory.ask("When was the tower completed?"))
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcag.cache.layers import ContextCache as ContextCache
    from kvcag.calibration import Calibration as Calibration
    from kvcag.calibration import calibrate as calibrate
    from kvcag.chat_template import ChatTemplate as ChatTemplate
    from kvcag.chat_template import Document as Document
    from kvcag.chat_template import Prompt as Prompt
    from kvcag.config import ExtractorLLM as ExtractorLLM
    from kvcag.config import HFLLMConfig as HFLLMConfig
    from kvcag.config import KVCacheMemoryConfig as KVCacheMemoryConfig
    from kvcag.core import ActivationMemoryItem as ActivationMemoryItem
    from kvcag.core import Answer as Answer
    from kvcag.core import Chunk as Chunk
    from kvcag.core import ContextPrompt as ContextPrompt
    from kvcag.core import KVCacheItem as KVCacheItem
    from kvcag.core import MergedContext as MergedContext
    from kvcag.core import MergeReport as MergeReport
    from kvcag.core import ServedContext as ServedContext
    from kvcag.core import TextualMemoryItem as TextualMemoryItem
    from kvcag.core import Usage as Usage
    from kvcag.core import VLLMKVCacheItem as VLLMKVCacheItem
    from kvcag.cube.memory_cube import MemoryCube as MemoryCube
    from kvcag.engines.base import Engine as Engine
    from kvcag.engines.base import Sampling as Sampling
    from kvcag.engines.constrain import Choices as Choices
    from kvcag.engines.constrain import Grammar as Grammar
    from kvcag.engines.constrain import JsonSchema as JsonSchema
    from kvcag.engines.constrain import Regex as Regex
    from kvcag.engines.hf import HFEngine as HFEngine
    from kvcag.engines.vllm.engine import VLLMEngine as VLLMEngine
    from kvcag.errors import CacheWarning as CacheWarning
    from kvcag.errors import KVCAGError as KVCAGError
    from kvcag.errors import ServerWarning as ServerWarning
    from kvcag.fingerprint import KVCacheRecords as KVCacheRecords
    from kvcag.fingerprint import ModelFingerprint as ModelFingerprint
    from kvcag.memory import KVCacheMemory as KVCacheMemory
    from kvcag.scheduler.scheduler import CacheScheduler as CacheScheduler
    from kvcag.stores.base import DeletionReport as DeletionReport
    from kvcag.tools import tool_spec as tool_spec

__version__ = "0.1.0"

_HOMES = {
    "ActivationMemoryItem": "kvcag.core",
    "Answer": "kvcag.core",
    "CacheScheduler": "kvcag.scheduler.scheduler",
    "CacheWarning": "kvcag.errors",
    "Calibration": "kvcag.calibration",
    "ChatTemplate": "kvcag.chat_template",
    "Choices": "kvcag.engines.constrain",
    "Chunk": "kvcag.core",
    "ContextCache": "kvcag.cache.layers",
    "ContextPrompt": "kvcag.core",
    "Document": "kvcag.chat_template",
    "Engine": "kvcag.engines.base",
    "ExtractorLLM": "kvcag.config",
    "Grammar": "kvcag.engines.constrain",
    "HFEngine": "kvcag.engines.hf",
    "HFLLMConfig": "kvcag.config",
    "JsonSchema": "kvcag.engines.constrain",
    "KVCAGError": "kvcag.errors",
    "KVCacheItem": "kvcag.core",
    "KVCacheMemory": "kvcag.memory",
    "KVCacheMemoryConfig": "kvcag.config",
    "KVCacheRecords": "kvcag.fingerprint",
    "MemoryCube": "kvcag.cube.memory_cube",
    "DeletionReport": "kvcag.stores.base",
    "MergeReport": "kvcag.core",
    "MergedContext": "kvcag.core",
    "ModelFingerprint": "kvcag.fingerprint",
    "Prompt": "kvcag.chat_template",
    "Regex": "kvcag.engines.constrain",
    "Sampling": "kvcag.engines.base",
    "ServedContext": "kvcag.core",
    "ServerWarning": "kvcag.errors",
    "TextualMemoryItem": "kvcag.core",
    "Usage": "kvcag.core",
    "VLLMEngine": "kvcag.engines.vllm.engine",
    "VLLMKVCacheItem": "kvcag.core",
    "calibrate": "kvcag.calibration",
    "tool_spec": "kvcag.tools",
}
"""Where each public name lives. They are imported when they are first used, since torch and transformers take seconds,
and `kvcag --version` needs neither."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvcag' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
