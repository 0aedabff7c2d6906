"""CAGRetrieverTool: a retriever tool for agents whose documents are encoded once."""

from __future__ import annotations

from typing import Any

from llama_index.core.schema import MetadataMode
from llama_index.core.tools import RetrieverTool, ToolOutput

from kvcag.llama_index.messages import document_blocks


class CAGRetrieverTool(RetrieverTool):
    """A `RetrieverTool` whose result has a block per document, so that a `KVCacheLLM` finds each document's cache.

    ```python
    agent = FunctionAgent(tools=[CAGRetrieverTool.from_defaults(retriever, description="Finds notes.")], llm=llm)
    ```
    """

    def call(self, *args: Any, **kwargs: Any) -> ToolOutput:
        """Retrieve documents, and return a block for each."""
        return _with_documents(super().call(*args, **kwargs))

    async def acall(self, *args: Any, **kwargs: Any) -> ToolOutput:
        """Asynchronous `call`."""
        return _with_documents(await super().acall(*args, **kwargs))


def _with_documents(output: ToolOutput) -> ToolOutput:
    texts = [found.get_content(MetadataMode.LLM) for found in output.raw_output]
    return output.model_copy(update={"blocks": document_blocks(texts)})
