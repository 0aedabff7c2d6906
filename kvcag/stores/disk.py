"""Items in a directory that many processes and threads share.

The files are all there is: no index that could be lost or disagree with them. A file's name is a hash of its item's
id, so a look-up is one `open`; its access time is when it was last used, its modification time when it was put.
A put is a rename and a delete an unlink, both atomic, so readers take no lock. The one lock, on a file, keeps an
eviction from removing what another process has just put in the same place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvcag.cache.layers import layers_of, nbytes
from kvcag.core import KVCacheItem
from kvcag.errors import CorruptItemError, FormatError, StoreFullError, StoreUnavailableError
from kvcag.stores.base import KVStore, StoreStats
from kvcag.stores.files import locked, make_private, sync_directory, unavailable, unnoticed
from kvcag.stores.format import Manifest, Quantize, item_from_file, read_id, read_manifest, write_item
from kvcag.stores.names import SUFFIX, Names
from kvcag.stores.verification import VerifyReport, verify

_PIN = ".pin"
_RECOUNT_SECONDS = 5.0
"""How long this process trusts its own count of the bytes, not knowing what other processes put meanwhile."""


class DiskStore(KVStore):
    """Items in a directory.

    Args:
        path: the directory; made if it is missing, for this user alone.
        max_bytes: the most that the files of this namespace may take; the least recently used leave first. With
            several writers, what the others wrote in the last five seconds may come on top.
        ttl: seconds after which an item is forgotten, from when it was put; None for never.
        quantize: `"int8"` halves the files of a bfloat16 model. Read items are in the model's dtype again.
        namespace: whose items these are. Two namespaces share no file, and neither finds what the other put.
        salt: a secret of the server's, mixed into every file name: without it nobody can tell from the names which
            texts, or whose, are kept. The same salt finds the same items again.
        lazy: verify each layer when it is first looked at (see `read_item`), not all of them in `get`.

    Raises:
        StoreUnavailableError: the directory cannot be made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int | None = None,
        *,
        ttl: float | None = None,
        quantize: Quantize = None,
        namespace: str = "",
        salt: bytes = b"",
        lazy: bool = False,
    ) -> None:
        self.max_bytes, self.ttl, self.quantize, self.lazy = max_bytes, ttl, quantize, lazy
        self.path = Path(path)
        self._names = Names(namespace, salt)
        self.directory = self.path / self._names.space
        self._counters = threading.Lock()
        self._hits = self._misses = self._evictions = 0
        self._counted = 0
        self._counted_at = float("-inf")
        with unavailable(self.path):
            make_private(self.directory)

    def get(self, key: str) -> KVCacheItem | None:
        """The item, its tensors mapped from its file. Being found makes it the most recently used."""
        path = self._path(key)
        with unavailable(path):
            try:
                with open(path, "rb", opener=unnoticed) as file:
                    item = None if self._expired(file) else item_from_file(file, lazy=self.lazy)
                    if item is not None:
                        _use(file)
            except FileNotFoundError:
                item = None
        with self._counters:
            self._hits += item is not None
            self._misses += item is None
        if item is not None and item.id != key:
            raise CorruptItemError(path, f"it is in the place of item {key!r} and holds {item.id!r}")
        return item

    def put(self, item: KVCacheItem) -> None:
        """Write the item's file; then, over the budget, delete the least recently used ones."""
        size = nbytes(layers_of(item.memory))
        if self.max_bytes is not None and self.quantize is None and size > self.max_bytes:
            raise StoreFullError(item.id, size, self.max_bytes)
        path = self._path(item.id)
        with unavailable(path):
            make_private(path.parent)
        size = write_item(path, item, quantize=self.quantize, guard=self._lock())
        if self.max_bytes is not None:
            with unavailable(self.directory):
                self._keep_budget(item.id, path, size)

    def delete(self, keys: Iterable[str]) -> None:
        """Unlink the items' files. When this returns, they stay deleted after a power cut too."""
        touched = set()
        with unavailable(self.directory):
            for path in map(self._path, keys):
                for each in (path, path.with_suffix(_PIN)):
                    with contextlib.suppress(FileNotFoundError):
                        each.unlink()
                        touched.add(each.parent)
            for directory in touched:
                sync_directory(directory)

    def contains(self, key: str) -> bool:
        """Whether there is a file for it. Its content is not looked at."""
        path = self._path(key)
        with unavailable(path):
            try:
                with open(path, "rb", opener=unnoticed) as file:
                    return not self._expired(file)
            except FileNotFoundError:
                return False

    def keys(self) -> Iterator[str]:
        """The ids, from the headers of the files. Damaged files are left out: `verify` names them."""
        for entry in self._entries():
            try:
                yield read_id(entry.path)
            except (CorruptItemError, FormatError):
                continue
            except StoreUnavailableError as error:
                if error.errno != errno.ENOENT:  # deleted meanwhile
                    raise

    def manifest(self, key: str) -> Manifest | None:
        """From the file's header; this is no use of the item."""
        if not self.contains(key):
            return None
        try:
            return read_manifest(self._path(key))
        except StoreUnavailableError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def stats(self) -> StoreStats:
        """Counts the files. Expired ones that nobody asked for are still there, and counted."""
        sizes = [file.bytes for file in self._files()]
        return StoreStats(len(sizes), sum(sizes), self.max_bytes, self._hits, self._misses, self._evictions)

    def file(self, key: str) -> Path:
        """Where an item's file is, or would be."""
        return self._path(key)

    def pin(self, key: str) -> None:
        """Never evict this item, nor let it expire, until `unpin` or `delete`. For all processes."""
        path = self._path(key).with_suffix(_PIN)
        with unavailable(path):
            make_private(path.parent)
            path.touch(mode=0o600)

    def unpin(self, key: str) -> None:
        """Let it be evicted again."""
        with unavailable(self.directory):
            self._path(key).with_suffix(_PIN).unlink(missing_ok=True)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """Read every file of this namespace and check it; see `kvcag.stores.verification`."""
        return verify(self.directory, repair=repair)

    # --- files ----------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return self.directory / self._names.file(key)

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.directory / ".lock")

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        """The items' files, one after another."""
        with unavailable(self.directory):
            for shard in os.scandir(self.directory):
                if shard.is_dir():
                    yield from (entry for entry in os.scandir(shard) if entry.name.endswith(SUFFIX))

    def _files(self) -> Iterator[_File]:
        """The same with their sizes and times. What vanishes meanwhile is left out."""
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                yield _File.of(entry)

    def _expired(self, file: BinaryIO) -> bool:
        """Whether an open file's time is over. If so, it is deleted, unless it was replaced meanwhile."""
        if self.ttl is None:
            return False
        path, stat = Path(file.name), os.fstat(file.fileno())
        if time.time() - stat.st_mtime < self.ttl or path.with_suffix(_PIN).exists():
            return False
        with self._lock():
            _unlink(path, stat.st_ino)
        return True

    def _keep_budget(self, item_id: str, path: Path, size: int) -> None:
        """Delete the least recently used files until the rest fits; the one just put is the last to go."""
        assert self.max_bytes is not None
        with self._counters:
            self._counted += size
            fresh = time.monotonic() - self._counted_at < _RECOUNT_SECONDS
            if fresh and self._counted <= self.max_bytes:
                return
        files = sorted(self._files(), key=lambda file: (file.path == path, file.used))
        total = sum(file.bytes for file in files)
        with self._lock():
            for file in files:
                if total <= self.max_bytes:
                    break
                if not file.path.with_suffix(_PIN).exists():
                    _unlink(file.path, file.inode)
                    total -= file.bytes
                    self._evictions += 1
        with self._counters:
            self._counted, self._counted_at = total, time.monotonic()
        if not path.exists() and total + size > self.max_bytes:
            raise StoreFullError(item_id, size, self.max_bytes, total)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    bytes: int
    inode: int
    used: int  # nanoseconds

    @classmethod
    def of(cls, entry: os.DirEntry[str]) -> _File:
        stat = entry.stat()
        return cls(Path(entry.path), stat.st_size, stat.st_ino, stat.st_atime_ns)


def _unlink(path: Path, inode: int) -> None:
    """Delete a file unless another one has taken its place. The caller holds the lock."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ino == inode:
            path.unlink()


def _use(file: BinaryIO) -> None:
    """Set the access time. Where this user may only read, the order of eviction is left to those who may write."""
    try:
        os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
