"""A cube in a folder: texts and caches under one manifest, which is written last.

```
dump/
├── cube.json               which folder holds the cube, its settings, and what must be in it
└── 3f9c…/                  a folder a dump; the manifest names the one that counts
    ├── texts.jsonl         one text a line: id, memory, metadata
    ├── caches.json         the items, as KVCacheMemory.dump names them
    └── 1d20….safetensors   an item a file (docs/file-format.md)
```

A dump replaces the one before in one step: a crash at any point leaves one of the two, whole, and what the crash left
over is cleared away by the next dump. Nothing is unpickled, everything is under a checksum, and files are this user's
alone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash
from pydantic import BaseModel, ValidationError

from kvcag.core import KVCacheItem, TextualMemoryItem
from kvcag.errors import CorruptItemError, FormatError, StoreError
from kvcag.stores.dump import read_dump as read_items
from kvcag.stores.dump import write_dump as write_items
from kvcag.stores.files import atomic_write, locked, make_private, sync_directory, unavailable

_FORMAT, _VERSION = "kvcag-cube", 1
_MANIFEST, _TEXTS, _CACHES = "cube.json", "texts.jsonl", "caches.json"
_FOLDER = re.compile(r"\.?[0-9a-f]{32}(\.tmp)?")


class CubeSettings(BaseModel):
    """What a dump says of its cube. `head_id` is the item of the instruction's own cache."""

    namespace: str = ""
    instruction: str | None = None
    head_id: str | None = None


class _Manifest(BaseModel):
    format: str = _FORMAT
    version: int = _VERSION
    folder: str
    settings: CubeSettings
    texts: int
    texts_checksum: str
    caches: int
    checksum: str = ""

    def sealed(self) -> str:
        """XXH3-64 over everything but the seal."""
        return xxhash.xxh3_64_hexdigest(self.model_dump_json(exclude={"checksum"}).encode())


@dataclass(frozen=True, slots=True)
class Dumped:
    """A dump, read and checked. The items' tensors are mapped from their files."""

    settings: CubeSettings
    texts: list[TextualMemoryItem]
    items: list[KVCacheItem]


def write_dump(
    dir: str | os.PathLike[str],
    settings: CubeSettings,
    texts: Sequence[TextualMemoryItem],
    items: Iterable[KVCacheItem],
) -> None:
    """Write a cube, in place of the dump that is there. One process at a time; others wait.

    Raises:
        StoreUnavailableError: the disk is full, permission was denied. What was there before is as it was.
    """
    root = Path(dir)
    with unavailable(root):
        make_private(root)
        with locked(root / ".lock"):
            _write(root, settings, texts, items)


def read_dump(dir: str | os.PathLike[str]) -> Dumped:
    """Read and check a whole dump. One that is replaced meanwhile is read in the new state.

    Raises:
        StoreUnavailableError: there is none, or it cannot be read.
        CorruptItemError: a file was cut, changed or is missing.
        FormatError: it is of a newer version, or no dump of a cube.
    """
    root = Path(dir)
    while True:
        manifest = _read_manifest(root)
        try:
            return _read(root, manifest)
        except StoreError:
            if _read_manifest(root).folder == manifest.folder:
                raise


def read_settings(dir: str | os.PathLike[str]) -> CubeSettings:
    """What a dump says of its cube. Raises as `read_dump`."""
    return _read_manifest(Path(dir)).settings


def _write(
    root: Path, settings: CubeSettings, texts: Sequence[TextualMemoryItem], items: Iterable[KVCacheItem]
) -> None:
    before = _current(root)
    if before is not None:  # of a damaged dump nothing is cleared away before a sound one is there
        _clear(root, keep=before)
    folder = secrets.token_hex(16)
    temporary = root / f".{folder}.tmp"
    try:
        temporary.mkdir(mode=0o700)
        write_items(temporary, _CACHES, items)
        caches = sum(1 for _ in temporary.rglob("*.safetensors"))
        lines = "".join(json.dumps(text.model_dump(mode="json")) + "\n" for text in texts).encode("ascii")
        with atomic_write(temporary / _TEXTS) as path:
            path.write_bytes(lines)
        manifest = _Manifest(
            folder=folder,
            settings=settings,
            texts=len(texts),
            texts_checksum=xxhash.xxh3_64_hexdigest(lines),
            caches=caches,
        )
        manifest.checksum = manifest.sealed()
        os.replace(temporary, root / folder)
        sync_directory(root)
        with atomic_write(root / _MANIFEST) as path:
            path.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    except BaseException:
        if _current(root) != folder:  # else the manifest has its name already, and what it names must stay
            for unfinished in (temporary, root / folder):
                shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _clear(root, keep=folder)


def _current(root: Path) -> str | None:
    """The folder of the dump that counts; None where there is none, or its manifest is damaged."""
    try:
        return _read_manifest(root).folder
    except StoreError:
        return None


def _clear(root: Path, keep: str) -> None:
    """Remove the dumps that were replaced or never finished. The caller holds the lock, so nobody is writing one."""
    for entry in list(root.iterdir()):
        if entry.is_dir() and _FOLDER.fullmatch(entry.name) and entry.name != keep:
            shutil.rmtree(entry)
        elif entry.name.startswith(f".{_MANIFEST}."):
            entry.unlink()


def _read(root: Path, manifest: _Manifest) -> Dumped:
    folder = root / manifest.folder
    path = folder / _TEXTS
    if not path.is_file():
        raise CorruptItemError(path, f"the manifest {_MANIFEST} names it, and it is missing")
    with unavailable(path):
        lines = path.read_bytes()
    if xxhash.xxh3_64_hexdigest(lines) != manifest.texts_checksum:
        raise CorruptItemError(path, "its checksum does not match")
    texts = [TextualMemoryItem.model_validate_json(line) for line in lines.splitlines()]
    kept = read_items(folder, _CACHES)
    items = kept.items if kept else []
    if len(items) != manifest.caches:
        raise CorruptItemError(folder / _CACHES, f"it names {len(items)} items of {manifest.caches}")
    return Dumped(manifest.settings, texts, items)


def _read_manifest(root: Path) -> _Manifest:
    path = root / _MANIFEST
    with unavailable(path):
        data = path.read_bytes()
    try:
        described = json.loads(data)
        form, version = described["format"], described["version"]
    except (ValueError, LookupError, TypeError) as error:
        raise CorruptItemError(path, f"it is not a manifest ({error})") from error
    if form != _FORMAT:
        raise FormatError(f"{path} says it is a {form!r}, not a dump of a MemoryCube.")
    if version != _VERSION:
        raise FormatError(f"{path} is of version {version}, and this release of kvcag reads {_VERSION}: upgrade kvcag.")
    try:
        manifest = _Manifest.model_validate(described)
    except ValidationError as error:
        raise CorruptItemError(path, f"it is not a manifest: {error.errors()[0]['msg']}") from error
    if manifest.checksum != manifest.sealed() or not re.fullmatch(r"[0-9a-f]{32}", manifest.folder):
        raise CorruptItemError(path, "its checksum does not match")
    return manifest
