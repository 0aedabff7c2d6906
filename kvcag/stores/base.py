"""What every place where items live can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import TracebackType

from typing_extensions import Self

from kvcag.core import KVCacheItem
from kvcag.stores.format import Manifest
from kvcag.streams import in_thread

SOURCE_FIELDS = ("source", "source_text", "file_path", "doc_id", "ref_doc_id")
"""Metadata fields that say what an item was made from: ours, LangChain's and LlamaIndex's."""

MADE_OF = "made_of"
"""The metadata field of a context of several documents: their texts, and what names them."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds now, and what was asked of this object since it was made. `max_bytes` None is no limit."""

    items: int
    bytes: int
    max_bytes: int | None = None
    hits: int = 0
    misses: int = 0
    evictions: int = 0


class KVStore(ABC):
    """Items by their id.

    Every method may be called from many threads at once. A reader sees an item whole, or not at all. An item that was
    handed out stays readable, whatever happens to the store meanwhile. It is for reading: copy its tensors before you
    write to them (`kvcag.cache.layers.clone`). An item may leave a store that has a budget or a time to live at any
    time, so a missing item is an answer and not an error.

    All methods raise `StoreUnavailableError` when the place itself fails; nothing that was kept is lost by it.
    """

    @abstractmethod
    def get(self, key: str) -> KVCacheItem | None:
        """The item, or None.

        Raises:
            CorruptItemError: it is there and damaged. `delete` it and encode its text again. Where layers are read
                when they are first looked at, a damaged one raises there.
            FormatError: what is there was not written by kvcag, or by a newer release.
        """

    @abstractmethod
    def put(self, item: KVCacheItem) -> None:
        """Keep an item under its id, in place of what was there. When this returns, it is kept.

        Raises:
            InvalidInputError: its metadata is not JSON, where the store needs it to be.
            StoreFullError: it does not fit into the budget, however much else is evicted.
        """

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Forget items. Missing ones are ignored."""

    @abstractmethod
    def contains(self, key: str) -> bool:
        """Whether `get` would find an item, as cheaply as the place allows; its soundness is not checked."""

    @abstractmethod
    def keys(self) -> Iterator[str]:
        """The ids of all items, in no order, one after another: never all in memory where they are many."""

    @abstractmethod
    def manifest(self, key: str) -> Manifest | None:
        """What is known of an item but its tensors, or None. Raises as `get`."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """What is held, and how often it was found."""

    def place_of(self, key: str) -> str | None:
        """Where an item would be loaded from, by the names that a `Planner` knows; None where it is not kept."""
        return "store" if self.contains(key) else None

    def places(self) -> dict[str, KVStore]:
        """The places of this store, by name."""
        return {"store": self}

    def prefetch(self, keys: Iterable[str]) -> object:
        """Begin to bring items nearer, for a `get` that comes soon, and return at once. Most stores have no nearer."""
        return None

    def purge(self, source: str) -> list[str]:
        """Delete everything that was made from one text, and return the ids.

        `source` is the text itself, or a value of one of the metadata fields `SOURCE_FIELDS`: a path, a URL, a
        document's id.
        """
        manifests = ((key, self.manifest(key)) for key in self.keys())
        made = [key for key, manifest in manifests if manifest is not None and made_from(manifest, source)]
        self.delete(made)
        return made

    def close(self) -> None:  # noqa: B027 - most stores hold nothing that must be given back
        """Give back threads and connections. Using the store afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def aget(self, key: str) -> KVCacheItem | None:
        """`get`, in a thread."""
        return await in_thread(self.get, key)

    async def aput(self, item: KVCacheItem) -> None:
        """`put`, in a thread."""
        await in_thread(self.put, item)

    async def adelete(self, keys: Iterable[str]) -> None:
        """`delete`, in a thread."""
        await in_thread(self.delete, keys)

    async def acontains(self, key: str) -> bool:
        """`contains`, in a thread."""
        return await in_thread(self.contains, key)

    async def akeys(self) -> AsyncIterator[str]:
        """`keys`, some hundred at a time, in a thread."""
        keys = self.keys()
        while some := await in_thread(lambda: list(islice(keys, 256))):
            for key in some:
                yield key

    async def amanifest(self, key: str) -> Manifest | None:
        """`manifest`, in a thread."""
        return await in_thread(self.manifest, key)

    async def astats(self) -> StoreStats:
        """`stats`, in a thread."""
        return await in_thread(self.stats)

    async def apurge(self, source: str) -> list[str]:
        """`purge`, in a thread."""
        return await in_thread(self.purge, source)


def made_from(manifest: Manifest, source: str) -> bool:
    """Whether an item was made from `source`, alone or with other texts."""
    records = manifest.records
    texts = [*records.text_memories, records.composed_text_memory]
    named = [manifest.metadata.get(field) for field in (*SOURCE_FIELDS, MADE_OF)]
    return source in texts or any(source in value if isinstance(value, list) else source == value for value in named)
