"""What a store on disk holds, as the commands list, find and choose it. No weights are loaded for it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from kvcag.cli.options import default_store
from kvcag.errors import CorruptItemError, FormatError, InvalidInputError, StoreUnavailableError, UnknownItemError
from kvcag.stores.base import SOURCE_FIELDS
from kvcag.stores.disk import DiskStore
from kvcag.stores.files import Names
from kvcag.stores.format import Manifest

CONTEXT_OF = "context_of"
"""Metadata of a whole context: the ids of the items that it was made of."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Entry:
    """One item of a store.

    Attributes:
        manifest: everything about it but its tensors.
        bytes: of its file.
    """

    manifest: Manifest
    bytes: int

    @property
    def id(self) -> str:
        """The whole id."""
        return self.manifest.id

    @property
    def short(self) -> str:
        """As much of the id as a table shows; a unique beginning of it finds the item."""
        return _bare(self.id)[:_SHOWN]

    @property
    def members(self) -> list[str]:
        """The items that a whole context was made of; none for an item."""
        return list(self.manifest.metadata.get(CONTEXT_OF, []))

    @property
    def source(self) -> str:
        """Where its text came from, as far as its metadata says."""
        if self.members:
            return f"({len(self.members)} items, as one context)"
        metadata = self.manifest.metadata
        named = next(
            (str(metadata[field]) for field in SOURCE_FIELDS if field != "source_text" and field in metadata), ""
        )
        part = metadata.get("part")
        return f"{_nearby(named)}#{part}" if named and part else _nearby(named)

    @property
    def model(self) -> str:
        """The name of the model that made it."""
        made_by = self.manifest.fingerprint
        return Path(made_by.model_name).name if made_by else ""

    @property
    def encoded_at(self) -> float:
        """When, in seconds since 1970."""
        return self.manifest.records.timestamp.timestamp()

    def row(self) -> dict[str, object]:
        """What `ls --json` says of it."""
        return {
            "id": self.id,
            "source": self.manifest.metadata.get("source", self.source),
            "title": self.manifest.metadata.get("title"),
            "tokens": self.manifest.tokens,
            "bytes": self.bytes,
            "encoded_at": self.manifest.records.timestamp.isoformat(),
            "model": self.model,
            "context_of": self.members or None,
        }


def open_existing(path: Path | None, namespace: str) -> DiskStore | None:
    """The store at a folder; None where nothing was kept yet. Makes no folder.

    Raises:
        InvalidInputError: a folder was named, and it is not there.
    """
    folder = path or default_store()
    if not folder.is_dir():
        if path is None:
            return None
        raise InvalidInputError(
            f"{folder}: no such folder. Name the store's with --store, or make one: kvcag encode PATH --store {folder}"
        )
    if not (folder / Names(namespace).space).is_dir():
        return None
    return DiskStore(folder, namespace=namespace)


def read_entries(store: DiskStore | None) -> tuple[list[Entry], int]:
    """Every item that can be read, the newest first, and how many files cannot."""
    entries: list[Entry] = []
    if store is None:
        return entries, 0
    for key in iter(store.keys()):
        try:
            manifest = store.manifest(key)
            if manifest is not None:
                entries.append(Entry(manifest, store.file(key).stat().st_size))
        except (CorruptItemError, FormatError):
            continue
        except (FileNotFoundError, StoreUnavailableError):  # deleted meanwhile
            if store.contains(key):
                raise
    entries.sort(key=lambda entry: -entry.encoded_at)
    return entries, max(0, store.stats().items - len(entries))


def find(entries: Sequence[Entry], ids: Iterable[str]) -> list[Entry]:
    """The items whose ids begin so, each once.

    Raises:
        UnknownItemError: none begins so.
        InvalidInputError: more than one begins so.
    """
    found: dict[str, Entry] = {}
    missing: list[str] = []
    for wanted in ids:
        matching = [entry for entry in entries if entry.id == wanted] or [
            entry for entry in entries if wanted and (entry.id.startswith(wanted) or _bare(entry.id).startswith(wanted))
        ]
        if len(matching) > 1:
            some = ", ".join(entry.short for entry in matching[:3])
            raise InvalidInputError(f"{len(matching)} ids begin with {wanted!r} ({some}, …): give more of it.")
        if matching:
            found[matching[0].id] = matching[0]
        else:
            missing.append(wanted)
    if missing:
        raise UnknownItemError(missing)
    return list(found.values())


def choose(entries: Iterable[Entry], sources: Sequence[str] | None, older_than: str | None) -> list[Entry]:
    """Those that all filters let through; a filter that is not given lets everything through."""
    oldest = time.time() - seconds_of(older_than) if older_than else None
    return [
        entry
        for entry in entries
        if (not sources or any(comes_from(entry.manifest, source) for source in sources))
        and (oldest is None or entry.encoded_at <= oldest)
    ]


def comes_from(manifest: Manifest, pattern: str) -> bool:
    """Whether an item was made from a file, from below a folder, from what a glob matches, or names this source."""
    values = [manifest.metadata[field] for field in SOURCE_FIELDS if field in manifest.metadata]
    named = [str(each) for value in values for each in (value if isinstance(value, list) else [value])]
    absolute = os.path.abspath(pattern)
    return any(
        source in (pattern, absolute)
        or source.startswith(absolute.rstrip(os.sep) + os.sep)
        or fnmatchcase(source, pattern)
        or fnmatchcase(source, absolute)
        for source in named
    )


def with_contexts(entries: Iterable[Entry], leaving: Iterable[Entry]) -> list[Entry]:
    """What has to leave with some items: they, and the contexts that hold them."""
    gone = {entry.id: entry for entry in leaving}
    contexts = {entry.id: entry for entry in entries if not gone.keys().isdisjoint(entry.members)}
    return list({**gone, **contexts}.values())


def seconds_of(age: str) -> float:
    """`90s`, `30m`, `12h`, `7d`, `4w` in seconds.

    Raises:
        InvalidInputError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", age.strip())
    if match is None:
        raise InvalidInputError(f"--older-than {age}: say how long with a unit, such as 90s, 30m, 12h, 7d or 4w.")
    return float(match[1]) * _UNITS[match[2]]


def _bare(id: str) -> str:
    return id.removeprefix("kv:sha256:")


def _nearby(source: str) -> str:
    """A path below the working directory without it; every other source as it is."""
    here = os.getcwd().rstrip(os.sep) + os.sep
    return source.removeprefix(here)
