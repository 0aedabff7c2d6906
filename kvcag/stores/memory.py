"""A store in the memory of the host or of an accelerator."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from kvcag.cache.layers import cache_of, layers_of, mapped, nbytes
from kvcag.core import KVCacheItem
from kvcag.errors import InvalidInputError, StoreFullError
from kvcag.stores.base import KVStore, StoreStats
from kvcag.stores.files import Manifest, is_instruction
from kvcag.stores.format import manifest_of


@dataclass(slots=True)
class _Entry:
    item: KVCacheItem
    bytes: int
    expires: float


class MemoryStore(KVStore):
    """Stores items in memory, and evicts the least recently used item first.

    Args:
        max_bytes: the budget for all keys and values, in bytes; None for no limit.
        ttl: seconds after a `put` until the item expires; None for never.
        device: the device to which `put` copies. None stores each item without copying it.
        pin_memory: copy items to page-locked host memory, which an accelerator reads several times faster.

    Raises:
        InvalidInputError: `pin_memory` without a CUDA device, or with a `device` that is not the CPU.
    """

    def __init__(
        self,
        max_bytes: int | None = None,
        *,
        ttl: float | None = None,
        device: torch.device | str | None = None,
        pin_memory: bool = False,
    ) -> None:
        if pin_memory and (not torch.cuda.is_available() or torch.device(device or "cpu").type != "cpu"):
            raise InvalidInputError('pin_memory needs a CUDA device, and device=None or "cpu". Leave it out.')
        self.max_bytes, self.ttl, self.device, self.pin_memory = max_bytes, ttl, device, pin_memory
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # in order of use, the least recent first
        self._pinned: set[str] = set()
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<MemoryStore {self.stats()}>"

    @property
    def place(self) -> str:
        """The str `"memory"`."""
        return "memory"

    def get(self, key: str) -> KVCacheItem | None:
        """The item that was put, or its copy on `device`; None if it is not stored."""
        with self._lock:
            entry = self._live(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return entry.item

    def put(self, item: KVCacheItem) -> None:
        """Store an item. If it does not fit into the budget, evict others first."""
        size = nbytes(layers_of(item.memory))
        self._check_room(item, size)
        stored = self._copied(item)
        expires = time.monotonic() + self.ttl if self.ttl is not None else float("inf")
        with self._lock:
            self._drop(item.id)
            self._make_room(item, size)
            self._entries[item.id] = _Entry(stored, size, expires)
            self._bytes += size

    def delete(self, keys: Iterable[str]) -> None:
        """Delete items and their pins."""
        with self._lock:
            for key in keys:
                self._drop(key)
                self._pinned.discard(key)

    def contains(self, key: str) -> bool:
        """Whether the item is stored. Does not count as a use."""
        with self._lock:
            return self._live(key) is not None

    def _used(self, key: str) -> None:
        with self._lock:
            if self._live(key) is not None:
                self._entries.move_to_end(key)

    def keys(self) -> Iterator[str]:
        """The ids of the items, the least recently used first."""
        with self._lock:
            return iter([key for key in list(self._entries) if self._live(key)])

    def manifest(self, key: str) -> Manifest | None:
        """The manifest of an item, with empty `checksums`; None if it is not stored."""
        with self._lock:
            entry = self._live(key)
        return None if entry is None else manifest_of(entry.item, for_file=False)

    def stats(self) -> StoreStats:
        """The contents and counts. `bytes` counts keys and values only."""
        with self._lock:
            held = sum(not is_instruction(key) for key in iter(self.keys()))
            return StoreStats(held, self._bytes, self.max_bytes, self._hits, self._misses, self._evictions)

    def pin(self, key: str) -> None:
        """Exempt an item from eviction and expiry until `unpin` or `delete`. The item may be put later."""
        with self._lock:
            self._pinned.add(key)

    def unpin(self, key: str) -> None:
        """Undo `pin`."""
        with self._lock:
            self._pinned.discard(key)

    def _live(self, key: str) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is not None and entry.expires <= time.monotonic() and key not in self._pinned:
            self._drop(key)
            return None
        return entry

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.bytes

    def _check_room(self, item: KVCacheItem, size: int) -> None:
        """Refuse an item that cannot fit, before anything is copied or evicted."""
        if self.max_bytes is None:
            return
        with self._lock:
            fixed = sum(e.bytes for key, e in self._entries.items() if key in self._pinned and key != item.id)
        if size + fixed > self.max_bytes:
            raise StoreFullError(item.id, size, self.max_bytes, fixed)

    def _make_room(self, item: KVCacheItem, size: int) -> None:
        if self.max_bytes is None:
            return
        for key in [k for k in self._entries if k not in self._pinned]:
            if self._bytes + size <= self.max_bytes:
                return
            self._drop(key)
            self._evictions += 1
        if self._bytes + size > self.max_bytes:  # an item was pinned after the check
            raise StoreFullError(item.id, size, self.max_bytes, self._bytes)

    @property
    def copies(self) -> bool:
        """Whether `put` copies tensors. If not, the store holds the tensors that were passed to it."""
        return self.device is not None or self.pin_memory

    def _copied(self, item: KVCacheItem) -> KVCacheItem:
        if not self.copies:
            return item
        return item.model_copy(update={"memory": cache_of(mapped(layers_of(item.memory), self._copy))})

    def _copy(self, states: torch.Tensor) -> torch.Tensor:
        copy = states.to(self.device or "cpu", copy=True, memory_format=torch.contiguous_format)
        return copy.pin_memory() if self.pin_memory else copy
