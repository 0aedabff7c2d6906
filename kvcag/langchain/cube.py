"""LangChain vector stores and retrievers that hold a `MemoryCube`'s texts, and a cube as a LangChain retriever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.indexing.base import DeleteResponse, DocumentIndex, UpsertResponse
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from pydantic import SkipValidation

from kvcag.core import TextualMemoryItem
from kvcag.cube.memory_cube import MemoryCube
from kvcag.cube.texts import BuiltTexts, changed, read
from kvcag.cube.texts import RetrieverTexts as RetrieverTexts
from kvcag.documents import text_and_metadata


class VectorStoreTexts:
    """Texts in a vector store: added texts are embedded, deleted texts leave it.

    ```python
    cube = MemoryCube(engine, VectorStoreTexts(InMemoryVectorStore(embeddings), k=3))
    ```

    Args:
        store: the vector store. Searches also find the documents that it held before.
        **search: further arguments for its `similarity_search`, such as `k` and `filter`.
    """

    def __init__(self, store: VectorStore, **search: Any) -> None:
        self.store = store
        self._search = search

    def search(self, question: str, k: int | None) -> list[TextualMemoryItem]:
        """The most similar documents, best first."""
        settings = self._search if k is None else {**self._search, "k": k}
        return [read(document) for document in self.store.similarity_search(question, **settings)]

    def add(self, texts: Sequence[TextualMemoryItem]) -> None:
        """Embed and store texts. A text that is stored already and has not changed is not embedded again."""
        stored = self._stored([text.id for text in texts]) or []
        new, there = changed(texts, stored), {document.id for document in stored}
        if replaced := [text.id for text in new if text.id in there]:
            self.store.delete(replaced)
        if new:
            self.store.add_documents([document_of(text) for text in new], ids=[text.id for text in new])

    def delete(self, ids: Sequence[str]) -> None:
        """Delete documents by id. Unknown ids are ignored, if the vector store can look up ids."""
        stored = self._stored(ids)
        known = list(ids) if stored is None else [str(document.id) for document in stored]
        if known:
            self.store.delete(known)

    def _stored(self, ids: Sequence[str]) -> list[Document] | None:
        """The stored documents of these ids; None if the store cannot look them up."""
        try:
            return self.store.get_by_ids(ids)
        except NotImplementedError:
            return None


class BuiltRetrieverTexts(BuiltTexts):
    """Holds texts in the cube, and builds a retriever from all of them, such as BM25 or TF-IDF.

    ```python
    cube = MemoryCube(engine, BuiltRetrieverTexts(BM25Retriever.from_documents))
    ```

    Args:
        build: builds a retriever from all documents. The first search after a change calls it.
    """

    def __init__(self, build: Callable[[list[Document]], BaseRetriever]) -> None:
        super().__init__(lambda texts: build([document_of(text) for text in texts]))


class CubeRetriever(DocumentIndex):
    """A cube as a retriever: `create_retrieval_chain(CubeRetriever(cube=cube), …)`.

    A `ChatKVCAG(memory=cube)` at the end of the chain uses and fills the cube's caches. LangChain's `index` can write
    to it: `index(documents, record_manager, CubeRetriever(cube=cube), cleanup="full")`.
    """

    cube: SkipValidation[MemoryCube]
    k: int | None = None
    """The maximum number of documents to return. None: the cube's own setting."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [document_of(text) for text in self.cube.search(query, self.k)]

    def upsert(self, items: Sequence[Document], /, **kwargs: Any) -> UpsertResponse:
        """Add documents to the cube, or replace those with the same ids."""
        return UpsertResponse(succeeded=self.cube.add(items), failed=[])

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> DeleteResponse:
        """Delete documents, and every cache made from them. Unknown ids are ignored."""
        there = [id for id in ids or () if self.cube.get(id) is not None]
        self.cube.delete(there)
        return DeleteResponse(succeeded=there, num_deleted=len(there), num_failed=0)

    def get(self, ids: Sequence[str], /, **kwargs: Any) -> list[Document]:
        """The documents with these ids. Unknown ids are skipped."""
        return [document_of(text) for id in ids if (text := self.cube.get(id)) is not None]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun
    ) -> list[Document]:
        return [document_of(text) for text in await self.cube.asearch(query, self.k)]


def document_of(text: TextualMemoryItem) -> Document:
    """A text of a cube as a LangChain document."""
    _, metadata = text_and_metadata(text)
    return Document(id=text.id, page_content=text.memory, metadata=metadata)
