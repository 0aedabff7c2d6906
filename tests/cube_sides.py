"""Two texts of a cube, and an embedding for LlamaIndex that needs no network."""

from __future__ import annotations

from llama_index.core.base.embeddings.base import BaseEmbedding

from kvcag.core import TextualMemoryItem
from tests.retrievers import HashedWords

TOWER = TextualMemoryItem(id="tower", memory="The tower is made of iron.")
BRIDGE = TextualMemoryItem(id="bridge", memory="The bridge is made of steel.")


class Embedding(BaseEmbedding):
    """Hashed words."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return HashedWords().embed_query(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)
