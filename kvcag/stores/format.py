"""One item, one file: safetensors, with a manifest in its metadata and a checksum over everything.

Any safetensors reader opens these files; docs/file-format.md describes them byte by byte. Nothing is unpickled. The
checksum is XXH3 (64 bits), which reads memory about as quickly as it can be read: 4.5 ms for 100 MB where sha256 takes
72 ms and crc32 58 ms. It finds damage; it does not prove who wrote the file.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from typing import Any, Literal, TypeAlias

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save, save_file

from kvcag.cache.hf import LayerKV, LazyLayer, layers_of
from kvcag.cache.quantize import dequantize_int8, quantize_int8
from kvcag.errors import (
    CorruptItemError,
    FingerprintMismatchError,
    FormatError,
    InvalidInputError,
    StoreUnavailableError,
)
from kvcag.fingerprint import ModelFingerprint
from kvcag.items import KVCacheItem, KVCacheRecords
from kvcag.stores.files import atomic_write, unavailable

Quantize: TypeAlias = Literal["int8"] | None

FORMAT_VERSION = 1
_UNSEALED = "0" * 16
_SEAL = re.compile(rb'"kvcag\.checksum":"([0-9a-f]{16})"')
_MAX_MANIFEST = 64 << 20  # safetensors refuses headers above 100 MB
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I8": torch.int8,
}


class Manifest(BaseModel):
    """Everything about a stored item but its tensors.

    Attributes:
        tokens: how many it holds; their ids are the tensor `token_ids`.
        layers: how many; each is the tensors `layers.<i>.keys` and `layers.<i>.values`.
        dtype: of the keys and values once loaded: `bfloat16`.
        quantize: how they are kept at rest.
        checksums: XXH3-64, in hex, of each tensor's bytes.
    """

    model_config = ConfigDict(protected_namespaces=())

    id: str
    fingerprint: ModelFingerprint | None
    tokens: int
    layers: int
    dtype: str
    quantize: Quantize
    base_position: int
    prefix_digest: str
    records: KVCacheRecords
    metadata: dict[str, Any]
    checksums: dict[str, str] = Field(default_factory=dict)


def write_item(path: str | os.PathLike[str], item: KVCacheItem, *, quantize: Quantize = None) -> int:
    """Write an item, atomically and durably, for this user alone (mode 0600). Returns the file's bytes.

    Raises:
        InvalidInputError: the metadata is not JSON, or a value cannot be quantised. Nothing was written.
        StoreUnavailableError: the disk is full, permission was denied. What was at `path` before is still there.
    """
    tensors, metadata = _encode(item, quantize)
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # its only failures from here on are those of the disk
            raise StoreUnavailableError(None, f"it could not be written: {error}", str(path)) from error
        with open(temporary, "r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            position, checksum = _seal(file.read(size))
            file.seek(8 + position)
            file.write(checksum)
        return os.path.getsize(temporary)


def item_to_bytes(item: KVCacheItem, *, quantize: Quantize = None) -> bytearray:
    """What `write_item` writes, for places that are not files. Takes the item's size in memory once more."""
    data = bytearray(save(*_encode(item, quantize)))
    position, checksum = _seal(bytes(data[8 : 8 + int.from_bytes(data[:8], "little")]))
    data[8 + position : 8 + position + len(checksum)] = checksum
    return data


def read_item(
    path: str | os.PathLike[str], *, expected: ModelFingerprint | None = None, lazy: bool = False
) -> KVCacheItem:
    """Read an item, with its tensors mapped from the file: pages are read when touched and shared between processes.

    Writing into the tensors changes neither the file nor another reader's tensors.

    Args:
        path: the file.
        expected: the model it is for.
        lazy: verify and map each layer when it is first looked at instead of now. A damaged layer then raises
            `CorruptItemError` there.

    Raises:
        CorruptItemError: the file was cut or changed.
        FormatError: it is not a file of ours, or of a newer version.
        FingerprintMismatchError: another model than `expected` made it.
        StoreUnavailableError: it is not there, or cannot be read.
    """
    return _ItemFile(_map(path), str(path)).item(expected, lazy)


