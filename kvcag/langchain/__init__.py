"""kvcag in LangChain.

```python
from kvcag.langchain import ChatKVCAG, create_cag_documents_chain

llm = ChatKVCAG(model="HuggingFaceTB/SmolLM2-135M-Instruct", store="kv/")
chain = create_retrieval_chain(retriever, create_cag_documents_chain(llm, prompt))
```
"""

from kvcag.errors import MissingExtraError

try:
    import langchain  # noqa: F401 - only to say what is missing
except ModuleNotFoundError:
    raise MissingExtraError("kvcag.langchain", "langchain") from None

from kvcag.langchain.chat_model import ChatKVCAG
from kvcag.langchain.cube import BuiltRetrieverTexts, CubeRetriever, RetrieverTexts, VectorStoreTexts
from kvcag.langchain.documents_chain import create_cag_documents_chain
from kvcag.langchain.middleware import KVCAGMiddleware
from kvcag.langchain.watching import SchedulerCallback

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
