"""The interface of every store, and the deletion of everything that was made from a text."""

from __future__ import annotations

import re
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from typing_extensions import Self

from kvcag.errors import CacheWarning, StoreError
from kvcag.stores.files import Manifest

if TYPE_CHECKING:
    from kvcag.core import EncodedItem, KVCacheItem

SOURCE_FIELDS = ("source", "source_text", "file_path", "doc_id", "ref_doc_id")
"""Metadata fields that name the source of an item's text: those of kvcag, LangChain and LlamaIndex."""

MADE_OF = "made_of"
"""Metadata field of a context of several documents: a list of their texts and of the names of their sources."""

ENCODED_BEHIND = "encoded_behind"
"""Metadata field of a document that was encoded after another document: a list of that text and of its sources."""

Described: TypeAlias = "Manifest | EncodedItem"
"""An object that has an item's records and metadata: its manifest, or the item before its keys and values are made."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """The contents of a store now, and counts of this object's calls.

    Attributes:
        items: number of items. Instructions are not counted.
        bytes: bytes of all items, including instructions.
        max_bytes: the budget in bytes; None for no limit.
        hits: calls of `get` that found an item.
        misses: calls of `get` that found no item.
        evictions: items that were deleted to stay within the budget.
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


@dataclass(frozen=True, slots=True)
class DeletionReport:
    """The result of a deletion. It is true if anything was deleted, or could not be deleted.

    Attributes:
        deleted: the ids of the deleted items, by place: a folder, an address or a dump.
        failed: for each item or place that could not be read or deleted, the reason. It may still contain the text.
    """

    deleted: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        """The ids of the deleted items, without duplicates."""
        return list(dict.fromkeys(chain.from_iterable(self.deleted.values())))

    def __bool__(self) -> bool:
        return bool(self.ids or self.failed)

    def __add__(self, other: DeletionReport) -> DeletionReport:
        places = {**self.deleted, **other.deleted}
        deleted = {
            place: list(dict.fromkeys([*self.deleted.get(place, ()), *other.deleted.get(place, ())]))
            for place in places
        }
        return DeletionReport(deleted, {**self.failed, **other.failed})

    def __str__(self) -> str:
        counts = {place: len(ids) for place, ids in self.deleted.items() if ids}
        said = [f"{count} {'item' if count == 1 else 'items'} deleted from {place}" for place, count in counts.items()]
        said += [f"{what} may still hold the text: {why}" for what, why in self.failed.items()]
        return "; ".join(said) or "there was nothing to delete"

    def as_dict(self) -> dict[str, Any]:
        """The attributes as a dict for JSON."""
        return asdict(self)


