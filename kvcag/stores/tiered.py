"""A store made of several stores, the fastest first."""

from __future__ import annotations

import json
import operator
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TypeVar

from kvcag.cache.layers import cache_of, contiguous_copy, layers_of
from kvcag.core import KVCacheItem
from kvcag.errors import InvalidInputError, StoreError, StoreFullError
from kvcag.stores.base import DeletionReport, Described, KVStore, Listed, StoreStats, listed
from kvcag.stores.files import Manifest
from kvcag.stores.memory import MemoryStore
from kvcag.stores.remote import open_at

T = TypeVar("T")


class StoreWarning(UserWarning):
    """A tier failed, and another tier was used. No item is lost, but reading was slower or a copy is missing."""


_PREFETCHED_AT_ONCE = 4


class TieredStore(KVStore):
    """Combines stores in tiers, such as accelerator memory, host memory, disk and a remote.

        TieredStore([
            MemoryStore(4 << 30, device="cuda"),
            MemoryStore(32 << 30, pin_memory=True),
            DiskStore("/var/lib/kv", 500 << 30),
            FsspecStore("s3://bucket/kv"),
        ])

    A put writes to every tier, so an item that one tier evicts is still in the next. An item that is found in a slow
    tier is copied into the faster tiers. Each tier has its own budget.

    The last tier decides which items are stored. Several processes may share the last tier, each with its own faster
    tiers. If one process deletes or replaces an item there, the others stop using their copies of the old item. For
    this, each look-up reads the head of the item in the last tier: one request to a remote. If that request fails, the
    faster tiers are used without the check.

    Args:
        tiers: stores, the fastest first. A path makes a `DiskStore` of 64 GiB, an address with `://` an `FsspecStore`.

    Raises:
        InvalidInputError: `tiers` is empty.
    """

    def __init__(self, tiers: Sequence[KVStore | str | os.PathLike[str]]) -> None:
        if not tiers:
            raise InvalidInputError("a TieredStore needs at least one tier")
        self.tiers = [tier if isinstance(tier, KVStore) else open_at(tier) for tier in tiers]
        self._pool = ThreadPoolExecutor(_PREFETCHED_AT_ONCE, thread_name_prefix="kvcag-prefetch")
        self._coming: dict[str, Future[KVCacheItem | None]] = {}
        self._lock = threading.Lock()
        self._stripes = [threading.Lock() for _ in range(64)]
        self._only_here = set[str]()  # the ids of items that the last tier could not store
        self._hits = self._misses = 0

    def __repr__(self) -> str:
        return f"<TieredStore {', '.join(map(repr, self.tiers))}>"

    def get(self, key: str) -> KVCacheItem | None:
        """The item from the fastest tier that has it. Waits for a running prefetch of this item.

        Raises:
            StoreError: no tier returned the item, and at least one tier failed. This is the first tier's error.
        """
        with self._lock:
            coming = self._coming.get(key)
        item = self._find(key) if coming is None else self._result(coming, key)
        with self._lock:
            self._hits += item is not None
            self._misses += item is None
        return item

    def prefetch(self, keys: Iterable[str]) -> list[Future[KVCacheItem | None]]:
        """Begin to copy items into the fastest tier, in background threads, and return at once.

        Call it with the ids that a retriever found, while the prompt is built. A `get` waits for the prefetch of its
        item and raises the error of the prefetch, so the futures may be ignored.
        """
        return [self._fetch(key) for key in dict.fromkeys(keys)]

    def put(self, item: KVCacheItem) -> None:
        """Write to every tier. A tier that fails is skipped with a `StoreWarning`; a full tier is skipped silently.

        Raises:
            StoreError: no tier stored the item, or a tier that failed may still hold an older item with this id.
        """
        failures: list[StoreError] = []
        with self._changing(item.id):
            self._only_here.discard(item.id)
            for tier in reversed(self.tiers):
                try:
                    tier.put(item)
                except StoreError as error:
                    tier.delete([item.id])  # the tier may hold an older item with this id; if this fails too, raise
                    failures.append(error)
                    if tier is self.tiers[-1]:
                        self._only_here.add(item.id)
        if len(failures) == len(self.tiers):
            raise failures[0]
        for failure in failures:
            if not isinstance(failure, StoreFullError):
                self._warn(failure)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete from every tier, and continue if a tier fails.

        Raises:
            StoreError: the error of the first tier that failed. That tier may still hold the items.
        """
        failures: list[StoreError] = []
        for key in keys:
            with self._changing(key):
                failures += self._everywhere(operator.methodcaller("delete", [key]))
        if failures:
            raise failures[0]

    @property
    def is_exact(self) -> bool:
        """Whether the last tier, which has every item, is exact."""
        return self.tiers[-1].is_exact

    @property
    def place(self) -> str:
        """The places of the tiers, separated by commas."""
        return ", ".join(tier.place for tier in self.tiers)

    @property
    def places(self) -> frozenset[object]:
        """The `places` of all tiers."""
        return frozenset().union(*(tier.places for tier in self.tiers))

    def erase(self, keys: Iterable[str]) -> DeletionReport:
        """Delete from every tier, continue if a tier fails, and report on each tier."""
        chosen = list(keys)
        with ExitStack() as changing:
            for stripe in self._stripes:
                changing.enter_context(stripe)
            return sum((tier.erase(chosen) for tier in self.tiers), DeletionReport())

    def erase_where(self, chosen: Callable[[Described], bool], *, unreadable: bool = False) -> DeletionReport:
        """Delete from every tier, continue if a tier fails, and report on each tier."""
        erased = (tier.erase_where(chosen, unreadable=unreadable) for tier in self.tiers)
        report = sum(erased, DeletionReport())
        return report + self.erase(report.ids)  # a prefetch may have copied an item from a tier that was cleared later

    def deletions(self) -> Hashable:
        """The `deletions` of each tier."""
        return tuple(tier.deletions() for tier in self.tiers)

    def _moment(self) -> Hashable:
        return tuple(tier._moment() for tier in self.tiers)

    def _deleted_since(self, key: str, since: Hashable) -> bool:
        assert isinstance(since, tuple)
        return any(tier._deleted_since(key, each) for tier, each in zip(self.tiers, since, strict=True))

    def contains(self, key: str) -> bool:
        """Whether the last tier has the item, or a faster tier if the last one fails or could not store it."""
        return bool(self._from_last(key, lambda tier: tier.contains(key)))

    def containing(self, keys: Iterable[str]) -> set[str]:
        """The ids, among `keys`, of items that the store has, as `contains`."""
        asked = set(keys)
        try:
            found = self.tiers[-1].containing(asked)
        except StoreError as error:
            self._warn(error)
            return set[str]().union(*(tier.containing(asked) for tier in self.tiers[:-1]))
        return found | {key for key in asked & self._only_here if self.contains(key)}

    def keys(self) -> Iterator[str]:
        """Yield the ids of the items in the last tier, and of those that it could not store."""
        yield from self.tiers[-1].keys()
        yield from filter(self.contains, sorted(self._only_here))

    def listing(self) -> Iterator[Listed]:
        """The items that the last tier lists. Deleting a listed item deletes it from every tier."""
        for item in self.tiers[-1].listing():
            name = item.name
            yield item if item.manifest is None else replace(item, delete=partial(self.delete, [name]))
        for key in sorted(self._only_here):
            yield from listed(key, partial(self.manifest, key), partial(self.delete, [key]))

    def manifest(self, key: str) -> Manifest | None:
        """The item's manifest, from the last tier if possible; None if it is not stored."""
        return self._from_last(key, lambda tier: tier.manifest(key))

    def _from_last(self, key: str, ask: Callable[[KVStore], T]) -> T:
        """The answer of the last tier; if that fails or could not store the item, the answer of a faster tier."""
        *faster, last = self.tiers
        if key not in self._only_here:
            try:
                return ask(last)
            except StoreError as error:
                found = next(filter(None, map(ask, faster)), None)
                if found is None:
                    raise
                self._warn(error)
                return found
        return next(filter(None, map(ask, faster)), None) or ask(last)

    def stats(self) -> StoreStats:
        """The items of the tier with the most, bytes and evictions of all tiers, and this store's hits and misses."""
        all_stats = [tier.stats() for tier in self.tiers]
        items, used = max(s.items for s in all_stats), sum(s.bytes for s in all_stats)
        return StoreStats(items, used, None, self._hits, self._misses, sum(s.evictions for s in all_stats))

    def close(self) -> None:
        """Wait for running prefetches, and close the tiers."""
        self._pool.shutdown(cancel_futures=True)
        for tier in self.tiers:
            tier.close()

    def _fetch(self, key: str) -> Future[KVCacheItem | None]:
        with self._lock:
            if key in self._coming:
                return self._coming[key]
            future = self._coming[key] = self._pool.submit(self._find, key)
        future.add_done_callback(lambda _: self._arrived(key))
        return future

    def _result(self, coming: Future[KVCacheItem | None], key: str) -> KVCacheItem | None:
        try:
            return coming.result()
        except CancelledError:  # its caller or `close` cancelled the prefetch
            return self._find(key)

    def _find(self, key: str) -> KVCacheItem | None:
        with self._changing(key):
            return self._search(key)

    def _search(self, key: str) -> KVCacheItem | None:
        failures: list[StoreError] = []
        for index, tier in enumerate(self.tiers):
            try:
                item = tier.get(key)
                if item is None or not self._is_current(item, index):
                    continue
                item = self._promote(item, index)
            except StoreError as error:
                failures.append(error)
                continue
            for failure in failures:
                self._warn(failure)
            return item
        if failures:
            raise failures[0]
        return None

    def _is_current(self, item: KVCacheItem, found: int) -> bool:
        """Whether the last tier has the same version of this item. If it lacks the item, delete it from the others."""
        *faster, last = self.tiers
        if found == len(faster) or item.id in self._only_here:
            return True
        try:
            manifest = last.manifest(item.id)
        except StoreError as error:
            self._warn(error)
            return True
        if manifest is None:
            for tier in faster:
                tier.delete([item.id])
            return False
        last._used(item.id)  # otherwise the last tier would evict items that only the faster tiers were asked for
        return _version(item) == _version(manifest)

    def _promote(self, item: KVCacheItem, found: int) -> KVCacheItem:
        """Copy an item into all tiers faster than the one that had it, and return the copy of the fastest tier.

        Each tier copies from the next slower one, so that an accelerator reads from pinned host memory. A damaged copy
        in a faster tier is replaced.
        """
        if found == 0:
            return item
        for tier in reversed(self.tiers[:found]):
            copy = item
            if isinstance(tier, MemoryStore) and not tier.copies:  # otherwise memory would hold the mapping of a file
                copy = item.model_copy(update={"memory": cache_of(contiguous_copy(layers_of(item.memory)))})
            try:
                tier.put(copy)
                item = tier.get(item.id) or item
            except StoreError as error:
                if not isinstance(error, StoreFullError):
                    self._warn(error)
        return item

    def _changing(self, key: str) -> threading.Lock:
        """The lock for copying, putting and deleting an item, so that a copy does not restore a deleted item."""
        return self._stripes[hash(key) % len(self._stripes)]

    def _everywhere(self, act: Callable[[KVStore], object]) -> list[StoreError]:
        """Call `act` with every tier, continue if it fails, and return the errors."""
        failures: list[StoreError] = []
        for tier in self.tiers:
            try:
                act(tier)
            except StoreError as error:
                failures.append(error)
        return failures

    def _arrived(self, key: str) -> None:
        with self._lock:
            self._coming.pop(key, None)

    @staticmethod
    def _warn(error: StoreError) -> None:
        warnings.warn(f"a tier failed and another tier was used: {error}", StoreWarning, stacklevel=4)


def _version(item: KVCacheItem | Manifest) -> tuple[object, ...]:
    """The parts of an item that can differ between versions. The token ids cannot: the id is made from them."""
    return item.records, item.prefix_digest, json.dumps(item.metadata, default=repr)
