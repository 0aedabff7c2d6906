"""Files of a store, without their tensors: file names, atomic writes, locks, and the manifest in a file's head.

The head of a file contains a checksum of itself, and is verified before it is parsed (docs/file-format.md). This module
does not import torch.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcag.errors import CorruptItemError, FormatError, StoreUnavailableError
from kvcag.fingerprint import KVCacheRecords, ModelFingerprint

try:
    import fcntl
except ImportError:  # Windows has no flock; there, the age of a temporary file shows whether its writer died
    _HAS_FLOCK = False
else:
    _HAS_FLOCK = True

SUFFIX = ".safetensors"
INSTRUCTION_SUFFIX = f".instruction{SUFFIX}"
"""The suffix of instructions' files. It differs, so that documents are counted without opening files."""
TEMPORARY = ".tmp"
_STALE_SECONDS = 3600.0
_SALT = "KVCAG_SALT"

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
    """Turn an `OSError` into a `StoreUnavailableError` with the same errno and with advice."""
    try:
        yield
    except StoreUnavailableError:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        raise StoreUnavailableError(error.errno, advice, os.fspath(path)) from error


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike[str],
    guard: AbstractContextManager[object] | None = None,
    *,
    beside: Path | None = None,
) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path` when the block succeeds.

    The content is synced to disk before the rename, and the directory after it. A reader sees the complete old file or
    the complete new one, even after a crash at any point. The file has mode 0600. If the block fails, the temporary
    file is deleted.

    Args:
        path: the file to write.
        guard: a context that is entered for the rename only, not while the block writes.
        beside: the directory of the temporary file, on the same disk; by default the directory of `path`.

    Raises:
        StoreUnavailableError: the file cannot be written: the disk is full, permission is denied, or similar.
    """
    target = Path(path)
    with unavailable(target):
        temporary, descriptor = _create(f".{target.name}", beside or target.parent)
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


def _create(name: str, directory: Path) -> tuple[Path, int]:
    """Create a file with a random name. It is locked while its descriptor is open."""
    while True:
        temporary = directory / f"{name}.{secrets.token_hex(16)}{TEMPORARY}"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if not _HAS_FLOCK:
            return temporary, descriptor
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # a repair deleted the file between its creation and the lock: try again


def sync_directory(directory: Path) -> None:
    """Sync a directory's entries to disk, so that a rename or a deletion survives a power cut."""
    if os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unnoticed(path: str | os.PathLike[str], flags: int) -> int:
    """An `opener` for `open` that does not change the file's access time, if the system allows it.

    Raises:
        CorruptItemError: the path is not a regular file. Reading a pipe would wait for its writer.
    """
    flags |= getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NOATIME", 0))
    except PermissionError:  # only the file's owner may use O_NOATIME
        descriptor = os.open(path, flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise CorruptItemError(path, "it is not a regular file")


def make_private(directory: Path) -> None:
    """Create a directory and its missing parents with mode 0700."""
    if directory.is_dir():
        return
    make_private(directory.parent)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    sync_directory(directory.parent)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock on a file against other threads and processes. The system releases it if the holder dies.

    On Windows there is no lock.

    Raises:
        BlockingIOError: `wait` is False, and another thread or process holds the lock, or the system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if _HAS_FLOCK:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif not wait:
            raise BlockingIOError
        yield
    finally:
        os.close(descriptor)


def is_abandoned(temporary: Path, *, remove: bool = False) -> bool:
    """Whether the writer of a temporary file died before it finished. With `remove`, delete such a file."""
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


INSTRUCTION = "instruction:"
"""The prefix of the ids of instructions. An instruction is the text of a system message before the documents."""


WORTH_STORING = 256
"""The minimum number of tokens of a stored instruction. Each process encodes a shorter one once (docs/decisions.md)."""


def is_instruction(id: str) -> bool:
    """Whether an item with this id is an instruction, and not one of the user's documents."""
    return id.startswith(INSTRUCTION)


class Names:
    """The file names of one namespace: the HMAC-SHA256 of an item's id, keyed with the salt and the namespace.

    An id is often the hash of a text. If ids were file names, anyone who lists the files could test whether a text is
    stored. To someone without the salt, these names reveal nothing. The same id has different names in two namespaces.

    Args:
        namespace: the namespace of the items.
        salt: a secret of the server. None: the environment variable `KVCAG_SALT`, or no salt if it is not set.

    Attributes:
        space: the name of the namespace, 32 hex digits.
    """

    def __init__(self, namespace: str = "", salt: bytes | None = None) -> None:
        if salt is None:
            salt = os.environ.get(_SALT, "").encode("utf-8", "surrogateescape")
        self._secret = hmac.digest(salt, namespace.encode("utf-8", "surrogatepass"), "sha256")
        self.space = self._digest("namespace")[:32]

    def file(self, key: str) -> str:
        """The path of an item's file below the namespace's directory: one of 256 directories, and a file in it."""
        name = self._digest(f"item {key}")
        return f"{name[:2]}/{name[2:]}{INSTRUCTION_SUFFIX if is_instruction(key) else SUFFIX}"

    def _digest(self, text: str) -> str:
        return hmac.digest(self._secret, text.encode("utf-8", "surrogatepass"), "sha256").hex()


# --- the manifest in a file's head -------------------------------------------------------------------------------

Quantize: TypeAlias = Literal["int8"] | None

FORMAT_VERSION = 2
UNSEALED = b"0" * 16
# A string inside the manifest cannot match these patterns, since its quotes are escaped.
_SEAL = re.compile(rb'"kvcag\.checksum":"([0-9a-f]{16})"')
_ID = re.compile(rb'"kvcag\.id":("(?:[^"\\]|\\.)*")')
MAX_MANIFEST = 32 << 20
_MAX_HEADER = 100_000_000  # as in safetensors
_HEAD = 32 << 10  # most heads are smaller: one read


class Manifest(BaseModel):
    """Everything about a stored item except its tensors.

    Attributes:
        id: the item's id.
        fingerprint: the model that made the item; None for an empty item.
        tokens: number of tokens. The tensor `token_ids` has their ids.
        layers: number of layers. Each layer has two tensors, `layers.<i>.keys` and `layers.<i>.values`.
        dtype: dtype of the loaded keys and values, such as `bfloat16`.
        quantize: how the file stores keys and values: `"int8"`, or None for `dtype`.
        base_position: the position of the first token.
        prefix_digest: digest of the token ids before the first token.
        records: the texts that the item was made from.
        metadata: the user's JSON.
        kinds: the model's layers, if some are recurrent (`kvcag.cache.layers.States`). The states after the last token
            are the tensors `states.<recurrent layer>.<n>`. If the document can be merged, its maps are the tensors
            `maps.<recurrent layer>`.
        is_exact: whether the loaded keys and values are bit for bit those that the model computed. False after
            quantisation.
        checksums: XXH3-64 of each tensor's bytes, in hex. Empty for an item in memory.
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
    """XXH3-64 of the data, in hex. It is about as fast as reading memory, so every byte can be verified."""
    return xxhash.xxh3_64_hexdigest(data)


def seal(head: bytes) -> bytes:
    """Fill the checksum into a head. The checksum is that of the head with sixteen zeros in the checksum's place."""
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
        specs: for each tensor name, `{"dtype", "shape", "data_offsets": [start, end]}`, in bytes from `start`.
        start: the offset of the tensors in the file, in bytes.
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
    """Verify and parse the head of a file. `name` is the file's name in errors.

    Raises:
        CorruptItemError: the head was truncated or changed.
        FormatError: another program wrote the file, or a newer release of kvcag.
    """
    _check_seal(head, name)
    try:
        specs = json.loads(head[8:])
        metadata = specs.pop("__metadata__")
        if metadata["kvcag.version"] not in ("1", str(FORMAT_VERSION)):
            raise FormatError(
                f"{name} has format version {metadata['kvcag.version']}, but this release reads only versions 1 to "
                f"{FORMAT_VERSION}. Upgrade kvcag, or encode its text again."
            )
        described = {"id": json.loads(metadata["kvcag.id"]), **json.loads(metadata["kvcag.manifest"])}
        manifest = Manifest.model_validate(described)
        end = max(spec["data_offsets"][1] for spec in specs.values())
    except (ValidationError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptItemError(name, f"its manifest cannot be parsed ({error!s:.200})") from error
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
    raise CorruptItemError(name, "its item id cannot be parsed")


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
            f"{name} has no kvcag manifest: it is a safetensors file of another program. Pass the path of a file that "
            "kvcag wrote."
        )
    if _SEAL.search(head) is None or seal(head) != head:
        raise CorruptItemError(name, "its header does not match its checksum")


def _describe(head: bytes) -> str:
    if head[:1] == b"\x80" or head[:2] == b"PK":
        return (
            "a pickle (or a torch.save archive), which could run any code when it is loaded, so kvcag does not load "
            "it. To import a dump of MemOS: kvcag import-memos FILE"
        )
    return "not a file of kvcag. Pass the path of a file that kvcag wrote"


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and verify the manifest of a file, and check the length of the file. The tensors are not read.

    Raises:
        CorruptItemError, FormatError, StoreUnavailableError: as `read_item`.
    """
    with unavailable(path), open(path, "rb", opener=unnoticed) as file:
        return read_header(file, str(path)).manifest


def read_id(path: str | os.PathLike[str]) -> str:
    """The id of the item in a file. Faster than `read_manifest`, and raises the same errors."""
    with unavailable(path), open(path, "rb", buffering=_HEAD, opener=unnoticed) as file:
        return parse_id(read_head(file), str(path))


def read_header(file: BinaryIO, name: str) -> Header:
    """Verify and parse the head of an open file, and check the file's length. Raises the errors of `read_manifest`."""
    header = parse_header(read_head(file), name)
    check_size(header, os.fstat(file.fileno()).st_size, name)
    return header


def check_size(header: Header, size: int, name: str) -> None:
    """Raise `CorruptItemError` if a file does not have the length that its header gives."""
    if size != header.size:
        raise CorruptItemError(name, f"it has {size} bytes instead of {header.size}")


def sealed(kind: str, version: int, content: Mapping[str, Any]) -> str:
    """A JSON manifest of several files, in ASCII, with its kind, its version and a checksum of its whole content."""
    body = {"format": kind, "version": version, **content}
    return json.dumps({**body, "checksum": _seal_of(body)}, indent=1)


def read_sealed(path: str | os.PathLike[str], kind: str | None, version: int) -> dict[str, Any]:
    """Read and verify a manifest that `sealed` made.

    Args:
        path: the path of the manifest.
        kind: the expected kind; None accepts any kind.
        version: the newest version that the caller can read.

    Raises:
        StoreUnavailableError: the file does not exist (`errno.ENOENT`), or cannot be read.
        CorruptItemError: the file was truncated or changed.
        FormatError: the file is a pickle, of another kind, or of a newer version.
    """
    with unavailable(path):
        data = Path(path).read_bytes()
    if data[:1] == b"\x80":
        raise FormatError(
            f"{path} is a pickle, which could run code when it is loaded. If MemOS wrote it, convert it once with "
            f"`kvcag import-memos {Path(path).name}`."
        )
    try:
        body = json.loads(data)
        found, number, seal_found = body.pop("format"), int(body.pop("version")), body.pop("checksum")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CorruptItemError(path, f"it is not a manifest ({error})") from error
    if kind is not None and found != kind:
        raise FormatError(
            f"{path} is a manifest of kind {found!r}, not of kind {kind!r}. Pass the path of the right manifest."
        )
    if number > version:
        raise FormatError(f"{path} has version {number}, but this release reads only up to {version}. Upgrade kvcag.")
    if seal_found != _seal_of({"format": found, "version": number, **body}):
        raise CorruptItemError(path, "its checksum does not match")
    return dict(body)


def _seal_of(body: Mapping[str, Any]) -> str:
    return checksum(json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii"))
