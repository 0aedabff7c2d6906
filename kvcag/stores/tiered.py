"""Several stores as one: the quickest first, the largest last."""

from __future__ import annotations

import operator
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from kvcag.cache.layers import cache_of, contiguous_copy, layers_of
from kvcag.core import KVCacheItem
from kvcag.errors import InvalidInputError, StoreError, StoreFullError
from kvcag.stores.base import KVStore, StoreStats
from kvcag.stores.format import Manifest
from kvcag.stores.memory import MemoryStore


class StoreWarning(UserWarning):
    """A tier failed, and another one stood in. Nothing is lost; it was slower, or one copy fewer is kept."""


class TieredStore(KVStore):
    """Stores in tiers, such as accelerator memory, host memory, disk and a remote.

        TieredStore([
            MemoryStore(4 << 30, device="cuda"),
            MemoryStore(32 << 30, pin_memory=True),
            DiskStore("/var/lib/kv", 500 << 30),
            FsspecStore("s3://bucket/kv"),
        ])

    A put writes to every tier, so that what one evicts is still in the next. An item that is found in a slow tier is
    copied into the quicker ones. Each tier keeps its own budget.

    Args:
        tiers: the quickest first.
        prefetch_threads: how many items are fetched at once by `prefetch`.
    """

    def __init__(self, tiers: Sequence[KVStore], *, prefetch_threads: int = 4) -> None:
        if not tiers:
            raise InvalidInputError("a TieredStore needs at least one tier")
        self.tiers = list(tiers)
        self._pool = ThreadPoolExecutor(prefetch_threads, thread_name_prefix="kvcag-prefetch")
        self._coming: dict[str, Future[KVCacheItem | None]] = {}
        self._lock = threading.Lock()
        self._stripes = [threading.Lock() for _ in range(64)]
        self._hits = self._misses = 0

    def get(self, key: str) -> KVCacheItem | None:
        """The item from the quickest tier that has it, waiting for a prefetch of it that is under way.

        Raises:
            StoreError: no tier has it sound, and at least one failed: the first one's error.
        """
        with self._lock:
            coming = self._coming.get(key)
        item = self._find(key) if coming is None else self._result(coming, key)
        with self._lock:
            self._hits += item is not None
            self._misses += item is None
        return item

    def prefetch(self, keys: Iterable[str]) -> list[Future[KVCacheItem | None]]:
        """Begin to bring items into the quickest tier, in background threads, and return at once.

        For the ids that a retriever has just found, while the prompt is still being built. A `get` of one of them
        waits for it. Nobody need look at the futures: an error is raised again by `get`.
        """
        return [self._fetch(key) for key in dict.fromkeys(keys)]

    def put(self, item: KVCacheItem) -> None:
        """Write to every tier. One that fails or is full is passed over with a warning, as long as another keeps it.

        Raises:
            StoreError: no tier kept it, or a tier that failed still holds an older item under this id.
        """
        failures: list[StoreError] = []
        with self._changing(item.id):
            for tier in self.tiers:
                try:
                    tier.put(item)
                except StoreError as error:
                    tier.delete([item.id])  # what it holds under this id is out of date; if this fails too, so do we
                    failures.append(error)
        if len(failures) == len(self.tiers):
            raise failures[0]
        for failure in failures:
            if not isinstance(failure, StoreFullError):
                self._warn(failure)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete from every tier, also when one fails.

        Raises:
            StoreError: from the first tier that failed: it may still hold them.
        """
        failures: list[StoreError] = []
        for key in keys:
            with self._changing(key):
                failures += self._everywhere(operator.methodcaller("delete", [key]))
        if failures:
            raise failures[0]

    def purge(self, source: str) -> list[str]:
        """Delete from every tier what was made from one text. Raises as `delete`."""
        purged: set[str] = set()
        failures = self._everywhere(lambda tier: purged.update(tier.purge(source)))
        self.delete(purged)  # again: a prefetch may have copied one from a tier that was not purged yet
        if failures:
            raise failures[0]
        return sorted(purged)

    def contains(self, key: str) -> bool:
        """Whether a tier has it."""
        return self.tier_of(key) is not None

    def tier_of(self, key: str) -> int | None:
        """The index of the quickest tier that has an item."""
        return next((index for index, tier in enumerate(self.tiers) if tier.contains(key)), None)

    def place_of(self, key: str) -> str | None:
        """`tier 0` and so on, of the quickest tier that has an item."""
        tier = self.tier_of(key)
        return None if tier is None else f"tier {tier}"

    def places(self) -> dict[str, KVStore]:
        """The tiers, by name."""
        return {f"tier {index}": tier for index, tier in enumerate(self.tiers)}

    def keys(self) -> Iterator[str]:
        """Each id once."""
        for index, tier in enumerate(self.tiers):
            for key in iter(tier.keys()):
                if not any(quicker.contains(key) for quicker in self.tiers[:index]):
                    yield key

    def manifest(self, key: str) -> Manifest | None:
        """From the quickest tier that has it."""
        return next((found for tier in self.tiers if (found := tier.manifest(key)) is not None), None)

    def stats(self) -> StoreStats:
        """Items of the fullest tier, and the bytes of all. `tiers` have their own."""
        all_stats = [tier.stats() for tier in self.tiers]
        items, used = max(s.items for s in all_stats), sum(s.bytes for s in all_stats)
        return StoreStats(items, used, None, self._hits, self._misses, sum(s.evictions for s in all_stats))

    def close(self) -> None:
        """Wait for prefetches under way, and close the tiers."""
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
        except CancelledError:  # by whoever asked for the prefetch, or by `close`
            return self._find(key)

    def _find(self, key: str) -> KVCacheItem | None:
        with self._changing(key):
            return self._search(key)

    def _search(self, key: str) -> KVCacheItem | None:
        failures: list[StoreError] = []
        for index, tier in enumerate(self.tiers):
            try:
                item = tier.get(key)
                if item is None:
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

    def _promote(self, item: KVCacheItem, found: int) -> KVCacheItem:
        """Copy an item into the tiers above the one where it was found, the nearest first, and give the quickest copy.

        So an accelerator reads it from pinned host memory, and a damaged copy in a quicker tier is replaced.
        """
        if found == 0:
            return item
        layers = layers_of(item.memory)  # read now, so that damage shows before it is passed on
        for tier in reversed(self.tiers[:found]):
            kept = item
            if isinstance(tier, MemoryStore) and not tier.copies:  # it would keep a file mapped instead
                kept = item.model_copy(update={"memory": cache_of(contiguous_copy(layers))})
            try:
                tier.put(kept)
                item = tier.get(item.id) or item
            except StoreError as error:
                if not isinstance(error, StoreFullError):
                    self._warn(error)
        return item

    def _changing(self, key: str) -> threading.Lock:
        """Held while an item moves, is put or is deleted, so that a copy under way never brings back a deleted one."""
        return self._stripes[hash(key) % len(self._stripes)]

    def _everywhere(self, act: Callable[[KVStore], object]) -> list[StoreError]:
        """Do something with every tier, also after one failed."""
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
        warnings.warn(f"a tier failed and another one stood in: {error}", StoreWarning, stacklevel=4)
