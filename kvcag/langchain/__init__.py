"""kvcag in LangChain.

```python
from kvcag.langchain import ChatKVCAG, create_cag_documents_chain

llm = ChatKVCAG(model="HuggingFaceTB/SmolLM2-135M-Instruct", store="kv/")
chain = create_retrieval_chain(retriever, create_cag_documents_chain(llm, prompt))
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvcag.errors import MissingExtraError

try:
    import langchain_core  # noqa: F401 - imported only to name the missing extra
except ModuleNotFoundError:
    raise MissingExtraError("kvcag.langchain", "langchain") from None

from kvcag.langchain.chat_model import ChatKVCAG
from kvcag.langchain.cube import BuiltRetrieverTexts, CubeRetriever, RetrieverTexts, VectorStoreTexts
from kvcag.langchain.documents_chain import create_cag_documents_chain
from kvcag.langchain.watching import SchedulerCallback

if TYPE_CHECKING:
    from kvcag.langchain.middleware import KVCAGMiddleware

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
    if name != "KVCAGMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module("kvcag.langchain.middleware").KVCAGMiddleware
    except ModuleNotFoundError as missing:
        if (missing.name or "").split(".")[0] not in ("langchain", "langgraph"):
            raise
        raise MissingExtraError("KVCAGMiddleware", "agents") from None
