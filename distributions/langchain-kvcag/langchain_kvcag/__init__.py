"""kvcag in LangChain: see `kvcag.langchain`."""

from typing import Any

from kvcag import langchain as _home
from kvcag.langchain import (
    BuiltRetrieverTexts,
    ChatKVCAG,
    CubeRetriever,
    RetrieverTexts,
    SchedulerCallback,
    VectorStoreTexts,
    create_cag_documents_chain,
)

__all__ = [
    "BuiltRetrieverTexts",
    "ChatKVCAG",
    "CubeRetriever",
    "KVCAGMiddleware",
    "RetrieverTexts",
    "SchedulerCallback",
    "VectorStoreTexts",
    "create_cag_documents_chain",
]


def __getattr__(name: str) -> Any:
    return getattr(_home, name)
