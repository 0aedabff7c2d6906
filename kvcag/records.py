"""What is said of items without their tensors: texts, and what a deletion reached. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import chain
from typing import Any

from pydantic import BaseModel, Field


def instruction_key(key: str) -> str:
    """The id under which a store has what a system message says before documents, whose content key is `key`."""
    return f"{_INSTRUCTION}{key}"


def is_instruction(id: str) -> bool:
    """Whether an item is an instruction, and so is none of the user's documents."""
    return id.startswith(_INSTRUCTION)


_INSTRUCTION = "instruction:"


class KVCacheRecords(BaseModel):
    """Which texts a cache was made from, and how they were put together."""

    text_memories: list[str] = Field(default_factory=list)
    composed_text_memory: str = ""
    timestamp: datetime = Field(default_factory=lambda: datetime.now(timezone.utc))


@dataclass(frozen=True, slots=True)
class DeletionReport:
    """What a deletion reached, and what it did not. It is true if anything was deleted, or failed.

    Attributes:
        deleted: the ids of the items that were deleted, by the place where they were: a folder, an address, a dump.
        failed: what could not be read or deleted, and why: it may hold the text.
    """

    deleted: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        """The ids of the items that were deleted, each once."""
        return list(dict.fromkeys(chain.from_iterable(self.deleted.values())))

    def __bool__(self) -> bool:
        return bool(self.ids or self.failed)

    def __add__(self, other: DeletionReport) -> DeletionReport:
        places = {**self.deleted, **other.deleted}
        deleted = {
            place: list(dict.fromkeys([*self.deleted.get(place, ()), *other.deleted.get(place, ())]))
            for place in places
        }
        return DeletionReport(deleted, {**self.failed, **other.failed})

    def __str__(self) -> str:
        counts = {place: len(ids) for place, ids in self.deleted.items() if ids}
        said = [f"{count} {'item' if count == 1 else 'items'} deleted from {place}" for place, count in counts.items()]
        said += [f"{what} may hold the text: {why}" for what, why in self.failed.items()]
        return "; ".join(said) or "there was nothing to delete"

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON: its attributes."""
        return asdict(self)
