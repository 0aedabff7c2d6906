"""What a file says about its item, in the metadata of its safetensors header, under one checksum."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypeAlias

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcag.cache.int8 import dequantize_int8, quantize_int8
from kvcag.cache.layers import LayerKV, cache_of, layers_of, lazy_cache
from kvcag.core import KVCacheItem, KVCacheRecords
from kvcag.errors import (
    CorruptItemError,
    FingerprintMismatchError,
    FormatError,
    InvalidInputError,
    StoreUnavailableError,
)
from kvcag.fingerprint import ModelFingerprint
from kvcag.stores.files import atomic_write, unavailable, unnoticed

Quantize: TypeAlias = Literal["int8"] | None

FORMAT_VERSION = 1
_UNSEALED = b"0" * 16
# Strings inside the manifest cannot look like these: their quotes are escaped.
_SEAL = re.compile(rb'"kvcag\.checksum":"([0-9a-f]{16})"')
_ID = re.compile(rb'"kvcag\.id":("(?:[^"\\]|\\.)*")')
_MAX_MANIFEST = 32 << 20
_MAX_HEADER = 100_000_000  # as in safetensors
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


class Manifest(BaseModel):
    """Everything about a stored item but its tensors.

    Attributes:
        tokens: how many it holds; their ids are the tensor `token_ids`.
        layers: how many; each is the tensors `layers.<i>.keys` and `layers.<i>.values`.
        dtype: of the keys and values once loaded: `bfloat16`.
        quantize: how they are kept at rest.
        is_exact: whether they come back bit for bit as the model computed them; not once they were quantised.
        checksums: XXH3-64, in hex, of each tensor's bytes. Empty for an item in memory.
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
    is_exact: bool = True
    checksums: dict[str, str] = Field(default_factory=dict)


def manifest_of(item: KVCacheItem, quantize: Quantize = None) -> Manifest:
    """The manifest of an item in memory.

    Raises:
        InvalidInputError: the metadata is not JSON.
    """
    layers = layers_of(item.memory)
    return Manifest(
        id=item.id,
        fingerprint=item.fingerprint,
        tokens=len(item.token_ids),
        layers=len(layers),
        dtype=str(layers[0][0].dtype).removeprefix("torch.") if layers else "float32",
        quantize=quantize,
        base_position=item.base_position,
        prefix_digest=item.prefix_digest,
        is_exact=item.is_exact and quantize is None,
        records=item.records,
        metadata=_json_only(item.metadata, item.id),
    )


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


def make_head(manifest: Manifest, tensors: dict[str, torch.Tensor]) -> bytes:
    """The head of a file that holds `tensors` in this order; their checksums go into the manifest.

    Raises:
        InvalidInputError: it takes more room than a header has.
    """
    manifest.checksums = {name: checksum(bytes_of(tensor)) for name, tensor in tensors.items()}
    text = json.dumps(manifest.model_dump(mode="json", exclude={"id"}), separators=(",", ":"))
    if len(text) > _MAX_MANIFEST:
        raise InvalidInputError(
            f"the metadata and records of item {manifest.id!r} take {len(text)} bytes, and a file keeps at most "
            f"{_MAX_MANIFEST}. Leave large values out of the metadata."
        )
    header: dict[str, Any] = {
        "__metadata__": {
            "kvcag.version": str(FORMAT_VERSION),
            "kvcag.checksum": _UNSEALED.decode(),
            "kvcag.id": json.dumps(manifest.id),  # apart, so that listing files need not read all of the manifest
            "kvcag.manifest": text,
        }
    }
    start = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise InvalidInputError(f"{name} is {tensor.dtype}, which a file cannot keep: convert it to bfloat16")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return seal(len(body).to_bytes(8, "little") + body)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def checksum(data: bytes | memoryview) -> str:
    """XXH3-64, in hex. It reads memory about as quickly as it can be read, so that nothing need go unchecked."""
    return xxhash.xxh3_64_hexdigest(data)


