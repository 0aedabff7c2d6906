"""LlamaIndex indices, docstores and retrievers that hold a `MemoryCube`'s texts, and a cube as a LlamaIndex retriever.

The cube takes the text of a node as the LLM reads it, including metadata: a synthesizer later looks up that same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.indices.base import BaseIndex
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.storage.docstore.types import BaseDocumentStore

from kvcag.core import TextualMemoryItem
from kvcag.cube.memory_cube import MemoryCube
from kvcag.cube.texts import BuiltTexts, changed, read
from kvcag.cube.texts import RetrieverTexts as RetrieverTexts
from kvcag.documents import text_and_metadata


class IndexTexts:
    """Texts in an index: added texts are inserted, deleted texts leave it.

    ```python
    cube = MemoryCube(engine, IndexTexts(VectorStoreIndex([], embed_model=embed_model), similarity_top_k=3))
    ```

    Args:
        index: the index. Searches also find the nodes that it held before.
        **retriever: further arguments for its `as_retriever`, such as `similarity_top_k` and `filters`.
    """

    def __init__(self, index: BaseIndex[Any], **retriever: Any) -> None:
        self.index = index
        self._retriever = retriever

    def search(self, question: str, k: int | None) -> list[TextualMemoryItem]:
        """The first `k` nodes that the index's retriever finds, best first."""
        settings = self._retriever if k is None else {**self._retriever, "similarity_top_k": k}
        return [read(found.node) for found in self.index.as_retriever(**settings).retrieve(question)][:k]

    def add(self, texts: Sequence[TextualMemoryItem]) -> None:
        """Insert texts. A text that the docstore holds already and that has not changed is not embedded again."""
        docstore = self.index.docstore
        stored = docstore.get_nodes([text.id for text in texts if docstore.document_exists(text.id)])
        new = changed(texts, stored)
        self.delete([text.id for text in new])
        if new:
            self.index.insert_nodes([node_of(text) for text in new])

    def delete(self, ids: Sequence[str]) -> None:
        """Delete nodes by id. Unknown ids are ignored."""
        vectors = getattr(self.index, "vector_store", None)
        elsewhere = vectors is not None and vectors.stores_text  # the docstore of such an index is empty
        known = [id for id in ids if elsewhere or self.index.docstore.document_exists(id)]
        if known:
            self.index.delete_nodes(known, delete_from_docstore=True)


class DocstoreTexts:
    """Texts in a document store. Every question gets all of them. The cube follows changes made directly in the store.

    Args:
        docstore: the document store.
    """

    def __init__(self, docstore: BaseDocumentStore) -> None:
        self.docstore = docstore

    def add(self, texts: Sequence[TextualMemoryItem]) -> None:
        """Add texts."""
        self.docstore.add_documents([node_of(text) for text in texts])

    def delete(self, ids: Sequence[str]) -> None:
        """Delete texts by id. Unknown ids are ignored."""
        for id in ids:
            self.docstore.delete_document(id, raise_error=False)

    def listed(self) -> list[TextualMemoryItem]:
        """Every document that is not empty."""
        texts = map(read, self.docstore.docs.values())
        return [text for text in texts if text.memory.strip()]


class BuiltRetrieverTexts(BuiltTexts):
    """Holds texts in the cube, and builds a retriever from all of them, such as BM25.

    ```python
    cube = MemoryCube(engine, BuiltRetrieverTexts(lambda nodes: BM25Retriever.from_defaults(nodes=nodes)))
    ```

    Args:
        build: builds a retriever from all nodes. The first search after a change calls it.
    """

    def __init__(self, build: Callable[[list[BaseNode]], BaseRetriever]) -> None:
        super().__init__(lambda texts: build([node_of(text) for text in texts]))


class CubeRetriever(BaseRetriever):
    """A cube as a retriever, for a query engine or a chat engine.

    Args:
        cube: the cube.
        k: the maximum number of nodes to return. None: the cube's own setting.
        callback_manager: receives the events.
    """

    def __init__(self, cube: MemoryCube, k: int | None = None, callback_manager: CallbackManager | None = None) -> None:
        self.cube = cube
        self.k = k
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=node_of(text)) for text in self.cube.search(query_bundle.query_str, self.k)]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = await self.cube.asearch(query_bundle.query_str, self.k)
        return [NodeWithScore(node=node_of(text)) for text in found]


def node_of(text: TextualMemoryItem) -> TextNode:
    """A text of a cube as a node. Its metadata are excluded from what the LLM and the embedding model read."""
    _, metadata = text_and_metadata(text)
    hidden = list(metadata)
    return TextNode(
        id_=text.id,
        text=text.memory,
        metadata=metadata,
        excluded_llm_metadata_keys=hidden,
        excluded_embed_metadata_keys=hidden,
    )
