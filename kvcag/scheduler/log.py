"""What a scheduler did and why, and what it keeps: read from its database, also while it works."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcag.errors import InvalidInputError, SchedulerStateError

VERSION = 1
DELETE_IT = (
    "Delete it, and its -wal and -shm files, to begin again: caches are not in it, only counters, records and the log."
)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One thing that a scheduler did.

    Attributes:
        at: when, seconds since the epoch.
        action: `promoted` (encoded ahead), `kept` (encoded for a question, and kept), `passed` (encoded for a question,
            and not kept), `found` (it was in the store), `demoted` (back to text), `dropped` (its text changed, or its
            owner deleted it), `gone` (the store let it go by itself), `failed` (a text, or a whole pass).
        key: the cache's id; empty for a whole pass.
        digest: the text's; empty for a whole pass.
        tokens, bytes: its size.
        worth: what it was worth a byte, in the policy's measure.
        seconds: how long encoding took, waiting for answers included; 0 where nothing was encoded.
        reason: why.
    """

    at: float
    action: str
    key: str
    digest: str
    tokens: int
    bytes: int
    worth: float
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A cache that a scheduler keeps, or kept.

    Attributes:
        key: its item's id.
        digest: the text's.
        tokens, bytes: its size.
        cached: whether it is kept now; else it was demoted or dropped, and its records remain.
        since: since when, seconds since the epoch.
        uses: how often its text was asked for.
        text: the text.
    """

    key: str
    digest: str
    tokens: int
    bytes: int
    cached: bool
    since: float
    uses: int
    text: str


def log_of(path: str | os.PathLike[str], limit: int = 100) -> list[LogEntry]:
    """The last `limit` things that the scheduler of this database did, the oldest first.

    Raises:
        InvalidInputError: there is no such file.
        SchedulerStateError: it is no scheduler's database, or damaged.
    """
    with _opened(path) as db:
        return read_log(db, limit)


def caches_of(path: str | os.PathLike[str]) -> list[CacheEntry]:
    """The caches of this database's scheduler, those that left last. Raises as `log_of`."""
    with _opened(path) as db:
        rows = db.execute(
            "SELECT key, digest, caches.tokens, bytes, cached, since, coalesce(texts.count, 0), "
            "coalesce(json_extract(records, '$.composed_text_memory'), '') FROM caches LEFT JOIN texts USING (digest) "
            "ORDER BY cached DESC, texts.count DESC, key"
        ).fetchall()
    return [
        CacheEntry(key, digest, tokens, size, bool(cached), since, uses, text)
        for key, digest, tokens, size, cached, since, uses, text in rows
    ]


def read_log(db: sqlite3.Connection, limit: int) -> list[LogEntry]:
    """The last entries of a log, the oldest first."""
    rows = db.execute(
        "SELECT at, action, key, digest, tokens, bytes, worth, seconds, reason FROM log ORDER BY id DESC LIMIT ?",
        (limit,),
    )
    return [LogEntry(*row) for row in rows][::-1]


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[sqlite3.Connection]:
    if not Path(path).is_file():
        raise InvalidInputError(f"there is no file {os.fspath(path)}: pass the path that CacheScheduler has as state=")
    name = os.fspath(path)
    with typed(name), contextlib.closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)) as db:
        [(version,)] = db.execute("PRAGMA user_version")
        if version == 0:
            raise SchedulerStateError(name, "is no scheduler's database. Pass the path that it has as state=.")
        check_version(name, version)
        yield db


@contextlib.contextmanager
def typed(path: str) -> Iterator[None]:
    """Turn what SQLite raises into a `SchedulerStateError` that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        said = str(error)
        if "locked" in said or "busy" in said:
            reason = "is in use by another scheduler, or locked by another program. Close that, or choose another path."
        elif "malformed" in said or "not a database" in said:
            reason = f"is damaged ({said}). {DELETE_IT}"
        else:
            reason = f"cannot be used: {said}."
        raise SchedulerStateError(path, reason) from error


def check_version(path: str, version: int) -> None:
    """Refuse a newer release's database."""
    if version > VERSION:
        raise SchedulerStateError(path, f"is of version {version}; this release reads up to {VERSION}: upgrade kvcag.")
