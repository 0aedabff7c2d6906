"""Files that appear whole or not at all, for this user alone, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from kvcag.errors import StoreUnavailableError

try:
    import fcntl
except ImportError:  # Windows: no lock tells a writer that lives from one that died, so its age must
    _HAS_FLOCK = False
else:
    _HAS_FLOCK = True

TEMPORARY = ".tmp"
_STALE_SECONDS = 3600.0

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
    """Turn an `OSError` into a `StoreUnavailableError` that keeps its errno and says what to do."""
    try:
        yield
    except StoreUnavailableError:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        raise StoreUnavailableError(error.errno, advice, os.fspath(path)) from error


@contextlib.contextmanager
def remote_unavailable(name: str) -> Iterator[None]:
    """Turn whatever a remote raises into a `StoreUnavailableError`: every backend has exceptions of its own."""
    try:
        yield
    except Exception as error:
        raise StoreUnavailableError(
            getattr(error, "errno", None),
            f"the remote failed ({type(error).__name__}: {error}). Check the network, the credentials and the address; "
            "what it holds is as it was",
            name,
        ) from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], guard: AbstractContextManager[object] | None = None) -> Iterator[Path]:
    """Give a temporary path; when the block ends well, what was written there becomes `path`.

    `guard` is held while the new file takes the old one's place, and not while it is written. The content is on the
    disk before the name is, and the name before this returns: a reader sees the old file or the new one, whole, also
    after a crash at any point. The file is mode 0600. When the block fails, nothing remains.

    Raises:
        StoreUnavailableError: the disk is full, permission was denied, …
    """
    target = Path(path)
    with unavailable(target):
        temporary, descriptor = _create_beside(target)
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


def _create_beside(target: Path) -> tuple[Path, int]:
    """A new file in the same directory, locked for as long as its descriptor is open."""
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}{TEMPORARY}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if not _HAS_FLOCK:
            return temporary, descriptor
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # cleared away as abandoned, between its creation and the lock


def sync_directory(directory: Path) -> None:
    """Put a directory's entries on the disk: a rename, or a deletion, that was reported survives a power cut."""
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unnoticed(path: str | os.PathLike[str], flags: int) -> int:
    """Open without setting the access time, where the system allows it: to look is not to use. An `opener`."""
    try:
        return os.open(path, flags | getattr(os, "O_NOATIME", 0))
    except PermissionError:  # only a file's owner may ask for it
        return os.open(path, flags)


def make_private(directory: Path) -> None:
    """Create a directory, and what is missing above it, for this user alone."""
    if directory.is_dir():
        return
    make_private(directory.parent)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    sync_directory(directory.parent)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that excludes other threads and other processes. It is released when its holder dies.

    On Windows it excludes nobody.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if _HAS_FLOCK:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_if_abandoned(temporary: Path) -> bool:
    """Delete a temporary file whose writer died. Says whether it was abandoned."""
    return _if_abandoned(temporary, remove=True)


def is_abandoned(temporary: Path) -> bool:
    """Whether the writer of a temporary file died before it was done."""
    return _if_abandoned(temporary, remove=False)


def _if_abandoned(temporary: Path, *, remove: bool) -> bool:
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
