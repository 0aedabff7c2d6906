"""A whole memory in a folder: one file an item, and a manifest that is written last.

The manifest names the files that belong to it, so that a dump replaces the one before in one step, and a crash at any
point leaves the one before readable.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import xxhash
from pydantic import BaseModel, ValidationError

from kvcag.core import KVCacheItem
from kvcag.errors import CorruptItemError, FormatError
from kvcag.fingerprint import ModelFingerprint
from kvcag.stores.files import atomic_write, unavailable
from kvcag.stores.format import read_item, write_item

_FORMAT, _VERSION = "kvcag-memory", 1


class _Entry(BaseModel):
    id: str
    file: str


class _Manifest(BaseModel):
    format: str = _FORMAT
    version: int = _VERSION
    items: list[_Entry]
    checksum: str = ""

    def sealed(self) -> str:
        """XXH3-64 over everything but the seal."""
        return xxhash.xxh3_64_hexdigest(self.model_dump_json(exclude={"checksum"}).encode())


def dump_items(folder: str | os.PathLike[str], filename: str, items: Iterable[KVCacheItem]) -> None:
    """Write items and their manifest, in place of what an earlier dump wrote there.

    Raises:
        InvalidInputError: an item's metadata is not JSON. What was there before is as it was.
        StoreUnavailableError: the disk is full, permission was denied. Likewise.
    """
    root = Path(folder)
    with unavailable(root):
        root.mkdir(parents=True, exist_ok=True)
    replaced = _files_of(root, root / filename)
    written: list[_Entry] = []
    try:
        for item in items:
            written.append(_Entry(id=item.id, file=f"{uuid.uuid4().hex}.safetensors"))
            write_item(root / written[-1].file, item)
        manifest = _Manifest(items=written)
        manifest.checksum = manifest.sealed()
        with atomic_write(root / filename) as temporary:
            temporary.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    except BaseException:
        named = _files_of(root, root / filename)  # the manifest may have its name already, though it is not synced
        for entry in written:
            if entry.file not in named:
                (root / entry.file).unlink(missing_ok=True)
        raise
    for file in replaced:
        (root / file).unlink(missing_ok=True)


def load_items(
    folder: str | os.PathLike[str], filename: str, expected: ModelFingerprint | None = None
) -> list[KVCacheItem]:
    """Every item of a dump, read and checked; none where the folder is missing or empty.

    Args:
        folder: where it is.
        filename: its manifest's name.
        expected: the model that made the items; None takes any.

    Raises:
        CorruptItemError: the manifest or a file was cut or changed, or a file is missing.
        FormatError: there are items and no manifest; it is a pickle; a newer release wrote it.
        FingerprintMismatchError: the items were made by another model.
    """
    root = Path(folder)
    manifest = _read_manifest(root, root / filename)
    items = []
    for entry in manifest.items:
        file = root / entry.file
        if not file.is_file():
            raise CorruptItemError(file, f"the manifest {filename} names it, and it is missing")
        items.append(read_item(file, expected=expected))
    return items


def _files_of(root: Path, path: Path) -> list[str]:
    """The files of the dump that is about to be replaced: another dump's, or a model's, may stand beside them."""
    try:
        return [entry.file for entry in _read_manifest(root, path).items]
    except (CorruptItemError, FormatError):
        return []


def _read_manifest(root: Path, path: Path) -> _Manifest:
    with unavailable(path):
        if not path.exists():
            if any(root.glob("*.safetensors")):
                raise FormatError(
                    f"{root} holds items and no manifest {path.name!r}: it was written under another memory_filename, "
                    "or its manifest was lost. Pass that name, or dump the memory again."
                )
            return _Manifest(items=[])
        data = path.read_bytes()
    if data[:1] == b"\x80":
        raise FormatError(
            f"{path} is a pickle, which could run code when it is read. If MemOS wrote it, convert it once with "
            f"`kvcag import-memos {path.name}`."
        )
    try:
        manifest = _Manifest.model_validate_json(data)
    except ValidationError as error:
        raise CorruptItemError(path, f"it is not a manifest: {error.errors()[0]['msg']}") from error
    if manifest.format != _FORMAT:
        raise FormatError(f"{path} says it is a {manifest.format!r}, not a dump of a KVCacheMemory.")
    if manifest.version > _VERSION:
        raise FormatError(
            f"{path} is of version {manifest.version}, and this release of kvcag reads up to {_VERSION}: upgrade kvcag."
        )
    if manifest.checksum != manifest.sealed():
        raise CorruptItemError(path, "its checksum does not match")
    if any(Path(entry.file).name != entry.file for entry in manifest.items):
        raise CorruptItemError(path, "it names a file outside its folder")
    return manifest
