"""Files of a store, without their tensors: names, whole writes, locks, and what a file says of its item.

The head of a file is sealed by a checksum, and verified before it is read (docs/file-format.md). Imports no torch.
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
except ImportError:  # Windows has no flock: the age of a temporary file shows whether its writer died
    _HAS_FLOCK = False
else:
    _HAS_FLOCK = True

SUFFIX = ".safetensors"
INSTRUCTION_SUFFIX = f".instruction{SUFFIX}"
"""Of instructions, so that documents are counted without opening files."""
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
    """Turn an `OSError` into a `StoreUnavailableError` with the same errno that says what to do."""
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

    The content is synced before the rename, and the directory after it. A reader sees the old file or the new one,
    whole, also after a crash at any point. The file has mode 0600. When the block fails, the temporary file is deleted.

    Args:
        path: the file to write.
        guard: entered for the rename only, not while the block writes.
        beside: the directory of the temporary file, on the same disk; by default the file's own.

    Raises:
        StoreUnavailableError: the disk is full, permission was denied, …
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
    """Create a file under a random name, locked while its descriptor is open."""
    while True:
        temporary = directory / f"{name}.{secrets.token_hex(16)}{TEMPORARY}"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        if not _HAS_FLOCK:
            return temporary, descriptor
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # a repair deleted it between its creation and the lock


def sync_directory(directory: Path) -> None:
    """Sync a directory's entries, so that a rename or a deletion survives a power cut."""
    if os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unnoticed(path: str | os.PathLike[str], flags: int) -> int:
    """An `opener` that leaves the access time as it is, where the system allows that.

    Raises:
        CorruptItemError: it is not a file. Reading a pipe would wait for its writer.
    """
    flags |= getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_NOATIME", 0))
    except PermissionError:  # only the file's owner may use O_NOATIME
        descriptor = os.open(path, flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise CorruptItemError(path, "it is not a file")


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
    """Hold a lock on a file against other threads and processes. It is released when its holder dies.

    On Windows there is no lock.

    Raises:
        BlockingIOError: with `wait=False`, another holds the lock, or there are no locks.
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
    """Whether the writer of a temporary file died before it finished. With `remove`, such a file is deleted."""
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
"""How the ids of instructions begin: of what a system message says before documents."""


WORTH_STORING = 256
"""Tokens of an instruction that is stored, at least. Fewer are read once a process (docs/decisions.md)."""


def is_instruction(id: str) -> bool:
    """Whether an item is an instruction, and not a document of the user's."""
    return id.startswith(INSTRUCTION)


class Names:
    """File names of one namespace: HMAC-SHA256 of an item's id under the salt and the namespace.

    An id is often the hash of a text, so an id used as a name would let a reader test whether a text is stored. Without
    the salt, these names reveal nothing. Equal ids of two namespaces have different names.

    Args:
        namespace: whose items these are.
        salt: a secret of the server; None is the environment variable `KVCAG_SALT`, if it is set.

    Attributes:
        space: the name of the namespace, 32 hex digits.
    """

    def __init__(self, namespace: str = "", salt: bytes | None = None) -> None:
        if salt is None:
            salt = os.environ.get(_SALT, "").encode("utf-8", "surrogateescape")
        self._secret = hmac.digest(salt, namespace.encode("utf-8", "surrogatepass"), "sha256")
        self.space = self._digest("namespace")[:32]

    def file(self, key: str) -> str:
        """The path of an item below its namespace: one of 256 directories, and a file in it."""
        name = self._digest(f"item {key}")
        return f"{name[:2]}/{name[2:]}{INSTRUCTION_SUFFIX if is_instruction(key) else SUFFIX}"

    def _digest(self, text: str) -> str:
        return hmac.digest(self._secret, text.encode("utf-8", "surrogatepass"), "sha256").hex()


# --- what a file says of its item --------------------------------------------------------------------------------

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