def item_from_bytes(
    data: bytearray, name: str, *, expected: ModelFingerprint | None = None, lazy: bool = False
) -> KVCacheItem:
    """Read what `item_to_bytes` gave. The item's tensors are views of `data`; errors name it `name`.

    Raises:
        CorruptItemError, FormatError, FingerprintMismatchError: as `read_item`.
    """
    return _ItemFile(data, name).item(expected, lazy)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and verify what a file says about its item, and that it was not cut, without touching its tensors.

    Raises:
        CorruptItemError, FormatError, StoreUnavailableError: as `read_item`.
    """
    return _ItemFile(_map(path), str(path)).manifest


def manifest_of(item: KVCacheItem, quantize: Quantize = None) -> Manifest:
    """The manifest of an item in memory. `checksums` is empty.

    Raises:
        InvalidInputError: the metadata is not JSON.
    """
    layers = item.memory.layers
    return Manifest(
        id=item.id,
        fingerprint=item.fingerprint,
        tokens=len(item.token_ids),
        layers=len(layers) if len(item.token_ids) else 0,
        dtype=str(layers_of(item.memory)[0][0].dtype).removeprefix("torch.") if len(item.token_ids) else "float32",
        quantize=quantize,
        base_position=item.base_position,
        prefix_digest=item.prefix_digest,
        records=item.records,
        metadata=_json_only(item.metadata, item.id),
    )


# --- writing ----------------------------------------------------------------------------------------------------


def _encode(item: KVCacheItem, quantize: Quantize) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata as safetensors takes them; the metadata not yet sealed."""
    manifest = manifest_of(item, quantize)
    tensors = {"token_ids": item.token_ids.cpu().contiguous()}
    for index, (keys, values) in enumerate(layers_of(item.memory)):
        if values.data_ptr() == keys.data_ptr():
            values = values.clone()  # safetensors keeps every tensor apart
        tensors |= _pack(f"layers.{index}.keys", keys, quantize)
        tensors |= _pack(f"layers.{index}.values", values, quantize)
    manifest.checksums = {name: _checksum(_bytes_of(tensor)) for name, tensor in tensors.items()}
    text = json.dumps(manifest.model_dump(mode="json"), separators=(",", ":"), allow_nan=False)
    if len(text) > _MAX_MANIFEST:
        raise InvalidInputError(
            f"the metadata and records of item {item.id!r} take {len(text)} bytes, and {_MAX_MANIFEST} is the most "
            "that a file keeps. Leave large values out of the metadata."
        )
    return tensors, {
        "kvcag.version": str(FORMAT_VERSION),
        "kvcag.checksum": _UNSEALED,
        "kvcag.manifest": text,
    }


def _pack(name: str, states: torch.Tensor, quantize: Quantize) -> dict[str, torch.Tensor]:
    if quantize is None:
        return {name: states.detach().cpu().contiguous()}
    codes, scales = quantize_int8(states.detach())
    return {name: codes.cpu().contiguous(), f"{name}.scale": scales.cpu().contiguous()}


def _json_only(metadata: dict[str, Any], item_id: str) -> dict[str, Any]:
    """Refuse what would come back as something else: a tuple as a list, 1 as "1"."""
    for key, value in metadata.items():
        try:
            same = json.loads(json.dumps({key: value}, allow_nan=False)) == {key: value}
        except (TypeError, ValueError, RecursionError):
            same = False
        if not same:
            raise InvalidInputError(
                f"metadata[{key!r}] of item {item_id!r} is a {type(value).__name__} that JSON cannot keep. Use str, "
                "int, float, bool, None, and lists and dicts with str keys of these."
            )
    return metadata


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(data: bytes | memoryview) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def _seal(header: bytes) -> tuple[int, bytes]:
    """Where in a header its checksum belongs, and the checksum: over the header with sixteen zeros in that place."""
    match = _SEAL.search(header)
    if match is None or match[1] != _UNSEALED.encode():
        raise AssertionError("a header is sealed once, when it was just made")
    return match.start(1), _checksum(header).encode()


# --- reading ----------------------------------------------------------------------------------------------------


def _map(path: str | os.PathLike[str]) -> mmap.mmap | bytearray:
    """The file's content, private to this mapping. It is opened once: replacing it meanwhile changes nothing here."""
    with unavailable(path), open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return bytearray()  # which cannot be mapped
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


