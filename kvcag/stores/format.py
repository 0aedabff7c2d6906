"""One item, one file: safetensors, with a manifest in its metadata and a checksum over everything.

Any safetensors reader opens these files; docs/file-format.md describes them byte by byte. Nothing is unpickled. The
checksums find damage; they do not prove who wrote the file.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import torch
from pydantic import ValidationError

from kvcag.cache.hf import LayerKV, cache_of, layers_of, lazy_cache
from kvcag.cache.quantize import dequantize_int8, quantize_int8
from kvcag.errors import CorruptItemError, FingerprintMismatchError, StoreUnavailableError
from kvcag.fingerprint import ModelFingerprint
from kvcag.items import KVCacheItem
from kvcag.stores.files import atomic_write, unavailable, unnoticed
from kvcag.stores.manifest import (
    Header,
    Manifest,
    Quantize,
    bytes_of,
    checksum,
    make_head,
    manifest_of,
    parse_header,
    parse_id,
    read_head,
)

_DEV_FD = "/dev/fd"
_HEAD = 32 << 10  # most heads are smaller: one read
_SIDE_BY_SIDE = 8 << 20
_THREADS = min(4, os.cpu_count() or 1)


def write_item(
    path: str | os.PathLike[str],
    item: KVCacheItem,
    *,
    quantize: Quantize = None,
    guard: AbstractContextManager[object] | None = None,
) -> int:
    """Write an item, atomically and durably, for this user alone (mode 0600). Returns the file's bytes.

    Args:
        path: the file. Its directory must be there.
        item: the item.
        quantize: `"int8"` halves bfloat16's bytes (`kvcag.cache.quantize`).
        guard: held while the new file takes the old one's place.

    Raises:
        InvalidInputError: the metadata is not JSON, or a value cannot be quantised. Nothing was written.
        StoreUnavailableError: the disk is full, permission was denied. What was at `path` before is still there.
    """
    pieces = _pieces(item, quantize)
    with atomic_write(path, guard) as temporary, open(temporary, "wb") as file:
        for piece in pieces:
            file.write(piece)
        return file.tell()


def item_to_bytes(item: KVCacheItem, *, quantize: Quantize = None) -> bytearray:
    """What `write_item` writes, for places that are not files. Raises `InvalidInputError` as it does."""
    return bytearray().join(_pieces(item, quantize))


def read_item(
    path: str | os.PathLike[str], *, expected: ModelFingerprint | None = None, lazy: bool = False
) -> KVCacheItem:
    """Read an item, with its tensors mapped from the file: pages are read when touched and shared between processes.

    Writing into the tensors changes neither the file nor another reader's tensors; replacing or deleting the file
    does not change them either.

    Args:
        path: the file.
        expected: the model it is for.
        lazy: verify each layer when it is first looked at instead of now. A damaged layer then raises
            `CorruptItemError` there.

    Raises:
        CorruptItemError: the file was cut or changed.
        FormatError: it is not a file of ours, or of a newer version.
        FingerprintMismatchError: another model than `expected` made it.
        StoreUnavailableError: it is not there, or cannot be read.
    """
    with unavailable(path), open(path, "rb") as file:
        return item_from_file(file, expected=expected, lazy=lazy)


def item_from_file(file: BinaryIO, *, expected: ModelFingerprint | None = None, lazy: bool = False) -> KVCacheItem:
    """`read_item` of a file that is open, at its beginning, and may be closed afterwards."""
    name = str(file.name)
    header = _header(file, name)
    return _Reader(header, _map(file, header.size), name).item(expected, lazy)


def item_from_bytes(
    data: bytearray, name: str, *, expected: ModelFingerprint | None = None, lazy: bool = False
) -> KVCacheItem:
    """Read what `item_to_bytes` gave. The item's tensors are views of `data`; errors name it `name`.

    Raises:
        CorruptItemError, FormatError, FingerprintMismatchError: as `read_item`.
    """
    header = parse_header(bytes(data[: 8 + int.from_bytes(data[:8], "little")]), name)
    _check_size(header, len(data), name)
    return _Reader(header, torch.frombuffer(data, dtype=torch.uint8), name).item(expected, lazy)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and verify what a file says about its item, and that the file was not cut. The tensors are not read.

    Raises:
        CorruptItemError, FormatError, StoreUnavailableError: as `read_item`.
    """
    with unavailable(path), open(path, "rb", opener=unnoticed) as file:
        return _header(file, str(path)).manifest


def read_id(path: str | os.PathLike[str]) -> str:
    """The id of the item in a file, for listing very many of them. Raises as `read_manifest`."""
    with unavailable(path), open(path, "rb", buffering=_HEAD, opener=unnoticed) as file:
        return parse_id(read_head(file), str(path))