def seal(head: bytes) -> bytes:
    """A head with its checksum in place: that of the head with sixteen zeros in this place."""
    place = _SEAL.search(head)
    if place is None:
        raise ValueError("there is no place for a checksum in this head")
    blank = head[: place.start(1)] + _UNSEALED + head[place.end(1) :]
    return head[: place.start(1)] + checksum(blank).encode() + head[place.end(1) :]


@dataclass(frozen=True, slots=True)
class Header:
    """A verified header: the manifest, and where each tensor is.

    Attributes:
        specs: name → `{"dtype", "shape", "data_offsets": [start, end]}`, in bytes from `start`.
        start: where the tensors begin in the file.
        size: bytes that the file must have.
    """

    manifest: Manifest
    specs: dict[str, Any]
    start: int
    size: int

    def place(self, name: str) -> tuple[int, int, torch.dtype, list[int]]:
        """Where a tensor starts and ends in the file, its dtype and its shape. `LookupError` where it is missing."""
        spec = self.specs[name]
        start, end = spec["data_offsets"]
        return self.start + start, self.start + end, DTYPES[spec["dtype"]], spec["shape"]


def read_head(file: BinaryIO) -> bytes:
    """The head of a file: eight bytes that say how long its header is, and the header."""
    length = file.read(8)
    return length + file.read(min(int.from_bytes(length, "little"), _MAX_HEADER))


def parse_header(head: bytes, name: str) -> Header:
    """Verify and understand a head. Errors name it `name`.

    Raises:
        CorruptItemError: it was cut or changed.
        FormatError: it was not written by kvcag, or by a newer release.
    """
    _check_seal(head, name)
    try:
        specs = json.loads(head[8:])
        metadata = specs.pop("__metadata__")
        if metadata["kvcag.version"] != str(FORMAT_VERSION):
            raise FormatError(
                f"{name} is of format version {metadata['kvcag.version']}, and this release reads version "
                f"{FORMAT_VERSION}. Upgrade kvcag, or encode its text again."
            )
        described = {"id": json.loads(metadata["kvcag.id"]), **json.loads(metadata["kvcag.manifest"])}
        manifest = Manifest.model_validate(described)
        end = max(spec["data_offsets"][1] for spec in specs.values())
    except (ValidationError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptItemError(name, f"its manifest cannot be understood ({error})") from error
    return Header(manifest, specs, len(head), len(head) + end)


def parse_id(head: bytes, name: str) -> str:
    """The item's id from a verified head, and nothing else: several times quicker than `parse_header`."""
    _check_seal(head, name)
    found = _ID.search(head)
    if found is None:
        raise FormatError(f"{name} does not name its item. Upgrade kvcag, or encode its text again.")
    item_id: str = json.loads(json.loads(found[1]))
    return item_id


def _check_seal(head: bytes, name: str) -> None:
    ours = b"kvcag." in head[:4096]
    if len(head) < 9:
        raise CorruptItemError(name, f"only {len(head)} bytes of it are there")
    if head[8:9] != b"{" and not ours:
        raise FormatError(f"{name} is {_describe(head)}")
    if 8 + int.from_bytes(head[:8], "little") != len(head):
        raise CorruptItemError(name, "it ends within its header, or the header's length was changed")
    if not ours:
        raise FormatError(
            f"{name} has no kvcag manifest: it is another program's safetensors file. Give the path of a file that "
            "kvcag wrote."
        )
    if _SEAL.search(head) is None or seal(head) != head:
        raise CorruptItemError(name, "its header does not match its checksum")


def _describe(head: bytes) -> str:
    if head[:1] == b"\x80" or head[:2] == b"PK":
        return (
            "a pickle (or a torch.save archive), which could run any code when loaded. kvcag does not unpickle; for a "
            "dump of MemOS use: kvcag import-memos FILE"
        )
    return "not a file that kvcag wrote. Give the path of one that it did"


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
        quantize: `"int8"` halves bfloat16's bytes (`kvcag.cache.int8`).
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
                is_exact=manifest.is_exact,
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