class _ItemFile:
    """A file of ours, its header verified; each tensor is verified when it is asked for."""

    def __init__(self, buffer: mmap.mmap | bytearray, name: str) -> None:
        self.buffer, self.name = buffer, name
        header, self.start = _read_header(buffer, name)
        metadata = header.pop("__metadata__")
        if metadata["kvcag.version"] != str(FORMAT_VERSION):
            raise FormatError(
                f"{name} is of format version {metadata['kvcag.version']}, and this release reads version "
                f"{FORMAT_VERSION}. Upgrade kvcag, or encode its text again."
            )
        try:
            self.manifest = Manifest.model_validate(json.loads(metadata["kvcag.manifest"]))
            end = max(spec["data_offsets"][1] for spec in header.values())
        except (ValidationError, ValueError, KeyError, TypeError) as error:
            raise CorruptItemError(name, f"its manifest cannot be understood ({error})") from error
        self.header = header
        if self.start + end != len(buffer):
            raise CorruptItemError(name, f"it has {len(buffer)} bytes and should have {self.start + end}")

    def item(self, expected: ModelFingerprint | None, lazy: bool) -> KVCacheItem:
        manifest = self.manifest
        self._check_model(expected)
        cache = KVCacheItem().memory
        cache.layers.extend(LazyLayer(manifest.tokens, self.layer, index) for index in range(manifest.layers))
        if not lazy:
            layers_of(cache)
        try:
            return KVCacheItem(
                id=manifest.id,
                memory=cache,
                metadata=manifest.metadata,
                records=manifest.records,
                token_ids=self.tensor("token_ids"),
                fingerprint=manifest.fingerprint,
                base_position=manifest.base_position,
                prefix_digest=manifest.prefix_digest,
            )
        except ValidationError as error:
            raise CorruptItemError(self.name, f"its parts do not fit together ({error})") from error

    def layer(self, index: int) -> LayerKV:
        """Keys and values of one layer, `(1, kv_heads, seq_len, head_dim)` each."""
        keys, values = self._states(f"layers.{index}.keys"), self._states(f"layers.{index}.values")
        if keys.shape != values.shape or keys.shape[-2:-1] != (self.manifest.tokens,):
            raise CorruptItemError(self.name, f"layer {index} is not of {self.manifest.tokens} keys and values")
        return keys, values

    def _states(self, name: str) -> torch.Tensor:
        if self.manifest.quantize is None:
            return self.tensor(name)
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        return dequantize_int8(self.tensor(name), self.tensor(f"{name}.scale"), dtype)

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the buffer, its checksum verified."""
        try:
            spec, checksum = self.header[name], self.manifest.checksums[name]
            (start, end), dtype = spec["data_offsets"], _DTYPES[spec["dtype"]]
            with memoryview(self.buffer) as view, view[self.start + start : self.start + end] as data:
                sound = _checksum(data) == checksum
            if not sound:
                raise CorruptItemError(self.name, f"tensor {name} does not match its checksum")
            if start == end:
                return torch.empty(spec["shape"], dtype=dtype)
            count = (end - start) // dtype.itemsize
            flat = torch.frombuffer(self.buffer, dtype=dtype, count=count, offset=self.start + start)
            return flat.view(spec["shape"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CorruptItemError(self.name, f"tensor {name} is not as its manifest says ({error})") from error

    def _check_model(self, expected: ModelFingerprint | None) -> None:
        if expected is None or not self.manifest.tokens:
            return
        if self.manifest.fingerprint is None:
            raise FingerprintMismatchError(self.name, ["no model is named in it"])
        if not expected.matches(self.manifest.fingerprint):
            raise FingerprintMismatchError(self.name, expected.differences(self.manifest.fingerprint))


def _read_header(buffer: mmap.mmap | bytearray, name: str) -> tuple[dict[str, Any], int]:
    """The header, verified, and where the tensors begin."""
    start = 8 + int.from_bytes(buffer[:8], "little")
    if len(buffer) < 9:
        raise CorruptItemError(name, f"only {len(buffer)} bytes of it are there")
    if buffer[8:9] != b"{":
        raise FormatError(f"{name} is {_describe(bytes(buffer[:2]))}")
    if start > len(buffer):
        raise CorruptItemError(name, "it ends, or is damaged, within its header")
    raw = bytes(buffer[8:start])
    seal = _SEAL.search(raw)
    if seal is None:
        if b"kvcag." in raw:
            raise CorruptItemError(name, "its header was changed")
        raise FormatError(
            f"{name} has no kvcag manifest: it is another program's safetensors file. Give the path of a file that "
            "kvcag wrote."
        )
    blank = raw[: seal.start(1)] + _UNSEALED.encode() + raw[seal.end(1) :]
    if _checksum(blank) != seal[1].decode():
        raise CorruptItemError(name, "its header does not match its checksum")
    header: dict[str, Any] = json.loads(raw)
    return header, start


def _describe(first: bytes) -> str:
    if first[:1] == b"\x80" or first == b"PK":
        return (
            "a pickle (or a torch.save archive), which could run any code when loaded. kvcag does not unpickle; for a "
            "dump of MemOS use: kvcag import-memos FILE"
        )
    return "not a file that kvcag wrote. Give the path of one that it did"
