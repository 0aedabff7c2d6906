"""Items anywhere that fsspec reaches: `s3://`, `gs://`, `az://`, `memory://` and the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from kvcag.core import KVCacheItem
from kvcag.errors import CorruptItemError, FormatError, InvalidInputError, MissingExtraError
from kvcag.stores.base import KVStore, StoreStats
from kvcag.stores.files import remote_unavailable
from kvcag.stores.format import Manifest, Quantize, item_from_bytes, item_to_bytes, parse_header, parse_id
from kvcag.stores.names import SUFFIX, Names

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem  # type: ignore[import-untyped]

_HEAD = 64 << 10  # most heads are smaller: one request


class FsspecStore(KVStore):
    """Items as objects of a remote, in the format of files (docs/file-format.md).

    Object stores replace an object in one step; where a remote does not, a reader may meet half an object, and gets a
    `CorruptItemError` for it. How long objects live is the remote's own policy (a bucket's lifecycle rules).

    Args:
        url: where: `s3://bucket/kv`.
        quantize: `"int8"` halves the objects of a bfloat16 model.
        namespace: whose items these are, as for `DiskStore`.
        salt: a secret of the server's, as for `DiskStore`.
        storage_options: for the file system: credentials, endpoints, timeouts.

    Raises:
        MissingExtraError: fsspec, or the package of this protocol, is not installed.
        InvalidInputError: the url is a local path: `DiskStore` is for those, and safer.
    """

    def __init__(
        self, url: str, *, quantize: Quantize = None, namespace: str = "", salt: bytes = b"", **storage_options: Any
    ) -> None:
        self.url, self.quantize = url, quantize
        self._names = Names(namespace, salt)
        self._fs, root = _open(url, storage_options)
        if "file" in _protocols(self._fs):
            raise InvalidInputError(f"{url} is a local path: use DiskStore, whose writes are atomic and durable.")
        self.directory = f"{root.rstrip('/')}/{self._names.space}"
        self._hits = self._misses = 0

    def get(self, key: str) -> KVCacheItem | None:
        """The item, verified, in memory of its own."""
        path = self._path(key)
        data = self._read(path)
        self._hits += data is not None
        self._misses += data is None
        return None if data is None else item_from_bytes(bytearray(data), self._shown(path))

    def put(self, item: KVCacheItem) -> None:
        """Write the item's object in one request."""
        data = bytes(item_to_bytes(item, quantize=self.quantize))
        with remote_unavailable(self.url):
            self._fs.pipe_file(self._path(item.id), data)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the items' objects."""
        for path in map(self._path, keys):
            with remote_unavailable(self.url), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(path)

    def contains(self, key: str) -> bool:
        """Whether there is an object for it."""
        with remote_unavailable(self.url):
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._path(key)))

    def keys(self) -> Iterator[str]:
        """The ids, from the heads of the objects: one request each. Damaged ones are left out."""
        for path in self._objects():
            head = self._head(path)
            if head is not None:
                with contextlib.suppress(CorruptItemError, FormatError):
                    yield parse_id(head, self._shown(path))

    def manifest(self, key: str) -> Manifest | None:
        """From the object's head; the rest is not transferred."""
        path = self._path(key)
        head = self._head(path)
        return None if head is None else parse_header(head, self._shown(path)).manifest

    def stats(self) -> StoreStats:
        """Lists the objects."""
        objects = self._objects()
        return StoreStats(len(objects), sum(objects.values()), None, self._hits, self._misses)

    def _path(self, key: str) -> str:
        return f"{self.directory}/{self._names.file(key)}"

    def _shown(self, path: str) -> str:
        return str(self._fs.unstrip_protocol(path))

    def _read(self, path: str, start: int | None = None, end: int | None = None) -> bytes | None:
        with remote_unavailable(self.url):
            try:
                return bytes(self._fs.cat_file(path, start=start, end=end))
            except FileNotFoundError:
                return None

    def _head(self, path: str) -> bytes | None:
        start = self._read(path, 0, _HEAD)
        if start is None or len(start) < 8:
            return start
        size = 8 + int.from_bytes(start[:8], "little")
        return start[:size] if size <= len(start) or len(start) < _HEAD else self._read(path, 0, size)

    def _objects(self) -> dict[str, int]:
        """Paths and bytes."""
        with remote_unavailable(self.url):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self.directory, detail=True)
            except FileNotFoundError:
                return {}
        return {path: int(info["size"] or 0) for path, info in found.items() if path.endswith(SUFFIX)}


def _open(url: str, options: dict[str, Any]) -> tuple[AbstractFileSystem, str]:
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        fs, root = url_to_fs(url, **options)
    except ImportError as error:  # fsspec's own message names the package of a protocol
        raise MissingExtraError(f"{url} ({error})", "store") from None
    except ValueError as error:
        raise InvalidInputError(f"{url!r} is not an address that fsspec knows: {error}") from error
    return fs, root


def _protocols(fs: AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
