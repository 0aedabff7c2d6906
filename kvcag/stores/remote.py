"""Items in a remote: any file system that fsspec supports, or a LangChain `ByteStore`."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from kvcag.core import KVCacheItem
from kvcag.errors import CorruptItemError, FormatError, InvalidInputError, MissingExtraError, StoreUnavailableError
from kvcag.stores.base import KVStore, StoreStats
from kvcag.stores.files import SUFFIX, Names
from kvcag.stores.format import Manifest, Quantize, item_from_bytes, item_to_bytes, parse_header, parse_id

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem  # type: ignore[import-untyped]

_HEAD = 64 << 10  # bytes of the first request for a head; most heads are smaller


class _RemoteStore(KVStore):
    """Items as objects in the format of files (docs/file-format.md). A subclass moves the bytes.

    A `get` that overlaps a `put` of the same item may read a mixture of two objects where the remote does not replace
    an object in one step. The checksums detect that: it raises `CorruptItemError`.

    Attributes:
        place: the remote's name in errors and in the repr.
    """

    def __init__(self, place: str, quantize: Quantize, namespace: str, salt: bytes) -> None:
        self.place, self.quantize = place, quantize
        self._names = Names(namespace, salt)
        self._hits = self._misses = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.place}>"

    def get(self, key: str) -> KVCacheItem | None:
        """The item, verified, in memory of its own."""
        path = self._path(key)
        with self._reached():
            data = self._read(path)
        self._hits += data is not None
        self._misses += data is None
        return None if data is None else item_from_bytes(bytearray(data), self._shown(path))

    def put(self, item: KVCacheItem) -> None:
        """Write the item's object."""
        data = bytes(item_to_bytes(item, quantize=self.quantize))
        with self._reached():
            self._write(self._path(item.id), data)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the items' objects."""
        for path in map(self._path, keys):
            with self._reached():
                self._remove(path)

    def contains(self, key: str) -> bool:
        """Whether the item has an object."""
        with self._reached():
            return self._exists(self._path(key))

    def keys(self) -> Iterator[str]:
        """The ids, from the heads of the objects, one request each. Damaged objects are left out."""
        with self._reached():
            paths = self._list()
        for path in paths:
            with self._reached():
                head = self._head(path)
            if head is not None:
                with contextlib.suppress(CorruptItemError, FormatError):
                    yield parse_id(head, self._shown(path))

    def manifest(self, key: str) -> Manifest | None:
        """From the object's head. The tensors are not transferred."""
        path = self._path(key)
        with self._reached():
            head = self._head(path)
        return None if head is None else parse_header(head, self._shown(path)).manifest

    def stats(self) -> StoreStats:
        """Lists the objects."""
        with self._reached():
            sizes = self._sizes()
        return StoreStats(len(sizes), sum(sizes), None, self._hits, self._misses)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Turn every error of the remote into a `StoreUnavailableError`: each backend has exceptions of its own."""
        try:
            yield
        except Exception as error:
            raise StoreUnavailableError(
                getattr(error, "errno", None),
                f"the remote failed ({type(error).__name__}: {error}). Check the network, the credentials and the "
                "address; the stored items are unchanged",
                self.place,
            ) from error

    @abstractmethod
    def _path(self, key: str) -> str: ...

    def _shown(self, path: str) -> str:
        return path

    @abstractmethod
    def _read(self, path: str) -> bytes | None: ...

    @abstractmethod
    def _head(self, path: str) -> bytes | None: ...

    @abstractmethod
    def _write(self, path: str, data: bytes) -> None: ...

    @abstractmethod
    def _remove(self, path: str) -> None: ...

    @abstractmethod
    def _exists(self, path: str) -> bool: ...

    @abstractmethod
    def _list(self) -> list[str]: ...

    @abstractmethod
    def _sizes(self) -> list[int]: ...


class FsspecStore(_RemoteStore):
    """Items in any file system that fsspec supports: `s3://`, `gs://`, `az://`, `memory://`.

    The remote's own policy decides how long objects live (a bucket's lifecycle rules).

    Args:
        url: where: `s3://bucket/kv`.
        quantize: `"int8"` halves the objects of a bfloat16 model.
        namespace: whose items these are, as for `DiskStore`.
        salt: a secret of the server, as for `DiskStore`.
        storage_options: for the file system: credentials, endpoints, timeouts.

    Raises:
        MissingExtraError: fsspec, or the package of this protocol, is not installed.
        InvalidInputError: the url is a local path, for which `DiskStore` is safer, or fsspec does not know it.
    """

    def __init__(
        self, url: str, *, quantize: Quantize = None, namespace: str = "", salt: bytes = b"", **storage_options: Any
    ) -> None:
        super().__init__(url, quantize, namespace, salt)
        self._fs, root = _open(url, storage_options)
        protocols = [self._fs.protocol] if isinstance(self._fs.protocol, str) else self._fs.protocol
        if "file" in protocols:
            raise InvalidInputError(f"{url} is a local path. Use DiskStore, whose writes are atomic and durable.")
        self.directory = f"{root.rstrip('/')}/{self._names.space}"

    def _path(self, key: str) -> str:
        return f"{self.directory}/{self._names.file(key)}"

    def _shown(self, path: str) -> str:
        return str(self._fs.unstrip_protocol(path))

    def _read(self, path: str, end: int | None = None) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(path, start=None if end is None else 0, end=end))
        except FileNotFoundError:
            return None

    def _head(self, path: str) -> bytes | None:
        start = self._read(path, _HEAD)
        if start is None or len(start) < 8:
            return start
        size = 8 + int.from_bytes(start[:8], "little")
        return start[:size] if size <= len(start) or len(start) < _HEAD else self._read(path, size)

    def _write(self, path: str, data: bytes) -> None:
        self._fs.pipe_file(path, data)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _exists(self, path: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(path))

    def _list(self) -> list[str]:
        return list(self._found())

    def _sizes(self) -> list[int]:
        return [int(info["size"] or 0) for info in self._found().values()]

    def _found(self) -> dict[str, dict[str, Any]]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self.directory, detail=True)
        except FileNotFoundError:
            return {}
        return {path: info for path, info in found.items() if path.endswith(SUFFIX)}


def _open(url: str, options: dict[str, Any]) -> tuple[AbstractFileSystem, str]:
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        fs, root = url_to_fs(url, **options)
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


class ByteKVStore(_RemoteStore):
    """Items in a store of bytes by key, such as a LangChain `ByteStore` over Redis.

    An item is two values: its head, and its tensors.

    Args:
        store: where the bytes go.
        quantize: as for `DiskStore`.
        namespace: as for `DiskStore`.
        salt: as for `DiskStore`.
    """

    def __init__(self, store: ByteStore, *, quantize: Quantize = None, namespace: str = "", salt: bytes = b"") -> None:
        super().__init__(type(store).__name__, quantize, namespace, salt)
        self.store = store
        self._prefix = f"kvcag/{self._names.space}/"

    def _path(self, key: str) -> str:
        return f"{self._prefix}{self._names.file(key)}"

    def _read(self, path: str) -> bytes | None:
        head, tensors = self.store.mget([path, _tensors(path)])
        return None if head is None else head + (tensors or b"")

    def _head(self, path: str) -> bytes | None:
        return self.store.mget([path])[0]

    def _write(self, path: str, data: bytes) -> None:
        size = 8 + int.from_bytes(data[:8], "little")
        self.store.mset([(_tensors(path), data[size:]), (path, data[:size])])

    def _remove(self, path: str) -> None:
        self.store.mdelete([path, _tensors(path)])

    def _exists(self, path: str) -> bool:
        return self._head(path) is not None

    def _list(self) -> list[str]:
        return [path for path in self.store.yield_keys(prefix=self._prefix) if path.endswith(SUFFIX)]

    def _sizes(self) -> list[int]:
        sizes = []
        for path in self._list():
            with contextlib.suppress(CorruptItemError, FormatError):
                sizes.append(parse_header(self._head(path) or b"", path).size)
        return sizes


def _tensors(path: str) -> str:
    return f"{path}.tensors"
