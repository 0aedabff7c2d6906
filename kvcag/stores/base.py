"""The contract of a store."""

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
"""Metadata fields that name what an item was made from: ours, LangChain's and LlamaIndex's."""

MADE_OF = "made_of"
"""Metadata field of a context of several documents: a list of their texts and of the names of their sources."""

ENCODED_BEHIND = "encoded_behind"
"""Metadata field of a document that was encoded behind another one: a list of that one's text and of its sources."""

Described: TypeAlias = "Manifest | EncodedItem"
"""What says what an item was made from: its manifest, or an item whose keys and values are not made yet."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds now, and how often this object was asked for an item.

    Attributes:
        items: number of items, without instructions.
        bytes: bytes of all items.
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


@dataclass(frozen=True, slots=True)
class DeletionReport:
    """What a deletion reached, and what it did not. It is true if anything was deleted, or failed.

    Attributes:
        deleted: the ids of the items that were deleted, by the place where they were: a folder, an address, a dump.
        failed: what could not be read or deleted, and why: it may hold the text.
    """

    deleted: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        """The ids of the items that were deleted, each once."""
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
        said += [f"{what} may hold the text: {why}" for what, why in self.failed.items()]
        return "; ".join(said) or "there was nothing to delete"

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON: its attributes."""
        return asdict(self)


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

    def containing(self, keys: Iterable[str]) -> set[str]:
        """Those of several items that are stored, as `contains` says."""
        return {key for key in keys if self.contains(key)}

    @abstractmethod
    def keys(self) -> Iterator[str]:
        """The ids of all items, in no particular order, one by one, those of instructions too."""

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

    # --- deleting for good ---------------------------------------------------------------------------------------

    @property
    def is_exact(self) -> bool:
        """Whether keys and values are read as they were put; a store that quantises does not keep them so."""
        return True

    @property
    def place(self) -> str:
        """What reports call this store."""
        return type(self).__name__

    @property
    def places(self) -> frozenset[object]:
        """What this store shares with others over the same items: work under way is told of deletions by it."""
        return frozenset({self})

    def erase(self, keys: Iterable[str]) -> DeletionReport:
        """Delete items, go on after a failure, and report. Work under way does not bring them back (`keeping`)."""
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
        """Delete every item that was made from one text, alone or with others, go on after a failure, and report.

        Args:
            source: the text itself, or a value of one of the metadata fields in `SOURCE_FIELDS`: a path, a URL, a
                document's id.
        """
        return self.erase_where(lambda item: made_from(item, source))

    def clear(self) -> DeletionReport:
        """Delete every item, also those that cannot be read, and report."""
        return self.erase_where(lambda item: True, unreadable=True)

    def deletions(self) -> Hashable:
        """Changes with every `erase`, `purge` and `clear`, where possible those of other processes too."""
        return self._erasures

    _erasures = 0

    @contextmanager
    def _announced(self, chosen: Callable[[Described], bool], keys: Iterable[str] | None = None) -> Iterator[None]:
        """Announce a deletion before items are looked for and when they are gone.

        Before: what work under way puts later would not be found. After: others may have read an item in between.
        """
        self._announce(chosen, keys)
        try:
            yield
        finally:
            self._announce(chosen, keys)

    def _announce(self, chosen: Callable[[Described], bool], keys: Iterable[str] | None) -> None:
        """Count a deletion of `keys`, or for None of what is found, and tell work under way of it."""
        self._erasures += 1
        with _working:
            for work in _under_way:
                if not self.places.isdisjoint(work.places) and chosen(work.item):
                    work.is_deleted = True

    def erase_where(self, chosen: Callable[[Described], bool], *, unreadable: bool = False) -> DeletionReport:
        """Delete the items that `chosen` accepts, go on after a failure, and report.

        Args:
            chosen: is given an item's manifest, and each item that is being made, which has no keys and values yet.
            unreadable: delete items that cannot be read, too. By default the report says that they failed.
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
        """Work that encodes and puts an item. If the item is deleted meanwhile, it is deleted again at the end.

        Args:
            item: has at least the item's id, its records and its metadata.
            since: what `deletions` returned before the item was read from this store; None: it comes from elsewhere.
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
            warnings.warn(f"{item.id} was deleted while it was made, and is there: {error}", CacheWarning, 4)

    def _moment(self) -> Hashable:
        """Now, for `_deleted_since`. This process's own deletions from now on do not count: work is told of them."""
        return None

    def _deleted_since(self, key: str, since: Hashable) -> bool:
        """Whether an item was, or may have been, deleted after a `_moment`, or after `deletions` returned `since`."""
        return since is not None and self.deletions() != since

    def _used(self, key: str) -> None:  # noqa: B027 - most stores evict nothing
        """Count a use of an item that was read from a faster tier."""

    # --- looking -------------------------------------------------------------------------------------------------

    def listing(self) -> Iterator[Listed]:
        """Every item, also those that cannot be read."""
        for key in self.keys():
            yield from listed(key, partial(self.manifest, key), partial(self.delete, [key]))

    def manifests(self) -> Iterator[tuple[str, Manifest]]:
        """The id and the manifest of every item.

        A damaged item cannot say what it was made from. It is left out, and named in a `CacheWarning`.
        """
        damaged: list[str] = []
        for item in self.listing():
            if item.manifest is None:
                damaged.append(item.error)
            else:
                yield item.manifest.id, item.manifest
        if damaged:
            warnings.warn(
                f"{len(damaged)} items of {self!r} cannot be read, so what they were made from is unknown. "
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
    """An item as a store lists it.

    Attributes:
        name: its id; the file or object of one that cannot be read.
        manifest: None if it cannot be read.
        error: why it cannot be read; empty if it can.
        delete: deletes it where it stands.
        bytes: the size of its file or object; 0 where there are none.
    """

    name: str
    manifest: Manifest | None
    error: str
    delete: Callable[[], None]
    bytes: int = 0


def listed(
    name: str, read: Callable[[], Manifest | None], delete: Callable[[], None], bytes: int = 0
) -> Iterator[Listed]:
    """An item whose manifest `read` gives; nothing if it was deleted in the meantime."""
    try:
        manifest = read()
    except StoreError as error:
        yield Listed(name, None, str(error), delete, bytes)
    else:
        if manifest is not None:
            yield Listed(manifest.id, manifest, "", delete, bytes)


@dataclass(eq=False)
class _Work:
    """The making of an item that will be put into a store."""

    places: frozenset[object]
    item: Described
    is_deleted: bool = False


_under_way: set[_Work] = set()
_working = threading.Lock()


def made_from(item: Described, source: str) -> bool:
    """Whether an item was made from `source`, alone or together with other texts."""
    known = item.metadata.get(ENCODED_BEHIND, ())  # by its keys and values
    sources = sources_of(item.metadata).union(known)
    texts = (*item.records.text_memories, item.records.composed_text_memory, *sources)
    return source in sources or any(says(text, source) for text in texts)


def stands_behind(manifest: Manifest) -> list[str]:
    """The text that an item was encoded behind, if any."""
    return list(manifest.metadata.get(ENCODED_BEHIND, ()))[:1]


def says(text: str, source: str) -> bool:
    """Whether a text is `source`, or contains it: as lines of its own, or anywhere if it is more than two words.

    A document is kept as it stood in its prompt: with the separator that ended it, within a template, between others.
    """
    wanted = source.strip()
    if not wanted or wanted not in text:
        return False
    return len(wanted.split()) > 2 or re.search(rf"^{re.escape(wanted)}\s*$", text, re.MULTILINE) is not None


def sources_of(metadata: Mapping[str, Any]) -> set[str]:
    """What a document's or an item's metadata names as its sources."""
    named = [metadata.get(field) for field in (*SOURCE_FIELDS, MADE_OF)]
    return {str(source) for name in named for source in (name if isinstance(name, list) else [name]) if source}
