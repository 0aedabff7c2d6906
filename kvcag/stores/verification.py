"""Check a directory of stored items, and clear it of what a crash or a bad disk left."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from kvcag.errors import CorruptItemError, FormatError
from kvcag.stores.files import TEMPORARY, is_abandoned, remove_if_abandoned, unavailable, unnoticed
from kvcag.stores.format import item_from_bytes


@dataclass(slots=True)
class VerifyReport:
    """What was found.

    Attributes:
        sound: files whose every byte is as it was written.
        bytes: of these.
        damaged: files that were cut or changed, each with the reason. Deleted by a repair: their texts can be encoded
            again.
        abandoned: half-written files of writers that died. Deleted by a repair.
        foreign: safetensors files of other programs or newer releases, each with the reason. Never touched.
    """

    sound: int = 0
    bytes: int = 0
    damaged: list[tuple[Path, str]] = field(default_factory=list)
    abandoned: list[Path] = field(default_factory=list)
    foreign: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Nothing damaged, nothing half written."""
        return not self.damaged and not self.abandoned


def verify(path: str | PathLike[str], *, repair: bool = False) -> VerifyReport:
    """Read every item below a directory and compare every byte with its checksum.

    Safe beside running readers and writers: what a living process is writing is left alone, and a repair deletes
    nothing that could be read. Files are read, not mapped: a page that the disk cannot give is an error here, and would
    be a signal there.

    Raises:
        StoreUnavailableError: the directory cannot be read.
    """
    report = VerifyReport()
    with unavailable(path):
        for file in sorted(p for p in Path(path).rglob("*") if p.is_file()):
            if file.name.endswith(TEMPORARY):
                if remove_if_abandoned(file) if repair else is_abandoned(file):
                    report.abandoned.append(file)
            elif file.suffix == ".safetensors":
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    _check(file, report, repair)
    return report


def _check(file: Path, report: VerifyReport, repair: bool) -> None:
    try:
        with open(file, "rb", opener=unnoticed) as opened:
            data = bytearray(opened.read())
        item_from_bytes(data, str(file))
    except CorruptItemError as error:
        report.damaged.append((file, str(error)))
        if repair:
            file.unlink(missing_ok=True)
    except FormatError as error:
        report.foreign.append((file, str(error)))
    else:
        report.sound += 1
        report.bytes += len(data)
