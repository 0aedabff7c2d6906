"""Real retrievers that need no network: BM25, and a FAISS index over hashed words."""

from __future__ import annotations

import re
import zlib
from typing import Any

import faiss
import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from pydantic import PrivateAttr
from rank_bm25 import BM25Okapi

WIDTH = 512


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class HashedWords(Embeddings):
    """A text as how often each of its words occurs, hashed into `WIDTH` places, normalised."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(WIDTH, dtype=np.float32)
        for word in words(text):
            vector[zlib.crc32(word.encode()) % WIDTH] += 1
        return list(vector / max(float(np.linalg.norm(vector)), 1e-9))


class BM25(BaseRetriever):
    """The `k` best documents by BM25."""

    documents: list[Document]
    k: int = 3
    _index: BM25Okapi = PrivateAttr()

    def model_post_init(self, _: Any) -> None:
        self._index = BM25Okapi([words(document.page_content) for document in self.documents])

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return self._index.get_top_n(words(query), self.documents, n=self.k)


class Faiss(BaseRetriever):
    """The `k` nearest documents in a FAISS index."""

    documents: list[Document]
    embedding: Embeddings = HashedWords()
    k: int = 3
    _index: faiss.IndexFlatIP = PrivateAttr()

    def model_post_init(self, _: Any) -> None:
        self._index = faiss.IndexFlatIP(WIDTH)
        vectors = self.embedding.embed_documents([document.page_content for document in self.documents])
        self._index.add(np.asarray(vectors, dtype=np.float32))

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        _, found = self._index.search(np.asarray([self.embedding.embed_query(query)], dtype=np.float32), self.k)
        return [self.documents[index] for index in found[0]]
