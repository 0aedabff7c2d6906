"""kvcag in LlamaIndex: an LLM, a synthesizer, engines, memory and ingestion over documents that are encoded once."""

from kvcag.errors import MissingExtraError

try:
    import llama_index.core  # noqa: F401
except ImportError:
    raise MissingExtraError("kvcag.llama_index", "llama-index") from None

from kvcag.llama_index.chat_engine import CAGCondensePlusContextChatEngine, CAGContextChatEngine
from kvcag.llama_index.cube import BuiltRetrieverTexts, CubeRetriever, DocstoreTexts, IndexTexts, RetrieverTexts
from kvcag.llama_index.ingestion import KVCacheTransform
from kvcag.llama_index.llm import KVCacheLLM
from kvcag.llama_index.memory_block import CAGMemoryBlock
from kvcag.llama_index.messages import DOCUMENT_END, document_blocks
from kvcag.llama_index.query_engine import CAGQueryEngine
from kvcag.llama_index.retriever_tool import CAGRetrieverTool
from kvcag.llama_index.synthesizer import CAGSynthesizer, RoundsWarning
from kvcag.llama_index.watching import SchedulerEventHandler

__all__ = [
    "DOCUMENT_END",
    "BuiltRetrieverTexts",
    "CAGCondensePlusContextChatEngine",
    "CAGContextChatEngine",
    "CAGMemoryBlock",
    "CAGQueryEngine",
    "CAGRetrieverTool",
    "CAGSynthesizer",
    "CubeRetriever",
    "DocstoreTexts",
    "IndexTexts",
    "KVCacheLLM",
    "KVCacheTransform",
    "RetrieverTexts",
    "RoundsWarning",
    "SchedulerEventHandler",
    "document_blocks",
]
