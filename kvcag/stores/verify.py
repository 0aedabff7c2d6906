"""Checks a folder: finds sound items, damaged items, leftovers of killed writers, and files of other programs.

A file is recognised as an item by its path, `<32 hex digits>/<2>/<62>.safetensors`, and by its content. A temporary
file is recognised by its name and path; it is a leftover if its writer holds no lock on it. The directory of a dump is
a leftover if the manifest beside it names another directory, or if the dump's temporary file is a leftover. No other
file is ever deleted.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kvcag.errors import CorruptItemError, FormatError, StoreError
from kvcag.stores.files import SUFFIX, Names, is_abandoned, locked, read_sealed, unavailable, unnoticed

_SPACE = re.compile(r"[0-9a-f]{32}")
_PLACE = re.compile(r"[0-9a-f]{32}/([0-9a-f]{2}/[0-9a-f]{62}(?:\.instruction)?\.safetensors)")
_LOCK = re.compile(r"\.(.+)\.lock")
_TEMPORARY = re.compile(r"\.[0-9a-f]{62}(?:\.instruction)?\.safetensors\.[0-9a-f]{32}\.tmp")


@dataclass(slots=True)
class VerifyReport:
    """The result of `verify`.

    Attributes:
        sound: number of items whose bytes all match their checksums.
        bytes: size of the files of sound items, in bytes.
        damaged: items that were truncated or changed, or have another item's file name, each with the reason. A repair
            deletes them.
        abandoned: temporary files and dump directories of killed writers. A repair deletes them.
        foreign: safetensors files of other programs or newer releases, each with the reason. A repair does not delete
            them.
    """

    sound: int = 0
    bytes: int = 0
    damaged: list[tuple[Path, str]] = field(default_factory=list)
    abandoned: list[Path] = field(default_factory=list)
    foreign: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """No file is damaged or abandoned."""
        return not self.damaged and not self.abandoned


def verify(path: str | os.PathLike[str], *, repair: bool = False, names: Iterable[Names] = ()) -> VerifyReport:
    """Read every item below a directory, and compare all bytes with their checksums.

    Other processes may read and write meanwhile: files that a running writer has not finished are skipped. Files are
    read, not memory-mapped, so that a disk error raises instead of killing the process. Links are not followed.

    Args:
        path: the directory.
        repair: delete damaged items and the leftovers of killed writers.
        names: the namespaces whose file names are also checked; the default namespace always is. Checking whether an
            item has another item's file name needs the namespace's name and salt.

    Raises:
        StoreUnavailableError: the directory cannot be read.
    """
    report = VerifyReport()
    known = {each.space: each for each in (Names(), *names)}
    with unavailable(path):
        for folder, folders, files in os.walk(path, onerror=_raise):
            try:
                left = leftovers(Path(folder), remove=repair)
            except FileNotFoundError:  # deleted in the meantime
                continue
            report.abandoned += left
            folders[:] = sorted(set(folders) - {each.name for each in left})
            for file in (Path(folder, name) for name in sorted(files) if name.endswith(SUFFIX)):
                if file.is_file() and not file.is_symlink():
                    with contextlib.suppress(FileNotFoundError):  # deleted in the meantime
                        _check(file, known, report, repair)
    return report


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _check(file: Path, known: dict[str, Names], report: VerifyReport, repair: bool) -> None:
    from kvcag.stores.format import item_from_bytes  # not above: opening a store needs no torch

    space, *_ = file.absolute().parts[-3:]
    place = _PLACE.fullmatch("/".join(file.absolute().parts[-3:]))
    try:
        with open(file, "rb", opener=unnoticed) as opened:
            data = bytearray(opened.read())
        item = item_from_bytes(data, str(file))
        if place and space in known and known[space].file(item.id) != place[1]:
            raise CorruptItemError(file, f"it has another item's file name but contains {item.id!r}")
    except (CorruptItemError, FormatError) as error:
        if not place or isinstance(error, FormatError):
            report.foreign.append((file, str(error)))
            return
        report.damaged.append((file, str(error)))
        if repair:
            file.unlink(missing_ok=True)
    else:
        report.sound += 1
        report.bytes += len(data)


def leftovers(folder: Path, *, remove: bool = False) -> list[Path]:
    """The leftovers of killed writers directly in a folder: temporary files, and dumps that no manifest names."""
    entries = {each.name: Path(each.path) for each in os.scandir(folder) if not each.is_symlink()}
    found = []
    if _SPACE.fullmatch(folder.absolute().name):
        items = [path for name, path in entries.items() if _TEMPORARY.fullmatch(name)]
        found += [path for path in items if is_abandoned(path, remove=remove)]
    for lock, filename in [(path, made[1]) for name, path in entries.items() if (made := _LOCK.fullmatch(name))]:
        if leftover_dumps(folder, filename):  # a lock without such leftovers may belong to another program
            with contextlib.suppress(BlockingIOError), locked(lock, wait=False):
                dumps = leftover_dumps(folder, filename)
                found += dumps
                for path in dumps if remove else ():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return sorted(found)


def leftover_dumps(folder: Path, filename: str) -> list[Path]:
    """The leftovers of dumps with this name that were replaced or killed. The caller holds the lock of that name.

    If the manifest is missing or damaged, only the directories of killed dumps are leftovers.
    """
    temporary = re.compile(rf"\.{re.escape(filename)}\.([0-9a-f]{{32}})\.tmp")
    directory = re.compile(rf"{re.escape(filename)}-([0-9a-f]{{32}})")
    entries = {each.name: Path(each.path) for each in os.scandir(folder) if not each.is_symlink()}
    begun = {found[1]: path for name, path in entries.items() if (found := temporary.fullmatch(name))}
    dumps = {found[1]: path for name, path in entries.items() if (found := directory.fullmatch(name))}
    current = None
    with contextlib.suppress(StoreError):
        current = read_sealed(folder / filename, None, 1).get("directory")
    killed = [path for token, path in dumps.items() if token in begun and path.name != current]
    replaced = [path for path in dumps.values() if current is not None and path.name != current]
    return sorted({*begun.values(), *killed, *replaced})
