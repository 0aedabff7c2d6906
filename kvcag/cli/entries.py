"""Lists and finds the items of a store by their manifests. Loads no tensors and no model."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from kvcag.cli import common
from kvcag.errors import InvalidInputError, UnknownItemError
from kvcag.stores.base import MADE_OF, SOURCE_FIELDS, KVStore
from kvcag.stores.disk import DiskStore
from kvcag.stores.files import INSTRUCTION, Manifest, Names, is_instruction
from kvcag.stores.remote import FsspecStore, open_at

if TYPE_CHECKING:
    from kvcag.engines.base import Engine

CONTEXT_OF = "context_of"
"""A metadata field of the context of a whole store: the ids of the store's items."""

_PREFIX = "kv:sha256:"


@dataclass(frozen=True, slots=True)
class Entry:
    """One item of a store, without its tensors.

    Attributes:
        manifest: the item's manifest.
        bytes: the size of the item's file or object in bytes.
    """

    manifest: Manifest
    bytes: int

    @property
    def id(self) -> str:
        """The full id."""
        return self.manifest.id

    @property
    def short(self) -> str:
        """The beginning of the id, for tables."""
        return self.id.removeprefix(INSTRUCTION).removeprefix(_PREFIX)[:12]

    @property
    def text(self) -> str:
        """The text that was encoded."""
        return self.manifest.records.composed_text_memory

    @property
    def is_document(self) -> bool:
        """False for an instruction, and for a context of `kvcag ask` or `KVCacheMemory.create_context`."""
        return MADE_OF not in self.manifest.metadata and not is_instruction(self.id)

    @property
    def members(self) -> list[str]:
        """For the context of a whole store, the ids of the store's items; empty for other items."""
        return list(self.manifest.metadata.get(CONTEXT_OF, []))

    @property
    def source(self) -> str:
        """The source of the text, for tables; empty if the metadata has none."""
        if is_instruction(self.id):
            return "(instruction)"
        if self.members:
            return f"({len(self.members)} items, as one context)"
        metadata = self.manifest.metadata
        names = (str(metadata[field]) for field in SOURCE_FIELDS if field != "source_text" and field in metadata)
        name = next(names, "").removeprefix(os.getcwd().rstrip(os.sep) + os.sep)
        part = metadata.get("part")
        return f"{name}#{part}" if name and part else name

    @property
    def model(self) -> str:
        """The name of the model that made the item."""
        made_by = self.manifest.fingerprint
        return Path(made_by.model_name).name if made_by else ""

    @property
    def encoded_at(self) -> float:
        """The time of encoding, in seconds since 1970."""
        return self.manifest.records.timestamp.timestamp()

    def cells(self) -> list[object]:
        """Return the cells of `ls`."""
        return [
            self.short,
            self.source,
            f"{self.manifest.tokens:,}",
            common.size(self.bytes),
            common.age(self.encoded_at),
        ]

    def row(self) -> dict[str, object]:
        """Return the object of `ls --json`."""
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


def open_store(place: str | None, namespace: str) -> DiskStore | FsspecStore:
    """Open the store in a folder or at an address. Creates a missing folder."""
    store = open_at(place or common.default_store(), namespace)
    assert isinstance(store, DiskStore | FsspecStore)
    return store


def open_existing(place: str | None, namespace: str) -> DiskStore | FsspecStore | None:
    """Open the store in a folder or at an address, or return None if a folder has no items yet. Creates no folder.

    Raises:
        InvalidInputError: `place` is a folder that does not exist.
    """
    if place is not None and "://" in place:
        return open_store(place, namespace)
    folder = Path(place or common.default_store())
    if place is not None and not folder.is_dir():
        raise InvalidInputError(
            f"{folder}: no such folder. Pass the store's folder with --store, or create it: "
            f"kvcag encode PATH --store {folder}"
        )
    return open_store(place, namespace) if (folder / Names(namespace).space).is_dir() else None


