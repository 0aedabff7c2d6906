"""File names, files that are written whole or not at all, locks, and errors of the file system."""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from kvcag.errors import CorruptItemError, StoreUnavailableError

try:
    import fcntl
except ImportError:  # Windows has no flock: the age of a temporary file shows whether its writer died
    _HAS_FLOCK = False
else:
    _HAS_FLOCK = True

SUFFIX = ".safetensors"
TEMPORARY = ".tmp"
_STALE_SECONDS = 3600.0
_SALT = "KVCAG_SALT"

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space, or give the store a smaller max_bytes",
    errno.EDQUOT: "the disk quota is used up: free some space, or give the store a smaller max_bytes",
    errno.EACCES: "permission denied: make it readable and writable for this user, or choose another path",
    errno.EPERM: "permission denied: make it readable and writable for this user, or choose another path",
    errno.EROFS: "the file system is read-only: mount it writable, or choose another path",
    errno.ENOENT: "it does not exist",
}


@contextlib.contextmanager
def unavailable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an `OSError` into a `StoreUnavailableError` with the same errno that says what to do."""
    try:
        yield
    except StoreUnavailableError:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        raise StoreUnavailableError(error.errno, advice, os.fspath(path)) from error


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike[str],
    guard: AbstractContextManager[object] | None = None,
    *,
    beside: Path | None = None,
) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path` when the block succeeds.

    The content is synced before the rename, and the directory after it. A reader sees the old file or the new one,
    whole, also after a crash at any point. The file has mode 0600. When the block fails, the temporary file is deleted.

    Args:
        path: the file to write.
        guard: entered for the rename only, not while the block writes.
        beside: the directory of the temporary file, on the same disk; by default the file's own.

    Raises:
        StoreUnavailableError: the disk is full, permission was denied, …
    """
    target = Path(path)
    with unavailable(target):
        temporary, descriptor = _create(f".{target.name}", beside or target.parent)
        try:
            yield temporary
            os.fsync(descriptor)
            with guard or contextlib.nullcontext():
                os.replace(temporary, target)
            sync_directory(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def _create(name: str, directory: Path) -> tuple[Path, int]:
    """Create a file under a random name, locked while its descriptor is open."""
    while True:
        temporary = directory / f"{name}.{secrets.token_hex(16)}{TEMPORARY}"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if not _HAS_FLOCK:
            return temporary, descriptor
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # a repair deleted it between its creation and the lock


def sync_directory(directory: Path) -> None:
    """Sync a directory's entries, so that a rename or a deletion survives a power cut."""
    if os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unnoticed(path: str | os.PathLike[str], flags: int) -> int:
    """An `opener` that leaves the access time as it is, where the system allows that.

    Raises:
        CorruptItemError: it is not a file. Reading a pipe would wait for its writer.
    """
    flags |= getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NOATIME", 0))
    except PermissionError:  # only the file's owner may use O_NOATIME
        descriptor = os.open(path, flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise CorruptItemError(path, "it is not a file")


def make_private(directory: Path) -> None:
    """Create a directory and its missing parents with mode 0700."""
    if directory.is_dir():
        return
    make_private(directory.parent)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    sync_directory(directory.parent)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock on a file against other threads and processes. It is released when its holder dies.

    On Windows there is no lock.

    Raises:
        BlockingIOError: with `wait=False`, another holds the lock, or there are no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if _HAS_FLOCK:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif not wait:
            raise BlockingIOError
        yield
    finally:
        os.close(descriptor)


def is_abandoned(temporary: Path, *, remove: bool = False) -> bool:
    """Whether the writer of a temporary file died before it finished. With `remove`, such a file is deleted."""
    try:
        with open(temporary, "rb") as file:
            if not _HAS_FLOCK:
                if time.time() - os.fstat(file.fileno()).st_mtime < _STALE_SECONDS:
                    return False
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if remove:
                temporary.unlink(missing_ok=True)
            return True
    except (BlockingIOError, FileNotFoundError):
        return False


class Names:
    """File names of one namespace: HMAC-SHA256 of an item's id under the salt and the namespace.

    An id is often the hash of a text, so an id used as a name would let a reader test whether a text is stored. Without
    the salt, these names reveal nothing. Equal ids of two namespaces have different names.

    Args:
        namespace: whose items these are.
        salt: a secret of the server; None is the environment variable `KVCAG_SALT`, if it is set.

    Attributes:
        space: the name of the namespace, 32 hex digits.
    """

    def __init__(self, namespace: str = "", salt: bytes | None = None) -> None:
        if salt is None:
            salt = os.environ.get(_SALT, "").encode("utf-8", "surrogateescape")
        self._secret = hmac.digest(salt, namespace.encode("utf-8", "surrogatepass"), "sha256")
        self.space = self._digest("namespace")[:32]

    def file(self, key: str) -> str:
        """The path of an item below its namespace: one of 256 directories, and a file in it."""
        name = self._digest(f"item {key}")
        return f"{name[:2]}/{name[2:]}{SUFFIX}"

    def _digest(self, text: str) -> str:
        return hmac.digest(self._secret, text.encode("utf-8", "surrogatepass"), "sha256").hex()
