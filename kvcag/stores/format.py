"""Reads and writes an item as a safetensors file (docs/file-format.md). `kvcag.stores.files` reads its head."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import ValidationError

from kvcag.cache.int8 import dequantize_int8, quantize_int8
from kvcag.cache.layers import Kinds, LayerKV, Layers, States, cache_of, layers_of
from kvcag.core import KVCacheItem
from kvcag.errors import (
    CorruptItemError,
    FingerprintMismatchError,
    InvalidInputError,
    StoreUnavailableError,
)
from kvcag.fingerprint import ModelFingerprint
from kvcag.stores.files import (
    FORMAT_VERSION,
    MAX_MANIFEST,
    UNSEALED,
    Header,
    Manifest,
    Quantize,
    atomic_write,
    check_size,
    checksum,
    parse_header,
    read_header,
    seal,
    unavailable,
    unnoticed,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I8": torch.int8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def manifest_of(item: KVCacheItem, quantize: Quantize = None, *, for_file: bool = True) -> Manifest:
    """The manifest of an item in memory.

    Args:
        item: the item.
        quantize: how the file will store keys and values.
        for_file: require metadata that a file can hold.

    Raises:
        InvalidInputError: `for_file` is True, and the item's metadata is not JSON.
    """
    layers = layers_of(item.memory)
    return Manifest(
        id=item.id,
        fingerprint=item.fingerprint,
        tokens=len(item.token_ids),
        layers=len(layers),
        dtype=str(layers[0][0].dtype).removeprefix("torch.") if len(layers) else "float32",
        quantize=quantize,
        base_position=item.base_position,
        prefix_digest=item.prefix_digest,
        kinds=layers.states.kinds if layers.states else (),
        is_exact=item.is_exact and quantize is None,
        records=item.records,
        metadata=_json_only(item.metadata, item.id) if for_file else item.metadata,
    )


def _json_only(metadata: dict[str, Any], item_id: str) -> dict[str, Any]:
    """Refuse values that JSON would change: a tuple would become a list, the key 1 would become "1"."""
    for key, value in metadata.items():
        try:
            same = json.loads(json.dumps({key: value}, allow_nan=False)) == {key: value}
        except (TypeError, ValueError, RecursionError):
            same = False
        if not same:
            raise InvalidInputError(
                f"metadata[{key!r}] of item {item_id!r} is a {type(value).__name__} that JSON cannot store. Use str, "
                "int, float, bool, None, and lists and dicts with str keys of these."
            )
    return metadata


def make_head(manifest: Manifest, tensors: dict[str, torch.Tensor]) -> bytes:
    """The head of a file with `tensors` in this order. Sets the manifest's `checksums`.

    Raises:
        InvalidInputError: the manifest is too large, or a dtype has no name in safetensors.
    """
    manifest.checksums = {name: checksum(bytes_of(tensor)) for name, tensor in tensors.items()}
    unused = {"id"} if manifest.kinds else {"id", "kinds"}  # so that releases before recurrent layers can read the file
    text = json.dumps(manifest.model_dump(mode="json", exclude=unused), separators=(",", ":"))
    if len(text) > MAX_MANIFEST:
        raise InvalidInputError(
            f"the metadata and records of item {manifest.id!r} take {len(text)} bytes, but a file can store at most "
            f"{MAX_MANIFEST}. Leave large values out of the metadata."
        )
    header: dict[str, Any] = {
        "__metadata__": {
            "kvcag.version": str(FORMAT_VERSION if manifest.kinds else 1),
            "kvcag.checksum": UNSEALED.decode(),
            "kvcag.id": json.dumps(manifest.id),  # apart from the manifest, so that listing files is fast
            "kvcag.manifest": text,
        }
    }
    start = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise InvalidInputError(f"{name} is {tensor.dtype}, which a file cannot store. Convert it to bfloat16.")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return seal(len(body).to_bytes(8, "little") + body)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, without copying."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


_DEV_FD = "/dev/fd"
_PARALLEL = 8 << 20
_THREADS = min(4, os.cpu_count() or 1)


def write_item(
    path: str | os.PathLike[str],
    item: KVCacheItem,
    *,
    quantize: Quantize = None,
    guard: AbstractContextManager[object] | None = None,
    beside: Path | None = None,
) -> int:
    """Write an item atomically and durably, with mode 0600. Returns the size of the file in bytes.

    Args:
        path: the file. Its directory must exist.
        item: the item.
        quantize: `"int8"` halves the bytes of bfloat16 (`kvcag.cache.int8`).
        guard: a context that is entered while the new file replaces the old one.
        beside: the directory of the temporary file; by default the directory of `path`.

    Raises:
        InvalidInputError: the metadata is not JSON, or a value cannot be quantised. Nothing was written.
        StoreUnavailableError: the file cannot be written, for example because the disk is full. An earlier file is
            unchanged.
    """
    pieces = _pieces(item, quantize)
    with atomic_write(path, guard, beside=beside) as temporary, open(temporary, "wb") as file:
        for piece in pieces:
            file.write(piece)
        return file.tell()


def item_to_bytes(item: KVCacheItem, *, quantize: Quantize = None) -> bytearray:
    """The bytes that `write_item` would write.

    Raises:
        InvalidInputError: the metadata is not JSON, or a value cannot be quantised.
    """
    return bytearray().join(_pieces(item, quantize))


def read_item(path: str | os.PathLike[str], *, expected: ModelFingerprint | None = None) -> KVCacheItem:
    """Read and verify an item. Its tensors are memory-mapped from the file, and processes share the mapped pages.

    Writing to the tensors changes neither the file nor another reader's tensors. Replacing or deleting the file does
    not change the tensors.

    Args:
        path: the file.
        expected: the model that must have made the item; None accepts any model.

    Raises:
        CorruptItemError: the file was truncated or changed.
        FormatError: another program wrote the file, or a newer release of kvcag.
        FingerprintMismatchError: another model than `expected` made the item.
        StoreUnavailableError: the file does not exist, or cannot be read.
    """
    with unavailable(path), open(path, "rb", opener=unnoticed) as file:
        return item_from_file(file, expected=expected)


def item_from_file(file: BinaryIO, *, expected: ModelFingerprint | None = None) -> KVCacheItem:
    """As `read_item`, from a file that is open at its beginning. The file may be closed afterwards."""
    name = str(file.name)
    header = read_header(file, name)
    return _Reader(header, _map(file, header.size), name).item(expected)


def item_from_bytes(data: bytearray, name: str, *, expected: ModelFingerprint | None = None) -> KVCacheItem:
    """Verify and read the item in the bytes that `item_to_bytes` made. Its tensors are views of `data`.

    Raises:
        CorruptItemError, FormatError, FingerprintMismatchError: as `read_item`.
    """
    header = parse_header(bytes(data[: 8 + int.from_bytes(data[:8], "little")]), name)
    check_size(header, len(data), name)
    return _Reader(header, torch.frombuffer(data, dtype=torch.uint8), name).item(expected)


def _pieces(item: KVCacheItem, quantize: Quantize) -> list[bytes | memoryview]:
    """The head and the bytes of the tensors.

    safetensors' `save_file` is not used: it writes and renames its own temporary file, which is neither synced nor
    locked.
    """
    manifest = manifest_of(item, quantize)
    tensors = {"token_ids": item.token_ids.cpu().contiguous()}
    layers = layers_of(item.memory)
    for row, states in enumerate(layers.states.tensors if layers.states else ()):
        tensors |= {f"states.{row}.{n}": t.detach().cpu().contiguous() for n, t in enumerate(states) if t is not None}
    for row, of_layer in enumerate(layers.states.maps if layers.states else ()):
        if of_layer is not None:
            tensors[f"maps.{row}"] = of_layer.detach().cpu().contiguous()
    for index, (keys, values) in enumerate(layers):
        tensors |= _pack(f"layers.{index}.keys", keys, quantize)
        tensors |= _pack(f"layers.{index}.values", values, quantize)
    # The widest elements come first, so that each tensor begins at a multiple of its element size and can be mapped.
    tensors = dict(sorted(tensors.items(), key=lambda entry: -entry[1].element_size()))
    return [make_head(manifest, tensors), *map(bytes_of, tensors.values())]


def _pack(name: str, states: torch.Tensor, quantize: Quantize) -> dict[str, torch.Tensor]:
    if quantize is None:
        return {name: states.detach().cpu().contiguous()}
    codes, scales = quantize_int8(states.detach())
    return {name: codes.cpu().contiguous(), f"{name}.scale": scales.cpu().contiguous()}


def _map(file: BinaryIO, size: int) -> torch.Tensor:
    """Map the bytes of an open file privately, `(size,)` uint8. The mapping does not keep the descriptor open.

    The file is opened again by its descriptor, since its path may have another file by now.
    """
    source = f"{_DEV_FD}/{file.fileno()}" if os.path.isdir(_DEV_FD) else str(file.name)
    try:
        storage: Any = torch.UntypedStorage.from_file(source, shared=False, nbytes=size)
    except RuntimeError as error:  # torch raises it for every failure of open, fstat and mmap
        raise StoreUnavailableError(None, f"it could not be mapped: {error}", str(file.name)) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class _Reader:
    """Reads and verifies the tensors of a file whose header was verified already."""

    def __init__(self, header: Header, data: torch.Tensor, name: str) -> None:
        self.header, self.manifest, self.data, self.name = header, header.manifest, data, name

    def item(self, expected: ModelFingerprint | None) -> KVCacheItem:
        manifest = self.manifest
        self._check_model(expected)
        memory = cache_of(Layers(self._layers(), self._recurrent(), manifest.tokens))
        try:
            return KVCacheItem(
                id=manifest.id,
                memory=memory,
                metadata=manifest.metadata,
                records=manifest.records,
                token_ids=self.tensor("token_ids").clone(),  # small, and read too often to leave it in the mapping
                fingerprint=manifest.fingerprint,
                base_position=manifest.base_position,
                prefix_digest=manifest.prefix_digest,
                is_exact=manifest.is_exact,
            )
        except ValidationError as error:
            raise CorruptItemError(self.name, f"its parts do not fit together ({error})") from error

    def _layers(self) -> list[LayerKV]:
        """All layers. A large item is verified in several threads: one core cannot use the whole memory bandwidth."""
        if self.header.size < _PARALLEL:
            return [self._layer(index) for index in range(self.manifest.layers)]
        with ThreadPoolExecutor(_THREADS, "kvcag-verify") as pool:
            return list(pool.map(self._layer, range(self.manifest.layers)))

    def _recurrent(self) -> States | None:
        """The states of recurrent layers, copied, since a generation writes to them. None if no layer is recurrent."""
        kinds = self.manifest.kinds
        if not kinds:
            return None
        names = [[f"states.{row}.{n}" for n in range(2 * count)] for row, count in enumerate(_counts(kinds))]
        held = self.header.specs
        rows = tuple(tuple(self.tensor(name).clone() if name in held else None for name in row) for row in names)
        counts = range(len(names)) if any(name.startswith("maps.") for name in held) else ()
        maps = tuple(self.tensor(f"maps.{row}") if f"maps.{row}" in held else None for row in counts)
        return States(kinds, rows, maps)

    def _layer(self, index: int) -> LayerKV:
        """Keys and values of one layer, `(1, kv_heads, seq_len, head_dim)` each."""
        keys, values = self._states(f"layers.{index}.keys"), self._states(f"layers.{index}.values")
        if keys.shape[-2:-1] != (self.manifest.tokens,) or values.shape[-2:-1] != (self.manifest.tokens,):
            raise CorruptItemError(self.name, f"layer {index} does not have {self.manifest.tokens} keys and values")
        return keys, values

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as a view of the file's bytes, which were compared with their checksum."""
        try:
            spec = self.header.specs[name]
            start, end = spec["data_offsets"]
            data = self.data[self.header.start + start : self.header.start + end]
            if checksum(data.numpy().data) != self.manifest.checksums[name]:
                raise CorruptItemError(self.name, f"tensor {name} does not match its checksum")
            return data.view(DTYPES[spec["dtype"]]).view(spec["shape"])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CorruptItemError(self.name, f"tensor {name} does not fit its header ({error})") from error

    def _states(self, name: str) -> torch.Tensor:
        if self.manifest.quantize is None:
            return self.tensor(name)
        dtype = getattr(torch, self.manifest.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise CorruptItemError(self.name, f"{self.manifest.dtype!r} is not a dtype")
        return dequantize_int8(self.tensor(name), self.tensor(f"{name}.scale"), dtype)

    def _check_model(self, expected: ModelFingerprint | None) -> None:
        if expected is None or not (self.manifest.tokens or self.manifest.fingerprint):
            return
        if self.manifest.fingerprint is None:
            raise FingerprintMismatchError(self.name, ["the item has no fingerprint"])
        if not expected.matches(self.manifest.fingerprint):
            raise FingerprintMismatchError(self.name, expected.differences(self.manifest.fingerprint))


def _counts(kinds: Kinds) -> list[int]:
    """The number of states of each recurrent layer."""
    return [count for _, count in kinds if count]
