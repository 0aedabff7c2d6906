"""A store in a directory that several processes and threads may share.

There is no index: a file's name is a hash of its item's id, so a look-up is one `open`. A file's access time is the
time of its last use, and its modification time is the time of its `put`. A put is a rename and a delete is an unlink.
Both are atomic, so readers take no lock. The only lock, on a file, prevents an eviction from deleting a file that
another process has just replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kvcag.errors import CorruptItemError, FormatError, StoreError, StoreFullError, StoreUnavailableError
from kvcag.stores.base import Described, KVStore, Listed, StoreStats, listed
from kvcag.stores.files import (
    INSTRUCTION_SUFFIX,
    SUFFIX,
    Manifest,
    Names,
    Quantize,
    locked,
    make_private,
    read_id,
    read_manifest,
    sync_directory,
    unavailable,
    unnoticed,
)
from kvcag.stores.verify import VerifyReport, leftovers, verify

if TYPE_CHECKING:
    from kvcag.core import KVCacheItem

_PIN = ".pin"
FOLDER_BYTES = 64 << 30
"""The budget of a store that is opened with only a path, in bytes of its files."""
_DELETIONS = ".deletions"
"""A file that gets a mark of two bytes for each deletion: bytes of the item's file name, or zeros for a search."""
_announced: Counter[str] = Counter()
"""The number of zero marks that this process wrote for each directory."""
_announcing = threading.Lock()
_ANY = b"\0\0"
_RECOUNT_SECONDS = 5.0
"""The minimum time between two counts of the files. In between, this process does not see what others write."""
_RECOUNT_SHARE = 0.05
"""The maximum share of its time that a process spends on counting: a million files take seconds."""
_CLOCKS_DIFFER_SECONDS = 60
"""The maximum difference between the clocks of machines that share a directory."""


