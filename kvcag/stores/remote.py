"""Stores in a remote: in any file system that fsspec supports, or in a LangChain `ByteStore`."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from kvcag.errors import (
    CorruptItemError,
    FormatError,
    InvalidInputError,
    MissingExtraError,
    StoreError,
    StoreUnavailableError,
)
from kvcag.stores.base import Described, KVStore, Listed, StoreStats, listed
from kvcag.stores.disk import FOLDER_BYTES, DiskStore
from kvcag.stores.files import INSTRUCTION_SUFFIX, SUFFIX, Manifest, Names, Quantize, parse_header, parse_id

if TYPE_CHECKING:
    from kvcag.core import KVCacheItem

_WITH_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "ossfs", "cos", "obs", "tos"}
"""Protocols whose addresses begin with a bucket that must exist. Elsewhere, a put creates missing folders."""
_HEAD = 64 << 10  # bytes of the first request for a head; most heads are smaller
_REQUESTS = 32
"""The maximum number of concurrent requests."""


class FsspecStore(KVStore):
    """Stores items in any file system that fsspec supports, such as `s3://`, `gs://`, `az://` or `memory://`.

    Each item is an object in the file format (docs/file-format.md). If a remote does not replace objects atomically, a
    `get` during a `put` may read parts of both; the checksums detect this, and `get` raises `CorruptItemError`. The
    remote's own policy (a bucket's lifecycle rules) decides how long objects live.

    Args:
        url: the address, such as `s3://bucket/kv`.
        quantize: `"int8"` halves the objects of a bfloat16 model.
        namespace: separates these items from those of other namespaces, as for `DiskStore`.
        salt: a secret of the server, as for `DiskStore`.
        **storage_options: arguments of the file system: credentials, endpoints, timeouts.

    Raises:
        MissingExtraError: fsspec, or the package for this protocol, is not installed.
        InvalidInputError: the url is a local path, for which `DiskStore` is safer, or fsspec does not know the address.
        StoreUnavailableError: at the first use, if the remote fails or the bucket does not exist.
    """

    def __init__(
        self,
        url: str,
        *,
        quantize: Quantize = None,
        namespace: str = "",
        salt: bytes | None = None,
        **storage_options: Any,
    ) -> None:
        fs, root = _open(url, storage_options)
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        if "file" in protocols:
            raise InvalidInputError(f"{url} is a local path. Use DiskStore, whose writes are atomic and durable.")
        self._set(lambda: _open(url, storage_options)[0], root, url, quantize, Names(namespace, salt))
        if protocols & _WITH_BUCKETS:
            self._unseen_bucket = root.strip("/").split("/")[0]

    def _set(self, connect: Callable[[], Any], root: str, url: str, quantize: Quantize, names: Names) -> None:
        self._connect, self._connected = connect, (os.getpid(), connect())
        self.url, self.quantize, self._names = url, quantize, names
        self.directory = f"{root.rstrip('/')}/{names.space}"
        self._hits = self._misses = 0
        self._unseen_bucket = ""

    @property
    def _fs(self) -> Any:
        """The file system. A forked process makes its own: it cannot share its parent's connection and threads."""
        if self._connected[0] != os.getpid():
            self._connected = os.getpid(), self._connect()
        return self._connected[1]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    def get(self, key: str) -> KVCacheItem | None:
        """The item, verified, in newly allocated memory; None if it is not stored."""
        from kvcag.stores.format import item_from_bytes  # not above: listing a store needs no torch

        path = self._path(key)
        data = self._read(path)
        self._hits += data is not None
        self._misses += data is None
        if data is None:
            return None
        item = item_from_bytes(bytearray(data), self._shown(path))
        self._check_id(key, item.id)
        return item

    def put(self, item: KVCacheItem) -> None:
        """Write the item's object."""
        from kvcag.stores.format import item_to_bytes

        data = bytes(item_to_bytes(item, quantize=self.quantize))
        with self._reached():
            self._fs.pipe_file(self._path(item.id), data)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the items' objects."""
        for path in map(self._path, keys):
            self._remove(path)

    def contains(self, key: str) -> bool:
        """Whether the item has an object."""
        with self._reached():
            self._fs.invalidate_cache()
            found = bool(self._fs.exists(self._path(key)))
        if not found:
            self._check_bucket()
        return found

    def containing(self, keys: Iterable[str]) -> set[str]:
        """The ids, among `keys`, of items that have an object. Sends up to 32 requests at once."""
        asked = list(keys)
        with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="kvcag-remote") as threads:
            return {key for key, found in zip(asked, threads.map(self.contains, asked), strict=True) if found}

    def keys(self) -> Iterator[str]:
        """Yield the ids from the heads of the objects: one request each, up to 32 at once. Skips damaged objects."""
        for path, head in self._heads(list(self._objects())):
            with contextlib.suppress(CorruptItemError, FormatError):
                yield parse_id(head, self._shown(path))

    def manifest(self, key: str) -> Manifest | None:
        """The item's manifest, from the head of its object; None if it is not stored. Does not transfer tensors."""
        manifest = self._manifest(self._path(key))
        if manifest is not None:
            self._check_id(key, manifest.id)
        return manifest

    def listing(self) -> Iterator[Listed]:
        """List the objects. A damaged object is named by its path, since its id cannot be read."""
        objects = self._objects()
        for path, head in self._heads(list(objects)):
            name = self._shown(path)
            yield from listed(name, partial(_manifest_in, head, name), partial(self._remove, path), objects[path])

    @property
    def is_exact(self) -> bool:
        """True if the store does not quantise."""
        return self.quantize is None

    @property
    def place(self) -> str:
        """The address."""
        return self.url

    @property
    def places(self) -> frozenset[object]:
        """The address and the namespace's directory."""
        return frozenset({f"{self.url}/{self.directory}"})

    def deletions(self) -> int:
        """A random number in a marker object, which every deletion by any process replaces. Sends one request."""
        with contextlib.suppress(StoreError):
            self._erasures = int.from_bytes((self._read(self._marker) or b"")[8:], "big")
        return self._erasures

    def _announce(self, chosen: Callable[[Described], bool], keys: Iterable[str] | None) -> None:
        with contextlib.suppress(StoreError), self._reached():  # if the remote failed, the deletion itself raises
            self._fs.pipe_file(self._marker, bytes(8) + secrets.token_bytes(8))
        super()._announce(chosen, keys)

    @property
    def _marker(self) -> str:
        return f"{self.directory}/.deletions"

    def file(self, key: str) -> str:
        """The address of an item's object, whether or not it exists."""
        return self._shown(self._path(key))

    def size(self, key: str) -> int:
        """The size of an item's object in bytes."""
        with self._reached():
            return int(self._fs.size(self._path(key)))

    def _manifest(self, path: str) -> Manifest | None:
        head = self._head(path)
        return None if head is None else _manifest_in(head, self._shown(path))

    def _remove(self, path: str) -> None:
        with self._reached(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def stats(self) -> StoreStats:
        """The contents, from a listing of the objects, and counts."""
        objects = self._objects()
        items = sum(not path.endswith(INSTRUCTION_SUFFIX) for path in objects)
        return StoreStats(items, sum(objects.values()), None, self._hits, self._misses)

    def _path(self, key: str) -> str:
        return f"{self.directory}/{self._names.file(key)}"

    def _check_id(self, key: str, found: str) -> None:
        if found != key:
            path = self._shown(self._path(key))
            raise CorruptItemError(path, f"it should contain item {key!r} but contains {found!r}")

    def _check_bucket(self) -> None:
        """At the first missing object, check that the bucket exists: a wrong address must not look like a miss."""
        if not self._unseen_bucket:
            return
        with self._reached():
            exists = bool(self._fs.exists(self._unseen_bucket))
        if not exists:
            raise StoreUnavailableError(
                errno.ENOENT, f"there is no bucket {self._unseen_bucket!r}: check the address", self.url
            )
        self._unseen_bucket = ""

    def _shown(self, path: str) -> str:
        return str(self._fs.unstrip_protocol(path))

    def _read(self, path: str, end: int | None = None) -> bytes | None:
        with self._reached(), contextlib.suppress(FileNotFoundError):
            return bytes(self._fs.cat_file(path, start=None if end is None else 0, end=end))
        self._check_bucket()
        return None

    def _head(self, path: str) -> bytes | None:
        start = self._read(path, _HEAD)
        return None if start is None else self._whole_head(path, start)

    def _whole_head(self, path: str, start: bytes) -> bytes | None:
        """The head of an object whose first `_HEAD` bytes, `start`, were read already."""
        if len(start) < 8:
            return start
        size = 8 + int.from_bytes(start[:8], "little")
        return start[:size] if size <= len(start) or len(start) < _HEAD else self._read(path, size)

    def _heads(self, paths: list[str]) -> Iterator[tuple[str, bytes]]:
        """Yield paths and heads, `_REQUESTS` at a time. Skips objects that are deleted in the meantime."""
        for at in range(0, len(paths), _REQUESTS):
            some = paths[at : at + _REQUESTS]
            with self._reached():
                found = self._fs.cat_ranges(some, [0] * len(some), [_HEAD] * len(some), on_error="return")
                failed = next((one for one in found if isinstance(one, Exception)), None)
                if failed is not None and not isinstance(failed, FileNotFoundError):
                    raise failed
            for path, start in zip(some, found, strict=True):
                head = None if isinstance(start, Exception) else self._whole_head(path, bytes(start))
                if head is not None:
                    yield path, head

    def _objects(self) -> dict[str, int]:
        """The path of each object, and its size in bytes."""
        with self._reached():
            self._fs.invalidate_cache()
            found: dict[str, Any] = {}
            with contextlib.suppress(FileNotFoundError):
                found = self._fs.find(self.directory, detail=True)
        if not found:
            self._check_bucket()
        return {path: int(info["size"] or 0) for path, info in found.items() if path.endswith(SUFFIX)}

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Turn every error of the remote into a `StoreUnavailableError`: each backend has its own exceptions."""
        try:
            yield
        except Exception as error:
            raise StoreUnavailableError(
                getattr(error, "errno", None),
                f"the remote failed ({type(error).__name__}: {error}). Check the network, the credentials and the "
                "address; the stored items are unchanged",
                self.url,
            ) from error


def open_at(
    place: str | os.PathLike[str], namespace: str = "", max_bytes: int | None = FOLDER_BYTES, **options: Any
) -> KVStore:
    """Open the store at an address such as `s3://bucket/kv`, or in a folder.

    Args:
        place: an address with `://`, or the path of a folder.
        namespace: as for `DiskStore`.
        max_bytes: the budget in bytes. Used for a folder only.
        **options: the `storage_options` of `FsspecStore`. Used for an address only.
    """
    address = os.fspath(place)
    if "://" in address:
        return FsspecStore(address, namespace=namespace, **options)
    return DiskStore(address, max_bytes, namespace=namespace)


def _manifest_in(head: bytes, name: str) -> Manifest:
    return parse_header(head, name).manifest


def _open(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        # without fsspec's cache of listings, which would hide objects that another process puts later
        fs, root = url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:  # fsspec's own message names the package of a protocol
        raise MissingExtraError(f"{url} ({error})", "store") from None
    except ValueError as error:
        raise InvalidInputError(f"fsspec does not know the address {url!r}: {error}") from error
    return fs, root


class ByteStore(Protocol):
    """The methods of LangChain's `BaseStore[str, bytes]` that `ByteKVStore` calls."""

    def mget(self, keys: Sequence[str]) -> list[bytes | None]: ...  # noqa: D102
    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None: ...  # noqa: D102
    def mdelete(self, keys: Sequence[str]) -> None: ...  # noqa: D102
    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]: ...  # noqa: D102


