"""The contract of a store."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any

from typing_extensions import Self

from kvcag.concurrency import async_twin, in_thread
from kvcag.core import KVCacheItem
from kvcag.errors import CacheWarning, CorruptItemError, FormatError
from kvcag.stores.format import Manifest

SOURCE_FIELDS = ("source", "source_text", "file_path", "doc_id", "ref_doc_id")
"""Metadata fields that name what an item was made from: ours, LangChain's and LlamaIndex's."""

MADE_OF = "made_of"
"""Metadata field of a context of several documents: a list of their texts and of the names of their sources."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds now, and how often this object was asked for an item.

    Attributes:
        items: number of items.
        bytes: bytes of the items.
        max_bytes: the budget; None for no limit.
        hits: calls of `get` that found an item.
        misses: calls of `get` that found none.
        evictions: items that were deleted to keep the budget.
    """

    items: int
    bytes: int
    max_bytes: int | None = None
    hits: int = 0
    misses: int = 0
    evictions: int = 0

    def __str__(self) -> str:
        size, units = float(self.bytes), iter(("bytes", "kB", "MB", "GB", "TB"))
        unit = next(units)
        while size >= 1000 and unit != "TB":
            size, unit = size / 1000, next(units)
        amount = f"{self.bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        return f"{self.items} {'item' if self.items == 1 else 'items'}, {amount}"


class KVStore(ABC):
    """Items by their id.

    Every method may be called from several threads at once. A reader gets an item whole or not at all. An item stays
    readable after it was deleted or replaced in the store. Do not write to its tensors: copy them first
    (`kvcag.cache.layers.clone`). A store with a budget or a time to live may delete an item at any time, so a missing
    item is not an error.

    All methods raise `StoreUnavailableError` when the disk, the remote or the connection fails. Items that were stored
    before are not lost by that.
    """

    @abstractmethod
    def get(self, key: str) -> KVCacheItem | None:
        """The item, or None. Its tensors are verified.

        Raises:
            CorruptItemError: the item is damaged. `delete` it and encode its text again.
            FormatError: kvcag did not write it, or a newer release did.
        """

    @abstractmethod
    def put(self, item: KVCacheItem) -> None:
        """Store an item under its id, in place of an earlier one. When this returns, the item is stored.

        Raises:
            InvalidInputError: its metadata is not JSON, and the store needs JSON.
            StoreFullError: the item is larger than the budget, or pinned items leave too little room.
        """

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete items. Missing ones are ignored."""

    @abstractmethod
    def contains(self, key: str) -> bool:
        """Whether the item is stored. Its content is not verified."""

    @abstractmethod
    def keys(self) -> Iterator[str]:
        """The ids of all items, in no particular order. They are produced one by one."""

    @abstractmethod
    def manifest(self, key: str) -> Manifest | None:
        """Everything about an item except its tensors, or None. Raises as `get`."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Number and bytes of the items, and counts of hits, misses and evictions."""

    def prefetch(self, keys: Iterable[str]) -> object:
        """Begin to move items to the fastest tier, and return at once. Does nothing where there is one tier."""
        return None

    def forget(self, texts: Iterable[str]) -> None:  # noqa: B027 - most stores have nothing to forget
        """Forget texts whose items were deleted. Does nothing in a store that keeps texts in its items alone."""

    def purge(self, source: str) -> list[str]:
        """Delete every item that was made from one text, and return the ids.

        Args:
            source: the text itself, or a value of one of the metadata fields in `SOURCE_FIELDS`: a path, a URL, a
                document's id.
        """
        made = [key for key, manifest in self.manifests() if made_from(manifest, source)]
        self.delete(made)
        return made

    def manifests(self) -> Iterator[tuple[str, Manifest]]:
        """The id and the manifest of every item.

        A damaged item cannot say what it was made from. It is left out, and named in a `CacheWarning`.
        """
        damaged: list[str] = []
        for key, read in self._manifests():
            try:
                manifest = read()
            except (CorruptItemError, FormatError) as error:
                damaged.append(str(error))
                continue
            if manifest is not None:
                yield key, manifest
        if damaged:
            warnings.warn(
                f"{len(damaged)} items of {self!r} cannot be read, so what they were made from is unknown. "
                f"`kvcag verify --repair` deletes them: {'; '.join(damaged[:5])}",
                CacheWarning,
                stacklevel=2,
            )

    def _manifests(self) -> Iterator[tuple[str, Callable[[], Manifest | None]]]:
        """Each item's id and what reads its manifest. A damaged item may have any name in the place of its id."""
        return ((key, partial(self.manifest, key)) for key in self.keys())

    def close(self) -> None:  # noqa: B027 - most stores have nothing to release
        """Release threads and connections. Do not use the store afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    aget = async_twin(get)
    aput = async_twin(put)
    adelete = async_twin(delete)
    acontains = async_twin(contains)
    amanifest = async_twin(manifest)
    astats = async_twin(stats)
    apurge = async_twin(purge)

    async def akeys(self) -> AsyncIterator[str]:
        """`keys`, in a worker thread, 256 at a time."""
        keys = self.keys()
        while batch := await in_thread(lambda: list(islice(keys, 256))):
            for key in batch:
                yield key


def made_from(manifest: Manifest, source: str) -> bool:
    """Whether an item was made from `source`, alone or together with other texts."""
    records = manifest.records
    names = {*records.text_memories, records.composed_text_memory, *sources_of(manifest.metadata)}
    # A document is kept with the separator that ended it in its prompt.
    return source.rstrip("\n") in {name.rstrip("\n") for name in names}


def sources_of(metadata: Mapping[str, Any]) -> set[str]:
    """What a document's or an item's metadata names as its sources."""
    named = [metadata.get(field) for field in (*SOURCE_FIELDS, MADE_OF)]
    return {str(source) for name in named for source in (name if isinstance(name, list) else [name]) if source}
