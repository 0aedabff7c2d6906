"""What a file says about its item, in the metadata of its safetensors header, under one checksum."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypeAlias

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcag.cache.hf import layers_of
from kvcag.errors import CorruptItemError, FormatError, InvalidInputError
from kvcag.fingerprint import ModelFingerprint
from kvcag.items import KVCacheItem, KVCacheRecords

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
        exact: whether they come back bit for bit as the model computed them; not once they were quantised.
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
    exact: bool = True
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
        exact=item.exact and quantize is None,
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