def _pieces(item: KVCacheItem, quantize: Quantize) -> list[bytes | memoryview]:
    """The head and the tensors' bytes.

    Put together here and not by safetensors' `save_file`, which writes a temporary file of its own and renames it:
    ours would be neither synced nor locked.
    """
    manifest = manifest_of(item, quantize)
    tensors = {"token_ids": item.token_ids.cpu().contiguous()}
    for index, (keys, values) in enumerate(layers_of(item.memory)):
        tensors |= _pack(f"layers.{index}.keys", keys, quantize)
        tensors |= _pack(f"layers.{index}.values", values, quantize)
    # The widest first: so each begins at a multiple of its own width, and can be mapped.
    tensors = dict(sorted(tensors.items(), key=lambda entry: -entry[1].element_size()))
    return [make_head(manifest, tensors), *map(bytes_of, tensors.values())]


def _pack(name: str, states: torch.Tensor, quantize: Quantize) -> dict[str, torch.Tensor]:
    if quantize is None:
        return {name: states.detach().cpu().contiguous()}
    codes, scales = quantize_int8(states.detach())
    return {name: codes.cpu().contiguous(), f"{name}.scale": scales.cpu().contiguous()}


def _header(file: BinaryIO, name: str) -> Header:
    header = parse_header(read_head(file), name)
    _check_size(header, os.fstat(file.fileno()).st_size, name)
    return header


def _check_size(header: Header, size: int, name: str) -> None:
    if size != header.size:
        raise CorruptItemError(name, f"it has {size} bytes and should have {header.size}")


def _map(file: BinaryIO, size: int) -> torch.Tensor:
    """An open file's bytes, `(size,)` uint8, in a private mapping that needs no descriptor.

    By its descriptor, since its path may have been given to another file meanwhile.
    """
    source = f"{_DEV_FD}/{file.fileno()}" if os.path.isdir(_DEV_FD) else str(file.name)
    try:
        storage: Any = torch.UntypedStorage.from_file(source, shared=False, nbytes=size)
    except RuntimeError as error:  # torch's word for every failure of open, fstat and mmap
        raise StoreUnavailableError(None, f"it could not be mapped: {error}", str(file.name)) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class _Reader:
    """Gives the tensors of a file whose header is verified, each verified when it is asked for."""

    def __init__(self, header: Header, data: torch.Tensor, name: str) -> None:
        self.header, self.manifest, self.data, self.name = header, header.manifest, data, name

    def item(self, expected: ModelFingerprint | None, lazy: bool) -> KVCacheItem:
        manifest = self.manifest
        self._check_model(expected)
        memory = lazy_cache(manifest.layers, manifest.tokens, self.layer) if lazy else cache_of(self._layers())
        try:
            return KVCacheItem(
                id=manifest.id,
                memory=memory,
                metadata=manifest.metadata,
                records=manifest.records,
                token_ids=self.tensor("token_ids").clone(),  # looked at often, and small
                fingerprint=manifest.fingerprint,
                base_position=manifest.base_position,
                prefix_digest=manifest.prefix_digest,
                exact=manifest.exact,
            )
        except ValidationError as error:
            raise CorruptItemError(self.name, f"its parts do not fit together ({error})") from error

    def _layers(self) -> list[LayerKV]:
        """All layers. Large ones are verified side by side: a core alone does not read memory as fast as there is."""
        if self.header.size < _SIDE_BY_SIDE:
            return [self.layer(index) for index in range(self.manifest.layers)]
        with ThreadPoolExecutor(_THREADS, "kvcag-verify") as pool:
            return list(pool.map(self.layer, range(self.manifest.layers)))

    def layer(self, index: int) -> LayerKV:
        """Keys and values of one layer, `(1, kv_heads, seq_len, head_dim)` each."""
        keys, values = self._states(f"layers.{index}.keys"), self._states(f"layers.{index}.values")
        if keys.shape[-2:-1] != (self.manifest.tokens,) or values.shape[-2:-1] != (self.manifest.tokens,):
            raise CorruptItemError(self.name, f"layer {index} does not hold {self.manifest.tokens} keys and values")
        return keys, values

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the file's bytes, compared with their checksum."""
        try:
            start, end, dtype, shape = self.header.place(name)
            data = self.data[start:end]
            if checksum(data.numpy().data) != self.manifest.checksums[name]:
                raise CorruptItemError(self.name, f"tensor {name} does not match its checksum")
            return data.view(dtype).view(shape)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CorruptItemError(self.name, f"tensor {name} is not as the header says ({error})") from error

    def _states(self, name: str) -> torch.Tensor:
        if self.manifest.quantize is None:
            return self.tensor(name)
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        return dequantize_int8(self.tensor(name), self.tensor(f"{name}.scale"), dtype)

    def _check_model(self, expected: ModelFingerprint | None) -> None:
        if expected is None or not (self.manifest.tokens or self.manifest.fingerprint):
            return
        if self.manifest.fingerprint is None:
            raise FingerprintMismatchError(self.name, ["it names no model"])
        if not expected.matches(self.manifest.fingerprint):
            raise FingerprintMismatchError(self.name, expected.differences(self.manifest.fingerprint))
