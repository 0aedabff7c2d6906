"""LangChain's places for texts as the plaintext side of a `MemoryCube`, and a cube as a retriever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from pydantic import SkipValidation

from kvcag.core import TextualMemoryItem
from kvcag.cube.memory_cube import MemoryCube
from kvcag.cube.retrieved import BuiltTexts, FoundTexts
from kvcag.cube.texts import read
from kvcag.documents import text_and_metadata


class VectorStoreTexts:
    """Texts in a vector store. What is added to the cube is embedded there, what is deleted leaves it.

    ```python
    cube = MemoryCube(engine, VectorStoreTexts(InMemoryVectorStore(embeddings), k=3))
    ```

    Args:
        store: the vector store. What it holds already is found, too.
        **search: further arguments of its `similarity_search`: `k`, `filter`.
    """

    def __init__(self, store: VectorStore, **search: Any) -> None:
        self.store = store
        self._search = search

    def search(self, question: str, k: int | None) -> list[TextualMemoryItem]:
        """The most similar documents, best first."""
        settings = self._search if k is None else {**self._search, "k": k}
        return [read(document) for document in self.store.similarity_search(question, **settings)]

    def add(self, texts: Sequence[TextualMemoryItem]) -> None:
        """Embed and keep texts; those that are there already, word for word, are not embedded again."""
        there = self._there([text.id for text in texts]) or {}
        new = [text for text in texts if there.get(text.id) != text]
        if replaced := [text.id for text in new if text.id in there]:
            self.store.delete(replaced)
        if new:
            self.store.add_documents([document_of(text) for text in new], ids=[text.id for text in new])

    def delete(self, ids: Sequence[str]) -> None:
        """Remove documents."""
        there = self._there(ids)
        if known := list(ids if there is None else there):
            self.store.delete(known)

    def listed(self) -> None:
        """A vector store cannot list what it holds."""

    def _there(self, ids: Sequence[str]) -> dict[str, TextualMemoryItem] | None:
        """Those of these that the store holds; None where it cannot tell, and then `add` replaces by id."""
        try:
            found = [read(document) for document in self.store.get_by_ids(ids)]
        except NotImplementedError:
            return None
        return {text.id: text for text in found}


class RetrieverTexts(FoundTexts):
    """Texts that a retriever finds and others keep; see `kvcag.cube.retrieved.FoundTexts`.

    Args:
        retriever: any retriever.
    """

    def __init__(self, retriever: BaseRetriever) -> None:
        super().__init__(retriever.invoke)


class BuiltRetrieverTexts(BuiltTexts):
    """Texts that the cube keeps, behind a retriever that is built from them: BM25, TF-IDF and others.

    ```python
    cube = MemoryCube(engine, BuiltRetrieverTexts(BM25Retriever.from_documents))
    ```

    Args:
        build: makes a retriever of all documents. Called again, at the next search, when they changed.
    """

    def __init__(self, build: Callable[[list[Document]], BaseRetriever]) -> None:
        super().__init__(lambda texts: build([document_of(text) for text in texts]).invoke)


class CubeRetriever(BaseRetriever):
    """A cube's texts for a chain: `create_retrieval_chain(CubeRetriever(cube=cube), …)`.

    With a `ChatKVCAG(memory=cube)` at the chain's end their caches are the cube's.
    """

    cube: SkipValidation[MemoryCube]
    k: int | None = None
    """The most documents; None is the cube's own setting."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [document_of(text) for text in self.cube.search(query, self.k)]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun
    ) -> list[Document]:
        return [document_of(text) for text in await self.cube.asearch(query, self.k)]


def document_of(text: TextualMemoryItem) -> Document:
    """A cube's text as LangChain's document."""
    _, metadata = text_and_metadata(text)
    return Document(id=text.id, page_content=text.memory, metadata=metadata)
