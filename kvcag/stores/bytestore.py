"""Items in anything that keeps bytes by a key, such as a LangChain `ByteStore` over Redis or a file system."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from kvcag.core import KVCacheItem
from kvcag.errors import CorruptItemError, InvalidInputError
from kvcag.stores.base import KVStore, StoreStats
from kvcag.stores.files import remote_unavailable
from kvcag.stores.format import Manifest, Quantize, item_from_bytes, item_to_bytes, parse_header
from kvcag.stores.names import Names

_ATTEMPTS = 5


class ByteStore(Protocol):
    """What is needed of a store of bytes; LangChain's `BaseStore[str, bytes]` has it."""

    def mget(self, keys: Sequence[str]) -> list[bytes | None]: ...  # noqa: D102
    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None: ...  # noqa: D102
    def mdelete(self, keys: Sequence[str]) -> None: ...  # noqa: D102
    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]: ...  # noqa: D102


class ByteKVStore(KVStore):
    """Items in chunks, in a store of bytes.

    An item's bytes (docs/file-format.md) are cut into chunks under names that are used once. Its entry, which names
    them, is written last: a reader finds the item before or after a put, never a mixture.

    Args:
        store: where the bytes go.
        chunk_bytes: the most that one value holds.
        quantize: as for `DiskStore`.
        namespace: as for `DiskStore`.
        salt: as for `DiskStore`.
    """

    def __init__(
        self,
        store: ByteStore,
        *,
        chunk_bytes: int = 4 << 20,
        quantize: Quantize = None,
        namespace: str = "",
        salt: bytes = b"",
    ) -> None:
        if chunk_bytes < 1:
            raise InvalidInputError(f"chunk_bytes is {chunk_bytes}, and must be at least 1")
        self.store, self.chunk_bytes, self.quantize = _Reached(store), chunk_bytes, quantize
        self._names = Names(namespace, salt)
        self._prefix = f"kvcag/{self._names.space}/"  # some stores take prefixes for folders
        self._hits = self._misses = 0

    def get(self, key: str) -> KVCacheItem | None:
        """The item, verified, in memory of its own."""
        name = self._entry_name(key)
        for _ in range(_ATTEMPTS):  # its chunks go when it is replaced while we read
            entry = self._entry(name)
            if entry is None:
                self._misses += 1
                return None
            chunks = self.store.mget(entry["chunks"])
            if all(chunk is not None for chunk in chunks):
                self._hits += 1
                return item_from_bytes(bytearray().join(chunk for chunk in chunks if chunk is not None), name)
            if self._entry(name) == entry:
                break
        raise CorruptItemError(name, "some of its chunks are missing")

    def put(self, item: KVCacheItem) -> None:
        """Write the chunks, then the entry, then delete the chunks of what was there before."""
        data = memoryview(item_to_bytes(item, quantize=self.quantize))
        name, version = self._entry_name(item.id), secrets.token_hex(8)
        starts = range(0, len(data), self.chunk_bytes)
        chunks = [f"{self._prefix}chunk/{self._names.item(item.id)}-{version}-{n:06}" for n in range(len(starts))]
        for chunk, start in zip(chunks, starts, strict=True):
            self.store.mset([(chunk, bytes(data[start : start + self.chunk_bytes]))])
        old = self._chunks_of([name])
        entry = {"id": item.id, "bytes": len(data), "chunks": chunks}
        self.store.mset([(name, json.dumps(entry).encode())])
        self.store.mdelete(old)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the entries, then their chunks."""
        names = [self._entry_name(key) for key in keys]
        chunks = self._chunks_of(names)
        self.store.mdelete(names)
        self.store.mdelete(chunks)

    def contains(self, key: str) -> bool:
        """Whether there is an entry for it."""
        return self._entry(self._entry_name(key)) is not None

    def keys(self) -> Iterator[str]:
        """The ids, from the entries."""
        return (entry["id"] for entry in self._entries())

    def manifest(self, key: str) -> Manifest | None:
        """From as many chunks as the item's head takes."""
        name = self._entry_name(key)
        entry = self._entry(name)
        if entry is None:
            return None
        head, size = b"", 8
        for chunk in entry["chunks"]:
            head += self.store.mget([chunk])[0] or b""
            size = 8 + int.from_bytes(head[:8], "little")
            if len(head) >= max(size, 8):
                break
        return parse_header(head[:size], name).manifest

    def stats(self) -> StoreStats:
        """Reads every entry."""
        sizes = [int(entry["bytes"]) for entry in self._entries()]
        return StoreStats(len(sizes), sum(sizes), None, self._hits, self._misses)

    def sweep(self) -> int:
        """Delete chunks that no entry names: what a crash within `put` left. Returns how many.

        Only while nobody writes: the chunks of a put that is under way look the same.
        """
        named = {chunk for entry in self._entries() for chunk in entry["chunks"]}
        left = [chunk for chunk in self.store.yield_keys(prefix=f"{self._prefix}chunk/") if chunk not in named]
        self.store.mdelete(left)
        return len(left)

    def _entry_name(self, key: str) -> str:
        return f"{self._prefix}item/{self._names.item(key)}"

    def _entry(self, name: str) -> dict[str, Any] | None:
        return _parse(name, self.store.mget([name])[0])

    def _entries(self) -> Iterator[dict[str, Any]]:
        names = iter(self.store.yield_keys(prefix=f"{self._prefix}item/"))
        while some := list(islice(names, 256)):
            yield from _readable(some, self.store.mget(some))

    def _chunks_of(self, names: Sequence[str]) -> list[str]:
        return [chunk for entry in _readable(names, self.store.mget(names)) for chunk in entry["chunks"]]


class _Reached:
    """A store of bytes whose failures are typed."""

    def __init__(self, store: ByteStore) -> None:
        self.store, self.name = store, type(store).__name__

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        with remote_unavailable(self.name):
            return self.store.mget(keys)

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        with remote_unavailable(self.name):
            self.store.mset(key_value_pairs)

    def mdelete(self, keys: Sequence[str]) -> None:
        with remote_unavailable(self.name):
            self.store.mdelete(keys)

    def yield_keys(self, *, prefix: str) -> list[str]:
        with remote_unavailable(self.name):
            return list(self.store.yield_keys(prefix=prefix))


def _readable(names: Sequence[str], values: Sequence[bytes | None]) -> Iterator[dict[str, Any]]:
    """The entries that are there; one that is damaged is named by `get`, and mended by `put`."""
    for name, value in zip(names, values, strict=True):
        with contextlib.suppress(CorruptItemError):
            entry = _parse(name, value)
            if entry is not None:
                yield entry


def _parse(name: str, value: bytes | None) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        entry: dict[str, Any] = json.loads(value)
        if {"id", "bytes", "chunks"} <= entry.keys():
            return entry
    except (ValueError, AttributeError) as error:
        raise CorruptItemError(name, f"its entry cannot be understood ({error})") from error
    raise CorruptItemError(name, "its entry is incomplete")