class KVStore(ABC):
    """Stores items by their ids.

    Every method may be called from several threads at once. A reader gets a complete item or none. An item stays
    readable after it is deleted or replaced in the store. Do not write to an item's tensors: copy them first
    (`kvcag.cache.layers.clone`). A store with a budget or a time to live may delete an item at any time, so a missing
    item is not an error.

    All methods raise `StoreUnavailableError` if the disk, the remote or the connection fails. Stored items are not lost
    by such a failure.
    """

    @abstractmethod
    def get(self, key: str) -> KVCacheItem | None:
        """The item with this id, or None. Its tensors are verified.

        Raises:
            CorruptItemError: the item is damaged. `delete` it and encode its text again.
            FormatError: another program wrote the item, or a newer release of kvcag.
        """

    @abstractmethod
    def put(self, item: KVCacheItem) -> None:
        """Store an item under its id, and replace an earlier item with this id. The item is stored on return.

        Raises:
            InvalidInputError: the item's metadata is not JSON, and the store needs JSON.
            StoreFullError: the item is larger than the budget, or pinned items leave too little room.
        """

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete items by id. Unknown ids are ignored."""

    @abstractmethod
    def contains(self, key: str) -> bool:
        """Whether the item is stored. Its content is not verified."""

    def containing(self, keys: Iterable[str]) -> set[str]:
        """The ids, among `keys`, of items that `contains`."""
        return {key for key in keys if self.contains(key)}

    @abstractmethod
    def keys(self) -> Iterator[str]:
        """Yield the ids of all items, including instructions, in no particular order."""

    @abstractmethod
    def manifest(self, key: str) -> Manifest | None:
        """Everything about an item except its tensors; None if it is not stored. Raises the errors of `get`."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Number and bytes of the items, and counts of hits, misses and evictions."""

    def prefetch(self, keys: Iterable[str]) -> object:
        """Begin to copy items to the fastest tier, and return at once. Does nothing if the store has no tiers."""
        return None

    def forget(self, texts: Iterable[str]) -> None:  # noqa: B027 - most stores have nothing to forget
        """Forget texts whose items were deleted. Does nothing in a store that has texts only in its items."""

    # --- deleting for good ---------------------------------------------------------------------------------------

    @property
    def is_exact(self) -> bool:
        """Whether `get` returns keys and values bit for bit as they were put. False in a store that quantises."""
        return True

    @property
    def place(self) -> str:
        """The name of this store in reports."""
        return type(self).__name__

    @property
    def places(self) -> frozenset[object]:
        """Identifies the stored items: equal for two store objects over the same items.

        A deletion through one object reaches work that puts items through the other (`keeping`).
        """
        return frozenset({self})

    def erase(self, keys: Iterable[str]) -> DeletionReport:
        """Delete items, continue after a failure, and report. Running work does not put them back (`keeping`)."""
        chosen = dict.fromkeys(keys)
        report = DeletionReport({self.place: []})
        with self._announced(lambda item: item.id in chosen, chosen):
            for key in chosen:
                try:
                    if self.contains(key):
                        self.delete([key])
                        report.deleted[self.place].append(key)
                except StoreError as error:
                    report.failed[key] = str(error)
        return report

    def purge(self, source: str) -> DeletionReport:
        """Delete every item made from one text, alone or with other texts; continue after a failure, and report.

        Args:
            source: the text itself, or a value of one of the metadata fields in `SOURCE_FIELDS`: a path, a URL, a
                document's id.
        """
        return self.erase_where(lambda item: made_from(item, source))

    def clear(self) -> DeletionReport:
        """Delete every item, including those that cannot be read, and report."""
        return self.erase_where(lambda item: True, unreadable=True)

    def deletions(self) -> Hashable:
        """A value that changes with every `erase`, `purge` and `clear`; if possible, with those of other processes."""
        return self._erasures

    _erasures = 0

    @contextmanager
    def _announced(self, chosen: Callable[[Described], bool], keys: Iterable[str] | None = None) -> Iterator[None]:
        """Announce a deletion twice: before the items are searched, and after they are deleted.

        Before, because the search does not find what running work puts later. After, because other work may have read
        an item in the meantime.
        """
        self._announce(chosen, keys)
        try:
            yield
        finally:
            self._announce(chosen, keys)

    def _announce(self, chosen: Callable[[Described], bool], keys: Iterable[str] | None) -> None:
        """Count a deletion, and mark running work on a `chosen` item as deleted. `keys` is None for a search."""
        self._erasures += 1
        with _working:
            for work in _under_way:
                if not self.places.isdisjoint(work.places) and chosen(work.item):
                    work.is_deleted = True

    def erase_where(self, chosen: Callable[[Described], bool], *, unreadable: bool = False) -> DeletionReport:
        """Delete the items that `chosen` accepts, continue after a failure, and report.

        Args:
            chosen: called with the manifest of each stored item, and with each item that is being made, which has no
                keys and values yet.
            unreadable: also delete items that cannot be read. By default, the report lists them as failed.
        """
        report = DeletionReport({self.place: []})
        with self._announced(chosen):
            try:
                for item in list(self.listing()):
                    if item.manifest is None and not unreadable:
                        report.failed[item.name] = item.error
                    elif item.manifest is None or chosen(item.manifest):
                        try:
                            item.delete()
                            report.deleted[self.place].append(item.name)
                        except StoreError as error:
                            report.failed[item.name] = str(error)
            except StoreError as error:
                report.failed[self.place] = str(error)
        return report

    @contextmanager
    def keeping(self, item: Described, since: Hashable = None) -> Iterator[None]:
        """Wrap work that encodes and puts an item. If the item is deleted meanwhile, delete it again at the end.

        Args:
            item: the item's id, records and metadata.
            since: the value of `deletions` from before the item was read from this store; None if it was not read here.
        """
        work, since = _Work(self.places, item), self._moment() if since is None else since
        with _working:
            _under_way.add(work)
        try:
            yield
        finally:
            with _working:
                _under_way.discard(work)
            if work.is_deleted or self._deleted_since(item.id, since):
                self._delete_again(item)

    def _delete_again(self, item: Described) -> None:
        try:
            self.delete([item.id])
            self.forget([*item.records.text_memories, item.records.composed_text_memory])
        except StoreError as error:
            warnings.warn(
                f"item {item.id} was deleted while it was made, but it may be stored again ({error}). Delete it again.",
                CacheWarning,
                4,
            )

    def _moment(self) -> Hashable:
        """The present, for `_deleted_since`, which then ignores this process's deletions: `_announce` handles those."""
        return None

    def _deleted_since(self, key: str, since: Hashable) -> bool:
        """Whether an item was deleted, or may have been, after `_moment` or `deletions` returned `since`."""
        return since is not None and self.deletions() != since

    def _used(self, key: str) -> None:  # noqa: B027 - most stores evict nothing
        """Count a use of an item that was read from a faster tier, so that eviction sees the use."""

    # --- looking -------------------------------------------------------------------------------------------------

    def listing(self) -> Iterator[Listed]:
        """Every item, including those that cannot be read."""
        for key in self.keys():
            yield from listed(key, partial(self.manifest, key), partial(self.delete, [key]))

    def manifests(self) -> Iterator[tuple[str, Manifest]]:
        """The id and the manifest of every item.

        Items that cannot be read are left out, and named in a `CacheWarning`.
        """
        damaged: list[str] = []
        for item in self.listing():
            if item.manifest is None:
                damaged.append(item.error)
            else:
                yield item.manifest.id, item.manifest
        if damaged:
            warnings.warn(
                f"{len(damaged)} items of {self!r} cannot be read, so their texts are unknown. "
                f"`kvcag verify --repair` deletes them: {'; '.join(damaged[:5])}",
                CacheWarning,
                stacklevel=2,
            )

    def close(self) -> None:  # noqa: B027 - most stores have nothing to release
        """Release threads and connections. Do not use the store afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Listed:
    """An item in a store's listing.

    Attributes:
        name: the item's id; if it cannot be read, the path of its file or object.
        manifest: the item's manifest; None if it cannot be read.
        error: why the item cannot be read; empty if it can.
        delete: deletes the item's file, object or entry.
        bytes: the size of the item's file or object in bytes; 0 if it has none.
    """

    name: str
    manifest: Manifest | None
    error: str
    delete: Callable[[], None]
    bytes: int = 0


def listed(
    name: str, read: Callable[[], Manifest | None], delete: Callable[[], None], bytes: int = 0
) -> Iterator[Listed]:
    """Yield the item whose manifest `read` returns. Yields nothing if the item was deleted in the meantime."""
    try:
        manifest = read()
    except StoreError as error:
        yield Listed(name, None, str(error), delete, bytes)
    else:
        if manifest is not None:
            yield Listed(manifest.id, manifest, "", delete, bytes)


@dataclass(eq=False)
class _Work:
    """Running work that makes an item and will put it into a store."""

    places: frozenset[object]
    item: Described
    is_deleted: bool = False


_under_way: set[_Work] = set()
_working = threading.Lock()


def made_from(item: Described, source: str) -> bool:
    """Whether an item was made from `source`, alone or together with other texts."""
    known = item.metadata.get(ENCODED_BEHIND, ())  # the keys and values of the item depend on these texts
    sources = sources_of(item.metadata).union(known)
    texts = (*item.records.text_memories, item.records.composed_text_memory, *sources)
    return source in sources or any(says(text, source) for text in texts)


def stands_behind(manifest: Manifest) -> list[str]:
    """The text that an item was encoded after, as a list of one; empty if the item was encoded without such a text."""
    return list(manifest.metadata.get(ENCODED_BEHIND, ()))[:1]


def says(text: str, source: str) -> bool:
    """Whether a text contains `source`: anywhere if it has more than two words, or else as a whole line.

    An item's text is a document as it stood in its prompt: with its separator, within a template or between others.
    """
    wanted = source.strip()
    if not wanted or wanted not in text:
        return False
    return len(wanted.split()) > 2 or re.search(rf"^{re.escape(wanted)}\s*$", text, re.MULTILINE) is not None


def sources_of(metadata: Mapping[str, Any]) -> set[str]:
    """The sources that the metadata of a document or an item name."""
    named = [metadata.get(field) for field in (*SOURCE_FIELDS, MADE_OF)]
    return {str(source) for name in named for source in (name if isinstance(name, list) else [name]) if source}
