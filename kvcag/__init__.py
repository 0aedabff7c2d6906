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

from kvcag.cache.hf import ContextCache
from kvcag.config import ExtractorLLM, HFLLMConfig, KVCacheMemoryConfig
from kvcag.context import MergedContext, MergeReport
from kvcag.engines.base import Chunk, Usage
from kvcag.engines.hf import HFEngine
from kvcag.engines.sampling import Sampling
from kvcag.errors import KVCAGError
from kvcag.fingerprint import ModelFingerprint
from kvcag.items import ActivationMemoryItem, KVCacheItem, KVCacheRecords, TextualMemoryItem, VLLMKVCacheItem
from kvcag.memory import KVCacheMemory
from kvcag.notices import CacheWarning
from kvcag.prompt import ChatTemplate, Document, Prompt

__version__ = "0.1.0"

__all__ = [
    "ActivationMemoryItem",
    "CacheWarning",
    "ChatTemplate",
    "Chunk",
    "ContextCache",
    "Document",
    "ExtractorLLM",
    "HFEngine",
    "HFLLMConfig",
    "KVCAGError",
    "KVCacheItem",
    "KVCacheMemory",
    "KVCacheMemoryConfig",
    "KVCacheRecords",
    "MergeReport",
    "MergedContext",
    "ModelFingerprint",
    "Prompt",
    "Sampling",
    "TextualMemoryItem",
    "Usage",
    "VLLMKVCacheItem",
]
