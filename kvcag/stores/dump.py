"""Dumps: folders of several items and other files that are replaced together, in one step.

```
folder/
├── kv_cache_memories.json          the manifest: the current directory, and its items and files
└── kv_cache_memories.json-3f9c…/   a directory of a DiskStore, one for each dump
```

The manifest is renamed last, so a crash at any point leaves the complete old dump or the complete new one. The next
process that opens the folder, or dumps into it, deletes the leftovers of a crash (`kvcag.stores.verify`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from kvcag.core import KVCacheItem
from kvcag.errors import CorruptItemError, FormatError, StoreError, StoreUnavailableError
from kvcag.fingerprint import ModelFingerprint
from kvcag.stores.base import DeletionReport, made_from, says, sources_of
from kvcag.stores.disk import DiskStore
from kvcag.stores.files import (
    SUFFIX,
    TEMPORARY,
    atomic_write,
    checksum,
    locked,
    make_private,
    read_sealed,
    sealed,
    sync_directory,
    unavailable,
)
from kvcag.stores.format import read_item
from kvcag.stores.verify import leftover_dumps, leftovers

_VERSION = 1
_KINDS = ("kvcag-memory", "kvcag-cube")
_DIRECTORY = re.compile(r"(.+)-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Dump:
    """A dump that was read and verified. The items' tensors are memory-mapped from their files."""

    items: list[KVCacheItem] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


class _Contents(BaseModel):
    """The content of a dump's manifest. `files` maps the name of each other file to its checksum."""

    directory: str
    items: list[str]
    files: dict[str, str] = Field(default_factory=dict)
    about: dict[str, Any] = Field(default_factory=dict)