class ByteKVStore(FsspecStore):
    """Stores items in a key-value store of bytes, such as a LangChain `ByteStore` on Redis. Each item is two values.

    Args:
        store: the key-value store, or a function that connects to it. A forked process calls the function again to get
            its own connection; if a store is passed, the forked process uses that store object.
        quantize: as for `DiskStore`.
        namespace: as for `DiskStore`.
        salt: as for `DiskStore`.
    """

    def __init__(
        self,
        store: ByteStore | Callable[[], ByteStore],
        *,
        quantize: Quantize = None,
        namespace: str = "",
        salt: bytes | None = None,
    ) -> None:
        connect: Callable[[], Any] = store if callable(store) else lambda: store
        self._set(lambda: _ByteFiles(connect()), "kvcag", "", quantize, Names(namespace, salt))
        self.url = type(self.store).__name__

    @property
    def store(self) -> ByteStore:
        """The key-value store."""
        files: _ByteFiles = self._fs
        return files.store


class _ByteFiles:
    """The methods of an fsspec file system that `FsspecStore` calls, on a `ByteStore`.

    The head of a file is one value and its tensors are another, so that a head can be read alone.
    """

    def __init__(self, store: ByteStore) -> None:
        self.store = store

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """The whole file; with any `end`, its head alone."""
        head, *tensors = self.store.mget([path] if end is not None else [path, _tensors(path)])
        if head is None:
            raise FileNotFoundError(path)
        return b"".join([head, *filter(None, tensors)])

    def pipe_file(self, path: str, data: bytes) -> None:
        size = 8 + int.from_bytes(data[:8], "little")
        self.store.mset([(_tensors(path), data[size:]), (path, data[:size])])

    def rm_file(self, path: str) -> None:
        self.store.mdelete([path, _tensors(path)])

    def cat_ranges(self, paths: list[str], starts: list[int], ends: list[int], on_error: str) -> list[object]:
        """The heads of the files, by one request. `starts` and `ends` are ignored."""
        heads = zip(paths, self.store.mget(paths), strict=True)
        return [FileNotFoundError(path) if head is None else head for path, head in heads]

    def exists(self, path: str) -> bool:
        return self.store.mget([path])[0] is not None

    def find(self, directory: str, *, detail: bool) -> dict[str, dict[str, int]]:
        found = {}
        for path in self.store.yield_keys(prefix=f"{directory}/"):
            if path.endswith(SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    found[path] = {"size": self.size(path)}
        return found

    def size(self, path: str) -> int:
        head = self.cat_file(path, end=0)
        try:
            return parse_header(head, path).size
        except (CorruptItemError, FormatError):
            return len(head)

    def unstrip_protocol(self, path: str) -> str:
        return path

    def invalidate_cache(self) -> None:
        """Does nothing, since nothing is cached."""


def _tensors(path: str) -> str:
    return f"{path}.tensors"
