"""The head of the file format: what a file says of its item, verified (docs/file-format.md). Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcag.errors import CorruptItemError, FormatError
from kvcag.fingerprint import ModelFingerprint
from kvcag.records import KVCacheRecords
from kvcag.stores.files import unavailable, unnoticed

Quantize: TypeAlias = Literal["int8"] | None

FORMAT_VERSION = 2
UNSEALED = b"0" * 16
# Strings inside the manifest cannot look like these: their quotes are escaped.
_SEAL = re.compile(rb'"kvcag\.checksum":"([0-9a-f]{16})"')
_ID = re.compile(rb'"kvcag\.id":("(?:[^"\\]|\\.)*")')
MAX_MANIFEST = 32 << 20
_MAX_HEADER = 100_000_000  # as in safetensors
_HEAD = 32 << 10  # most heads are smaller: one read


class Manifest(BaseModel):
    """Everything about a stored item except its tensors.

    Attributes:
        id: the item's id.
        fingerprint: the model that made it; None for an empty item.
        tokens: number of tokens. Their ids are the tensor `token_ids`.
        layers: number of layers. Each is the tensors `layers.<i>.keys` and `layers.<i>.values`.
        dtype: of the keys and values when they are loaded: `bfloat16`.
        quantize: how the file stores them.
        base_position: the position of the first token.
        prefix_digest: digest of the token ids that stood before it.
        records: the texts it was made from.
        metadata: JSON of the user.
        kinds: the model's layers, if some are recurrent (`kvcag.cache.layers.States`). Their states after the last
            token are the tensors `states.<recurrent layer>.<n>`, and their maps, where the document can be merged,
            `maps.<recurrent layer>`.
        is_exact: the loaded keys and values are bit for bit what the model computed; False after quantisation.
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
    kinds: tuple[tuple[bool, int], ...] = ()
    is_exact: bool = True
    checksums: dict[str, str] = Field(default_factory=dict)


def checksum(data: bytes | memoryview) -> str:
    """XXH3-64, in hex. It is about as fast as reading memory, so that every byte can be verified."""
    return xxhash.xxh3_64_hexdigest(data)


def seal(head: bytes) -> bytes:
    """A head with its checksum filled in. The checksum is computed with sixteen zeros in its own place."""
    place = _SEAL.search(head)
    if place is None:
        raise ValueError("this head has no place for a checksum")
    blank = head[: place.start(1)] + UNSEALED + head[place.end(1) :]
    return head[: place.start(1)] + checksum(blank).encode() + head[place.end(1) :]


@dataclass(frozen=True, slots=True)
class Header:
    """A verified header.

    Attributes:
        manifest: the item's manifest.
        specs: tensor name → `{"dtype", "shape", "data_offsets": [start, end]}`, in bytes from `start`.
        start: where the tensors begin in the file, in bytes.
        size: the length that the file must have, in bytes.
    """

    manifest: Manifest
    specs: dict[str, Any]
    start: int
    size: int


def read_head(file: BinaryIO) -> bytes:
    """The head of a file: eight bytes with the length of the header, and the header."""
    length = file.read(8)
    return length + file.read(min(int.from_bytes(length, "little"), _MAX_HEADER))