def read_entries(store: KVStore | None) -> tuple[list[Entry], int]:
    """Return every readable item, newest first, and the number of unreadable files."""
    entries: list[Entry] = []
    unreadable = 0
    for item in () if store is None else store.listing():
        if item.manifest is None:
            unreadable += 1
        else:
            entries.append(Entry(item.manifest, item.bytes))
    entries.sort(key=lambda entry: -entry.encoded_at)
    return entries, unreadable


def find_one(store: DiskStore | FsspecStore | None, id: str) -> Entry:
    """Find an item by its id or a unique beginning of the id. Reads only the manifests of matching items.

    Raises:
        UnknownItemError, InvalidInputError: as `find`.
    """
    begins = _begins(id)
    keys = [] if store is None else [key for key in begins if store.contains(key)]
    if store is not None and not keys:
        keys = [key for key in store.keys() if id and key.startswith(begins)]  # noqa: SIM118 - a store is no dict
    found = [Entry(made, store.size(key)) for key in keys if store is not None and (made := store.manifest(key))]
    return find(found, [id])[0]


def _begins(id: str) -> tuple[str, str, str]:
    return id, _PREFIX + id, INSTRUCTION + _PREFIX + id


def find(entries: Sequence[Entry], ids: Iterable[str]) -> list[Entry]:
    """Find items by ids or by unique beginnings of ids.

    Raises:
        UnknownItemError: no item's id begins with a given beginning.
        InvalidInputError: several items' ids begin with a given beginning.
    """
    found: dict[str, Entry] = {}
    missing: list[str] = []
    for wanted in ids:
        matching = [entry for entry in entries if wanted and entry.id.startswith(_begins(wanted))]
        matching = [entry for entry in matching if entry.id == wanted] or matching
        if len(matching) > 1:
            some = ", ".join(entry.short for entry in matching[:3])
            raise InvalidInputError(f"{len(matching)} ids begin with {wanted!r} ({some}, …): type more of the id.")
        if matching:
            found[matching[0].id] = matching[0]
        else:
            missing.append(wanted)
    if missing:
        raise UnknownItemError(missing)
    return list(found.values())


def choose(entries: Iterable[Entry], sources: Sequence[str] | None, older_than: str | None) -> list[Entry]:
    """Return the items that pass all given filters."""
    latest = time.time() - seconds_of(older_than) if older_than else None
    return [
        entry
        for entry in entries
        if (not sources or any(comes_from(entry.manifest, source) for source in sources))
        and (latest is None or entry.encoded_at <= latest)
    ]


def comes_from(manifest: Manifest, pattern: str) -> bool:
    """Return whether an item's source is a file, is below a folder, matches a glob, or has this name."""
    values = [manifest.metadata[field] for field in SOURCE_FIELDS if field in manifest.metadata]
    names = [str(each) for value in values for each in (value if isinstance(value, list) else [value])]
    absolute = os.path.abspath(pattern)
    return any(
        name in (pattern, absolute)
        or name.startswith(absolute.rstrip(os.sep) + os.sep)
        or fnmatchcase(name, pattern)
        or fnmatchcase(name, absolute)
        for name in names
    )


def made_by(engine: Engine, manifest: Manifest) -> bool:
    """Return whether an engine's model made an item."""
    return manifest.fingerprint is not None and engine.fingerprint.matches(manifest.fingerprint)


def with_contexts(entries: Iterable[Entry], deleted: Iterable[Entry]) -> list[Entry]:
    """Return `deleted`, and the contexts that contain their texts."""
    gone = {entry.id: entry for entry in deleted}
    texts = {entry.text for entry in gone.values()}
    contexts = {entry.id: entry for entry in entries if not texts.isdisjoint(entry.manifest.metadata.get(MADE_OF, []))}
    return list({**gone, **contexts}.values())


def seconds_of(age: str) -> float:
    """Return an age such as `90s`, `30m`, `12h`, `7d` or `4w` in seconds.

    Raises:
        InvalidInputError: the age has another form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", age.strip())
    if match is None:
        raise InvalidInputError(f"--older-than {age}: give a number and a unit, such as 90s, 30m, 12h, 7d or 4w.")
    return float(match[1]) * common.UNITS[match[2]]