def write_dump(
    folder: str | os.PathLike[str],
    filename: str,
    items: Iterable[KVCacheItem],
    *,
    kind: str = "kvcag-memory",
    files: Mapping[str, bytes] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a dump, and replace an earlier dump of the same `filename`. Other processes that dump to it wait.

    Args:
        folder: the folder. It may contain other files, and dumps with other manifest names.
        filename: the name of the manifest.
        items: the items to write.
        kind: the kind of dump, which the reader checks.
        files: other files of the dump, by name.
        about: JSON for the manifest.

    Raises:
        InvalidInputError: an item's metadata is not JSON. The earlier dump is unchanged.
        StoreUnavailableError: the folder cannot be written, for example because the disk is full. The earlier dump is
            unchanged.
    """
    root, manifest = Path(folder), Path(folder, filename)
    with unavailable(root):
        make_private(root)
        with locked(root / f".{filename}.lock"):
            _clear(root, filename)
            name = ""
            try:
                # The temporary manifest exists from the beginning: if this process is killed, it shows that the
                # directory is unfinished.
                with atomic_write(manifest) as temporary:
                    name = _directory_of(filename, temporary)
                    store = DiskStore(root / name, salt=b"")  # a reader of the dump may have another salt
                    contents = _Contents(directory=name, items=[], about=dict(about or {}))
                    for item in items:
                        store.put(item)
                        contents.items.append(item.id)
                    for file, data in (files or {}).items():
                        with atomic_write(root / name / file) as part:
                            part.write_bytes(data)
                        contents.files[file] = checksum(data)
                    temporary.write_text(sealed(kind, _VERSION, contents.model_dump()), encoding="ascii")
            except BaseException:
                if name and _directory(manifest, kind) != name:  # the error came before the manifest was renamed
                    shutil.rmtree(root / name, ignore_errors=True)
                raise
            _clear(root, filename)


def purge_dump(folder: str | os.PathLike[str], source: str) -> DeletionReport:
    """Delete every item made from one text from all dumps in a folder, of memories and cubes, and report.

    Each dump is replaced, in one step, by a dump without the text. Files without it are linked and not copied.

    Args:
        folder: the folder of the dumps.
        source: as for `KVStore.purge`; also the id of a cube's text.
    """
    root = Path(folder)
    report = DeletionReport({str(root): []})
    try:
        with unavailable(root):
            made = [found[1] for path in root.iterdir() if (found := _DIRECTORY.fullmatch(path.name)) and path.is_dir()]
    except StoreError as error:
        return report + DeletionReport({}, {str(root): str(error)})
    if not made:
        report.failed[str(root)] = "it contains no dump: give the folder that dump() wrote"
    for filename in sorted(set(made)):
        try:
            report += _purge(root, filename, source)
        except StoreError as error:
            report.failed[str(root / filename)] = str(error)
    return report


def _purge(root: Path, filename: str, source: str) -> DeletionReport:
    report, manifest = DeletionReport({str(root): []}), root / filename
    with unavailable(root), locked(root / f".{filename}.lock"):
        _clear(root, filename)
        kind, contents = _of_any_kind(manifest)
        store = DiskStore(root / contents.directory, salt=b"")
        for item in store.listing():
            if item.manifest is None:
                report.failed[item.name] = item.error
            elif made_from(item.manifest, source):
                report.deleted[str(root)].append(item.name)
        kept = [key for key in contents.items if key not in report.ids]
        files = {name: (store.path / name).read_bytes() for name in contents.files}
        texts = {name: _without(data, source) for name, data in files.items()}
        if not report.ids and texts == files:
            return report
        report.deleted[str(root)] += [name for name in files if texts[name] != files[name]]
        with atomic_write(manifest) as temporary:
            new = root / _directory_of(filename, temporary)
            for key in kept:
                _link(store.file(key), new / store.file(key).relative_to(store.path))
            for name, data in texts.items():
                make_private(new)
                with atomic_write(new / name) as part:
                    part.write_bytes(data)
            contents = contents.model_copy(
                update={
                    "directory": new.name,
                    "items": kept,
                    "files": {name: checksum(data) for name, data in texts.items()},
                }
            )
            temporary.write_text(sealed(kind, _VERSION, contents.model_dump()), encoding="ascii")
        _clear(root, filename)
    return report


def _of_any_kind(manifest: Path) -> tuple[str, _Contents]:
    for kind in _KINDS:
        with contextlib.suppress(FormatError):
            return kind, _contents(manifest, kind)
    raise FormatError(f"{manifest} is not the manifest of a dump.")


def _without(data: bytes, source: str) -> bytes:
    """A file of texts, one JSON object per line, without the texts that contain `source` or name it as their source."""
    lines = data.splitlines(keepends=True)
    return b"".join(line for line in lines if not _is_of(json.loads(line), source))


def _is_of(text: Mapping[str, Any], source: str) -> bool:
    return source == text["id"] or says(text["memory"], source) or source in sources_of(text["metadata"])


def _link(old: Path, new: Path) -> None:
    if old.is_file():  # a missing file stays missing, and `read_dump` reports it
        make_private(new.parent)
        try:
            os.link(old, new)
        except OSError:  # a file system without hard links
            shutil.copy2(old, new)
        sync_directory(new.parent)


def _directory_of(filename: str, temporary: Path) -> str:
    return f"{filename}-{temporary.name.removesuffix(TEMPORARY)[-32:]}"


def read_dump(
    folder: str | os.PathLike[str],
    filename: str,
    *,
    kind: str = "kvcag-memory",
    expected: ModelFingerprint | None = None,
) -> Dump | None:
    """Read and verify a dump. Returns None if the folder is missing or contains no items.

    If another process replaces the dump meanwhile, the new dump is read.

    Args:
        folder: the folder of the dump.
        filename: the name of the manifest.
        kind: the expected kind of dump.
        expected: the model that must have made the items; None accepts any model.

    Raises:
        CorruptItemError: the manifest or a file was truncated or changed, or a file is missing.
        FormatError: there are items but no manifest; or the manifest is a pickle, of another kind, or of a newer
            version.
        FingerprintMismatchError: another model made the items.
        StoreUnavailableError: the folder cannot be read.
    """
    root = Path(folder)
    with contextlib.suppress(OSError):  # a read-only folder keeps its leftovers
        leftovers(root, remove=True)
    while True:
        try:
            contents = _contents(root / filename, kind)
        except StoreUnavailableError as error:
            if error.errno != errno.ENOENT:
                raise
            if any(root.rglob(f"*{SUFFIX}")):
                raise FormatError(
                    f"{root} contains items but no manifest {filename!r}: the dump was written with another file name, "
                    "or its manifest was lost. Pass the right name (memory_filename=…), or write the dump again."
                ) from None
            return None
        try:
            return _read(root, filename, contents, expected)
        except StoreError:
            if _contents(root / filename, kind).directory == contents.directory:
                raise


def _read(root: Path, filename: str, contents: _Contents, expected: ModelFingerprint | None) -> Dump:
    directory = root / contents.directory
    paths = {name: directory / name for name in contents.files}
    store = DiskStore(directory, salt=b"") if directory.is_dir() else None
    located = [(key, store.file(key) if store else directory) for key in contents.items]
    for path in (*paths.values(), *(path for _, path in located)):
        if not path.is_file():
            raise CorruptItemError(path, f"the manifest {filename} names this file, but it is missing")
    files = {}
    for name, path in paths.items():
        with unavailable(path):
            files[name] = path.read_bytes()
        if checksum(files[name]) != contents.files[name]:
            raise CorruptItemError(path, "its checksum does not match")
    items = [read_item(path, expected=expected) for _, path in located]
    for item, (key, path) in zip(items, located, strict=True):
        if item.id != key:
            raise CorruptItemError(path, f"it should contain item {key!r} but contains {item.id!r}")
    return Dump(items, files, contents.about)


def _contents(path: Path, kind: str) -> _Contents:
    try:
        contents = _Contents.model_validate(read_sealed(path, kind, _VERSION))
    except ValidationError as error:
        raise CorruptItemError(path, f"it is not a manifest of a dump: {error.errors()[0]['msg']}") from error
    if not _is_directory(contents.directory, path.name) or any(Path(name).name != name for name in contents.files):
        raise CorruptItemError(path, "it names a file outside its folder")
    return contents


def _directory(path: Path, kind: str) -> str | None:
    """The directory that a manifest names; None if the manifest is missing or damaged."""
    with contextlib.suppress(StoreError):
        return _contents(path, kind).directory
    return None


def _is_directory(name: str, filename: str) -> bool:
    return re.fullmatch(re.escape(filename) + "-[0-9a-f]{32}", name) is not None


def _clear(root: Path, filename: str) -> None:
    """Delete the leftovers of replaced and killed dumps with this name. The caller holds the lock."""
    for path in leftover_dumps(root, filename):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
