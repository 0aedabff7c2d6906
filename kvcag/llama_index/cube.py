"""LlamaIndex's places for texts as the plaintext side of a `MemoryCube`, and a cube as a retriever.

A text of the cube is a node as the LLM reads it, its metadata within the text; so what the cube encodes is what a
synthesizer asks for.
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
from kvcag.cube.retrieved import BuiltTexts, FoundTexts
from kvcag.cube.texts import read
from kvcag.documents import text_and_metadata


class IndexTexts:
    """Texts in an index. What is added to the cube is inserted there, what is deleted leaves it.

    ```python
    cube = MemoryCube(engine, IndexTexts(VectorStoreIndex([], embed_model=embed_model), similarity_top_k=3))
    ```

    Args:
        index: the index. What it holds already is found, too.
        **retriever: further arguments of its `as_retriever`: `similarity_top_k`, `filters`.
    """

    def __init__(self, index: BaseIndex[Any], **retriever: Any) -> None:
        self.index = index
        self._retriever = retriever

    def search(self, question: str, k: int | None) -> list[TextualMemoryItem]:
        """The nodes that the index's retriever finds, best first; the first `k` of them."""
        settings = self._retriever if k is None else {**self._retriever, "similarity_top_k": k}
        return [read(found.node) for found in self.index.as_retriever(**settings).retrieve(question)][:k]

    def add(self, texts: Sequence[TextualMemoryItem]) -> None:
        """Insert texts; those that its docstore holds already, word for word, are not embedded again."""
        there = {text.id: text for text in map(read, self.index.docstore.get_nodes(self._listed(texts)))}
        new = [text for text in texts if there.get(text.id) != text]
        self.delete([text.id for text in new])
        if new:
            self.index.insert_nodes([node_of(text) for text in new])

    def delete(self, ids: Sequence[str]) -> None:
        """Remove nodes."""
        vectors = getattr(self.index, "vector_store", None)
        elsewhere = vectors is not None and vectors.stores_text  # such an index has an empty docstore
        known = [id for id in ids if elsewhere or self.index.docstore.document_exists(id)]
        if known:
            self.index.delete_nodes(known, delete_from_docstore=True)

    def listed(self) -> None:
        """The cube learns what an index holds as it is found."""

    def _listed(self, texts: Sequence[TextualMemoryItem]) -> list[str]:
        return [text.id for text in texts if self.index.docstore.document_exists(text.id)]


class DocstoreTexts:
    """Texts in a document store, all of them for every question. What others change there, the cube follows.

    Args:
        docstore: the document store.
    """

    def __init__(self, docstore: BaseDocumentStore) -> None:
        self.docstore = docstore

    def add(self, texts: Sequence[TextualMemoryItem]) -> None:
        """Put texts."""
        self.docstore.add_documents([node_of(text) for text in texts])

    def delete(self, ids: Sequence[str]) -> None:
        """Remove texts."""
        for id in ids:
            self.docstore.delete_document(id, raise_error=False)

    def listed(self) -> list[TextualMemoryItem]:
        """Every document there that says something."""
        texts = map(read, self.docstore.docs.values())
        return [text for text in texts if text.memory.strip()]


class RetrieverTexts(FoundTexts):
    """Texts that a retriever finds and others keep; see `kvcag.cube.retrieved.FoundTexts`.

    Args:
        retriever: any retriever.
    """

    def __init__(self, retriever: BaseRetriever) -> None:
        super().__init__(retriever.retrieve)


class BuiltRetrieverTexts(BuiltTexts):
    """Texts that the cube keeps, behind a retriever that is built from them, such as BM25's.

    ```python
    cube = MemoryCube(engine, BuiltRetrieverTexts(lambda nodes: BM25Retriever.from_defaults(nodes=nodes)))
    ```

    Args:
        build: makes a retriever of all nodes. Called again, at the next search, when they changed.
    """

    def __init__(self, build: Callable[[list[BaseNode]], BaseRetriever]) -> None:
        super().__init__(lambda texts: build([node_of(text) for text in texts]).retrieve)


class CubeRetriever(BaseRetriever):
    """A cube's texts for a query engine or a chat engine.

    Args:
        cube: the cube.
        k: the most nodes; None is the cube's own setting.
        callback_manager: where events go.
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
    """A cube's text as a node that says just this: its metadata are shown neither to the LLM nor to an embedding."""
    _, metadata = text_and_metadata(text)
    hidden = list(metadata)
    return TextNode(
        id_=text.id,
        text=text.memory,
        metadata=metadata,
        excluded_llm_metadata_keys=hidden,
        excluded_embed_metadata_keys=hidden,
    )