def parse_header(head: bytes, name: str) -> Header:
    """Verify and parse a head. Errors name the file as `name`.

    Raises:
        CorruptItemError: the head was cut or changed.
        FormatError: kvcag did not write it, or a newer release did.
    """
    _check_seal(head, name)
    try:
        specs = json.loads(head[8:])
        metadata = specs.pop("__metadata__")
        if metadata["kvcag.version"] not in ("1", str(FORMAT_VERSION)):
            raise FormatError(
                f"{name} is of format version {metadata['kvcag.version']}, and this release reads versions 1 to "
                f"{FORMAT_VERSION}. Upgrade kvcag, or encode its text again."
            )
        described = {"id": json.loads(metadata["kvcag.id"]), **json.loads(metadata["kvcag.manifest"])}
        manifest = Manifest.model_validate(described)
        end = max(spec["data_offsets"][1] for spec in specs.values())
    except (ValidationError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptItemError(name, f"its manifest cannot be understood ({error!s:.200})") from error
    return Header(manifest, specs, len(head), len(head) + end)


def parse_id(head: bytes, name: str) -> str:
    """Verify a head and return the item's id. Several times faster than `parse_header`."""
    _check_seal(head, name)
    found = _ID.search(head)
    if found is None:
        raise FormatError(f"{name} has no item id. Upgrade kvcag, or encode its text again.")
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        item_id = json.loads(json.loads(found[1]))
        if isinstance(item_id, str):
            return item_id
    raise CorruptItemError(name, "its item id cannot be understood")


def _check_seal(head: bytes, name: str) -> None:
    ours = b"kvcag." in head[:4096]
    if len(head) < 9:
        raise CorruptItemError(name, f"it has only {len(head)} bytes")
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
            "a pickle (or a torch.save archive), which could run any code when it is loaded. kvcag does not unpickle. "
            "For a dump of MemOS use: kvcag import-memos FILE"
        )
    return "not a file that kvcag wrote. Give the path of one that it wrote"


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and verify the manifest of a file, and check the length of the file. The tensors are not read.

    Raises:
        CorruptItemError, FormatError, StoreUnavailableError: as `read_item`.
    """
    with unavailable(path), open(path, "rb", opener=unnoticed) as file:
        return read_header(file, str(path)).manifest


def read_id(path: str | os.PathLike[str]) -> str:
    """The id of the item in a file, for listing many files. Raises as `read_manifest`."""
    with unavailable(path), open(path, "rb", buffering=_HEAD, opener=unnoticed) as file:
        return parse_id(read_head(file), str(path))


def read_header(file: BinaryIO, name: str) -> Header:
    """Verify and parse the head of an open file, and compare its length. Raises as `read_manifest`."""
    header = parse_header(read_head(file), name)
    check_size(header, os.fstat(file.fileno()).st_size, name)
    return header


def check_size(header: Header, size: int, name: str) -> None:
    """Raise `CorruptItemError` if a file does not have the length that its header gives."""
    if size != header.size:
        raise CorruptItemError(name, f"it has {size} bytes and should have {header.size}")


def sealed(kind: str, version: int, content: Mapping[str, Any]) -> str:
    """A JSON manifest of several files, in ASCII, with its kind, its version and a checksum of everything."""
    body = {"format": kind, "version": version, **content}
    return json.dumps({**body, "checksum": _seal_of(body)}, indent=1)


def read_sealed(path: str | os.PathLike[str], kind: str | None, version: int) -> dict[str, Any]:
    """Read and verify a file that holds what `sealed` gave.

    Args:
        path: the manifest.
        kind: its kind; None accepts any.
        version: the newest version that the caller reads.

    Raises:
        StoreUnavailableError: it does not exist (`errno.ENOENT`), or cannot be read.
        CorruptItemError: it was cut or changed.
        FormatError: it is a pickle, of another kind, or of a newer version.
    """
    with unavailable(path):
        data = Path(path).read_bytes()
    if data[:1] == b"\x80":
        raise FormatError(
            f"{path} is a pickle, which could run code when it is read. If MemOS wrote it, convert it once with "
            f"`kvcag import-memos {Path(path).name}`."
        )
    try:
        body = json.loads(data)
        found, number, seal_found = body.pop("format"), int(body.pop("version")), body.pop("checksum")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CorruptItemError(path, f"it is not a manifest ({error})") from error
    if kind is not None and found != kind:
        raise FormatError(
            f"{path} is of the kind {found!r}, not the kind {kind!r}. Give the path of the right manifest."
        )
    if number > version:
        raise FormatError(f"{path} is of version {number}, and this release reads up to {version}. Upgrade kvcag.")
    if seal_found != _seal_of({"format": found, "version": number, **body}):
        raise CorruptItemError(path, "its checksum does not match")
    return dict(body)


def _seal_of(body: Mapping[str, Any]) -> str:
    return checksum(json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii"))