class DiskStore(KVStore):
    """Stores items in a directory.

    Args:
        path: the directory. It is created with mode 0700 if it is missing.
        max_bytes: the budget for the files of this namespace, in bytes; None for no limit. The least recently used
            files are evicted first. A process recounts the files every five seconds, or less often if counting takes
            more than a quarter of a second. What other processes write in between may exceed the budget.
        ttl: seconds after a `put` until the item expires; None for never.
        quantize: `"int8"` halves the files of a bfloat16 model. Items are read in the model's dtype.
        namespace: separates items. Two namespaces share no file, and a look-up in one never finds an item of the other.
        salt: a secret of the server that is part of every file name. To someone without the salt, the names do not
            reveal which texts are stored. Use the same salt to find the items again. None: the environment variable
            `KVCAG_SALT`, which also reaches the stores that adapters, cubes and commands open by a path.

    Attributes:
        evictions: number of items that this object deleted to stay within the budget.

    Raises:
        StoreUnavailableError: the directory cannot be created.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int | None = None,
        *,
        ttl: float | None = None,
        quantize: Quantize = None,
        namespace: str = "",
        salt: bytes | None = None,
    ) -> None:
        self.max_bytes, self.ttl, self.quantize = max_bytes, ttl, quantize
        self.path = Path(path)
        self._names = Names(namespace, salt)
        self.directory = self.path / self._names.space
        self._counters = threading.Lock()
        self._hits = self._misses = self.evictions = 0
        self._counted = 0
        self._recount_at = float("-inf")
        with unavailable(self.path):
            make_private(self.directory)
        for folder in (self.path, self.directory):
            with contextlib.suppress(OSError):  # a read-only folder keeps its leftovers; `verify` lists them
                leftovers(folder, remove=True)

    def __repr__(self) -> str:
        try:
            return f"<DiskStore {self.path} {self.stats()}>"
        except StoreUnavailableError:
            return f"<DiskStore {self.path} unavailable>"

    def get(self, key: str) -> KVCacheItem | None:
        """The item, with tensors memory-mapped from its file; None if it is not stored. Counts as a use."""
        from kvcag.stores.format import item_from_file  # not above: listing a store needs no torch

        path = self.file(key)
        with unavailable(path):
            try:
                with open(path, "rb", opener=unnoticed) as file:
                    item = None if self._expired(file) else item_from_file(file)
                    if item is not None:
                        _use(file)
            except FileNotFoundError:
                item = None
        with self._counters:
            self._hits += item is not None
            self._misses += item is None
        if item is not None and item.id != key:
            raise CorruptItemError(path, f"it should contain item {key!r} but contains {item.id!r}")
        return item

    def put(self, item: KVCacheItem) -> None:
        """Write the item's file, then delete the least recently used files until the rest fits into the budget."""
        from kvcag.cache.layers import layers_of, nbytes
        from kvcag.stores.format import write_item

        size = nbytes(layers_of(item.memory))
        if self.max_bytes is not None and self.quantize is None and size > self.max_bytes:
            raise StoreFullError(item.id, size, self.max_bytes)
        path = self.file(item.id)
        with unavailable(path):
            make_private(path.parent)
        size = write_item(path, item, quantize=self.quantize, guard=self._lock(), beside=self.directory)
        if self.max_bytes is not None:
            with unavailable(self.directory):
                self._keep_budget(item.id, path, size)

    def delete(self, keys: Iterable[str]) -> None:
        """Unlink the items' files and sync their directories, so that the deletion survives a power cut."""
        touched = set()
        with unavailable(self.directory):
            for path in map(self.file, keys):
                for each in (path, path.with_suffix(_PIN)):
                    with contextlib.suppress(FileNotFoundError):
                        each.unlink()
                        touched.add(each.parent)
            for directory in touched:
                sync_directory(directory)

    def contains(self, key: str) -> bool:
        """Whether the item has a file that has not expired. Does not read the content."""
        path = self.file(key)
        with unavailable(path):
            try:
                with open(path, "rb", opener=unnoticed) as file:
                    return not self._expired(file)
            except FileNotFoundError:
                return False

    def keys(self) -> Iterator[str]:
        """Yield the ids from the heads of the files. Skips damaged files; `verify` lists them."""
        for entry in self._entries():
            try:
                yield read_id(entry.path)
            except (CorruptItemError, FormatError):
                continue
            except StoreUnavailableError as error:
                if error.errno != errno.ENOENT:  # deleted in the meantime
                    raise

    def manifest(self, key: str) -> Manifest | None:
        """The item's manifest, from the head of its file; None if it is not stored. Does not count as a use."""
        return self._manifest(self.file(key)) if self.contains(key) else None

    def listing(self) -> Iterator[Listed]:
        """List the files. A damaged file is named by its path, since its id cannot be read."""
        for entry in self._entries():
            try:
                size = entry.stat().st_size
            except FileNotFoundError:  # deleted in the meantime
                continue
            path = entry.path
            yield from listed(path, partial(self._manifest, path), partial(self._remove, path), size)

    @property
    def is_exact(self) -> bool:
        """True if the store does not quantise."""
        return self.quantize is None

    @property
    def place(self) -> str:
        """The directory."""
        return str(self.path)

    @property
    def places(self) -> frozenset[object]:
        """The absolute path of the namespace's directory."""
        return frozenset({str(self.directory.absolute())})

    def deletions(self) -> int:
        """The size, in bytes, of a file that only grows: every process appends a mark for each deletion."""
        with contextlib.suppress(OSError):
            self._erasures = (self.directory / _DELETIONS).stat().st_size
        return self._erasures

    def _announce(self, chosen: Callable[[Described], bool], keys: Iterable[str] | None) -> None:
        marks = _ANY if keys is None else b"".join(map(self._mark, keys))
        with _announcing, contextlib.suppress(OSError):  # if the directory is gone, the deletion itself raises
            descriptor = os.open(self.directory / _DELETIONS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with contextlib.closing(os.fdopen(descriptor, "wb")) as file:
                file.write(marks)
            _announced[str(self.directory.absolute())] += keys is None
        super()._announce(chosen, keys)

    def _mark(self, key: str) -> bytes:
        """The first 16 bits of an item's file name: too few to identify a text, and rarely equal for two items."""
        digest = bytes.fromhex(self.file(key).stem[:4])
        return digest if digest != _ANY else b"\0\1"

    def _moment(self) -> Hashable:
        with _announcing:
            return self.deletions(), _announced[str(self.directory.absolute())]

    def _deleted_since(self, key: str, since: Hashable) -> bool:
        with _announcing:
            own = _announced[str(self.directory.absolute())]
            at, before = since if isinstance(since, tuple) else (since, own)
            try:
                with open(self.directory / _DELETIONS, "rb") as file:
                    file.seek(at)
                    read = file.read()
            except OSError:
                return False
        marks = [read[index : index + 2] for index in range(0, len(read), 2)]
        return self._mark(key) in marks or marks.count(_ANY) > own - before

    def _used(self, key: str) -> None:
        with contextlib.suppress(OSError, StoreError), open(self.file(key), "rb", opener=unnoticed) as file:
            _use(file)

    def _remove(self, path: str) -> None:
        with unavailable(path):
            Path(path).unlink(missing_ok=True)
            Path(path).with_suffix(_PIN).unlink(missing_ok=True)
            sync_directory(Path(path).parent)

    @staticmethod
    def _manifest(path: str | os.PathLike[str]) -> Manifest | None:
        try:
            return read_manifest(path)
        except StoreUnavailableError as error:
            if error.errno == errno.ENOENT:  # deleted in the meantime
                return None
            raise

    def stats(self) -> StoreStats:
        """The contents, from a listing of the files, and counts. Includes expired files that were not deleted yet."""
        files = list(self._files())
        items = sum(not file.path.name.endswith(INSTRUCTION_SUFFIX) for file in files)
        return StoreStats(
            items, sum(file.bytes for file in files), self.max_bytes, self._hits, self._misses, self.evictions
        )

    def file(self, key: str) -> Path:
        """The path of an item's file, whether or not it exists."""
        return self.directory / self._names.file(key)

    def size(self, key: str) -> int:
        """The size of an item's file in bytes."""
        with unavailable(path := self.file(key)):
            return path.stat().st_size

    def pin(self, key: str) -> None:
        """Exempt an item from eviction and expiry by any process, until `unpin` or `delete`."""
        path = self.file(key).with_suffix(_PIN)
        with unavailable(path):
            make_private(path.parent)
            path.touch(mode=0o600)

    def unpin(self, key: str) -> None:
        """Undo `pin`."""
        with unavailable(self.directory):
            self.file(key).with_suffix(_PIN).unlink(missing_ok=True)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """Read and check every file of this namespace (see `kvcag.stores.verify`)."""
        return verify(self.directory, repair=repair, names=[self._names])

    # --- files ----------------------------------------------------------------------------------------------

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.directory / ".lock")

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        """The items' files."""
        with unavailable(self.directory):
            for shard in os.scandir(self.directory):
                if shard.is_dir():
                    yield from (entry for entry in os.scandir(shard) if entry.name.endswith(SUFFIX))

    def _files(self) -> Iterator[_File]:
        """The items' files with their sizes and times. Skips files that are deleted in the meantime."""
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                yield _File.of(entry)

    def _expired(self, file: BinaryIO) -> bool:
        """Whether an open file has expired. If so, delete it, unless it was replaced in the meantime."""
        if self.ttl is None:
            return False
        path, stat = Path(file.name), os.fstat(file.fileno())
        if time.time_ns() - _past(stat.st_mtime_ns) < self.ttl * 1e9 or path.with_suffix(_PIN).exists():
            return False
        with self._lock():
            _unlink(path, stat.st_ino)
        return True

    def _keep_budget(self, item_id: str, path: Path, size: int) -> None:
        """Delete the least recently used files until the rest fits. The new file, `path`, is deleted last."""
        assert self.max_bytes is not None
        with self._counters:
            self._counted += size
            if time.monotonic() < self._recount_at and self._counted <= self.max_bytes:
                return
        began = time.monotonic()
        files = sorted(self._files(), key=lambda file: (file.path == path, file.used))
        total = sum(file.bytes for file in files)
        with self._lock():
            for file in files:
                if total <= self.max_bytes:
                    break
                if not file.path.with_suffix(_PIN).exists():
                    _unlink(file.path, file.inode)
                    total -= file.bytes
                    self.evictions += 1
        with self._counters:
            took = time.monotonic() - began
            self._counted, self._recount_at = total, began + took + max(_RECOUNT_SECONDS, took / _RECOUNT_SHARE)
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
        return cls(Path(entry.path), stat.st_size, stat.st_ino, _past(stat.st_atime_ns) or _past(stat.st_mtime_ns))


def _past(nanoseconds: int) -> int:
    """A time, or 0 if it is in the future: a time in the future would never expire."""
    return nanoseconds if nanoseconds < time.time_ns() + _CLOCKS_DIFFER_SECONDS * 10**9 else 0


def _unlink(path: Path, inode: int) -> None:
    """Delete a file unless it was replaced. The caller holds the lock."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ino == inode:
            path.unlink()


def _use(file: BinaryIO) -> None:
    """Set the access time of a file to now. Does nothing without write permission."""
    try:
        os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
