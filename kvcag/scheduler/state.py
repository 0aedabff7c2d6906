"""What a scheduler remembers, in SQLite: uses, places, records of caches, and a log of what was done and why."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from kvcag.core import KVCacheRecords
from kvcag.errors import SchedulerStateError
from kvcag.scheduler.counters import Counters, Known, Place, digest_of
from kvcag.scheduler.log import DELETE_IT, VERSION, LogEntry, check_version, read_log, typed
from kvcag.scheduler.policy import Use
from kvcag.scheduler.working_set import Cached
from kvcag.stores.files import make_private, unavailable

_LOGGED = 10_000
_SCHEMA = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value);
CREATE TABLE texts(digest TEXT PRIMARY KEY, text TEXT, tokens INTEGER, count INTEGER, fast REAL, slow REAL, last REAL,
    asked INTEGER, place TEXT, sources TEXT);
CREATE TABLE places(name TEXT, model TEXT, head_ids BLOB, ending TEXT, last REAL, PRIMARY KEY(name, model));
CREATE TABLE identities(identity TEXT PRIMARY KEY, digest TEXT);
CREATE TABLE shown_as(found TEXT PRIMARY KEY, digest TEXT);
CREATE TABLE caches(key TEXT PRIMARY KEY, digest TEXT, model TEXT, tokens INTEGER, bytes INTEGER, cached INTEGER,
    since REAL, records TEXT);
CREATE INDEX caches_digest ON caches(digest);
CREATE TABLE log(id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL, action TEXT, key TEXT, digest TEXT, tokens INTEGER,
    bytes INTEGER, worth REAL, seconds REAL, reason TEXT);
"""


class State:
    """The database of one scheduler. Whatever is written here is whole or not there, also after a crash.

    Args:
        path: the file, made if it is missing, for this user alone; None keeps everything in memory.
        model: the digest of the model's fingerprint: places are token ids, which mean nothing to another model.

    Raises:
        SchedulerStateError: it is damaged, no such database, of a newer release, or another scheduler has it.
    """

    def __init__(self, path: str | os.PathLike[str] | None, model: str) -> None:
        self.path = "in memory" if path is None else os.fspath(path)
        self._model = model
        self._lock = threading.RLock()
        self._owner: sqlite3.Connection | None = None
        self._db: sqlite3.Connection | None = None
        try:
            self._open(path)
        except BaseException:
            self.close()
            raise

    def load(self, counters: Counters) -> None:
        """Fill counters with what was written down."""
        with self._reading() as db:
            for digest, tokens, count, fast, slow, last, asked, place, sources in db.execute(
                "SELECT digest, tokens, count, fast, slow, last, asked, place, sources FROM texts"
            ):
                use = Use(count, fast, slow, last)
                counters.known[digest] = Known(use, tokens, None, bool(asked), place, json.loads(sources))
            for name, head_ids, ending, last in db.execute(
                "SELECT name, head_ids, ending, last FROM places WHERE model = ?", (self._model,)
            ):
                ids = tuple(np.frombuffer(head_ids, dtype="<i8").tolist())
                counters.places[name] = Place(ids, ending, last)
            counters.identities.update(db.execute("SELECT identity, digest FROM identities"))
            counters.shown_as.update(db.execute("SELECT found, digest FROM shown_as"))
            [(counters.now,)] = db.execute("SELECT value FROM meta WHERE name = 'now'")

    def save(self, counters: Counters) -> None:
        """Write down what is fresh in counters, in one transaction."""
        with self._lock:  # held from reading to writing: what is purged in between would come back
            self._save(counters)

    def _save(self, counters: Counters) -> None:
        with counters.lock:
            fresh, counters.fresh = counters.fresh, set()
            rows = [_row(digest, counters.known[digest]) for digest in fresh if digest in counters.known]
            gone = [(digest,) for digest in fresh if digest not in counters.known]
            places = [
                (name, self._model, np.asarray(place.head_ids, "<i8").tobytes(), place.ending, place.last)
                for name, place in counters.places.items()
            ]
            named = [(name, meant) for name, meant in counters.identities.items() if meant in fresh]
            shown = [(found, digest) for found, digest in counters.shown_as.items() if digest in fresh]
            now = counters.now
        if not fresh:
            return
        try:
            with self._writing() as db:
                db.executemany(_UPSERT, rows)
                db.executemany("DELETE FROM texts WHERE digest = ?", gone)
                db.execute("DELETE FROM places WHERE model = ?", (self._model,))
                db.executemany("INSERT INTO places VALUES (?, ?, ?, ?, ?)", places)
                db.executemany("REPLACE INTO identities VALUES (?, ?)", named)
                db.executemany("REPLACE INTO shown_as VALUES (?, ?)", shown)
                db.execute("UPDATE meta SET value = ? WHERE name = 'now'", (now,))
        except SchedulerStateError:
            with counters.lock:
                counters.fresh |= fresh
            raise
        with counters.lock:  # the texts are in the database now
            for digest in fresh - counters.fresh:
                if digest in counters.known:
                    counters.known[digest].text = None

    def text(self, digest: str) -> str | None:
        """A text that was written down."""
        with self._reading() as db:
            found = db.execute("SELECT text FROM texts WHERE digest = ?", (digest,)).fetchone()
        return None if found is None else found[0]

    def cached(self, entry: Cached, records: KVCacheRecords) -> None:
        """Record a cache that is about to be kept."""
        row = (entry.key, entry.digest, self._model, entry.tokens, entry.bytes, 1, time.time())
        with self._writing() as db:
            db.execute("REPLACE INTO caches VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, records.model_dump_json()))

    def uncached(self, keys: Iterable[str]) -> None:
        """Record that caches are about to leave. What they were made from stays recorded."""
        with self._writing() as db:
            marks = [(time.time(), key) for key in keys]
            db.executemany("UPDATE caches SET cached = 0, since = ? WHERE key = ? AND cached = 1", marks)

    def records(self, key: str) -> tuple[str, KVCacheRecords] | None:
        """The digest of the text of a cache that is or was kept, and its records."""
        with self._reading() as db:
            found = db.execute("SELECT digest, records FROM caches WHERE key = ?", (key,)).fetchone()
        return None if found is None else (found[0], KVCacheRecords.model_validate_json(found[1]))

    def log(self, entries: Iterable[LogEntry]) -> None:
        """Write down what was done. The last 10,000 entries are kept."""
        with self._writing() as db:
            for entry in entries:
                values = tuple(asdict(entry).values())
                last = db.execute(
                    "INSERT INTO log(at, action, key, digest, tokens, bytes, worth, seconds, reason) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    values,
                ).lastrowid
                db.execute("DELETE FROM log WHERE id <= ?", ((last or 0) - _LOGGED,))

    def logged(self, limit: int) -> list[LogEntry]:
        """The last entries of the log, the oldest first."""
        with self._reading() as db:
            return read_log(db, limit)

    def purge(self, source: str, counters: Counters) -> list[str]:
        """Delete every trace of the texts that are `source`, or whose metadata names it; returns their digests.

        What the log says of them stays: sizes, times, and digests that give no text away.
        """
        with self._lock:
            self._save(counters)
            with self._writing() as db:
                digests = {digest_of(source)}
                of_texts = db.execute("SELECT digest, sources FROM texts").fetchall()
                digests |= {digest for digest, sources in of_texts if source in json.loads(sources).values()}
                of_caches = db.execute("SELECT digest, records FROM caches").fetchall()
                digests |= {
                    d for d, made in of_caches if source in KVCacheRecords.model_validate_json(made).text_memories
                }
                for table in ("texts", "caches", "identities", "shown_as"):
                    db.executemany(f"DELETE FROM {table} WHERE digest = ?", [(digest,) for digest in digests])
            for digest in digests:
                counters.forget(digest)
        with self._reading() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # no copy stays in the write-ahead log
        return sorted(digests)

    def forget_records(self, beyond: int) -> None:
        """Delete records of caches that left, all but the latest `beyond`."""
        with self._writing() as db:
            db.execute(
                "DELETE FROM caches WHERE cached = 0 AND key NOT IN "
                "(SELECT key FROM caches WHERE cached = 0 ORDER BY since DESC LIMIT ?)",
                (beyond,),
            )

    def close(self) -> None:
        """Let another scheduler have it."""
        with self._lock:
            for connection in (self._db, self._owner):
                if connection is not None:
                    connection.close()
            self._db = self._owner = None

    # --- SQLite ------------------------------------------------------------------------------------------------

    def _open(self, path: str | os.PathLike[str] | None) -> None:
        if path is None:
            self._db = db = _connect(":memory:", timeout=0)
        else:
            file = Path(path)
            with unavailable(file):
                make_private(file.absolute().parent)
                os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
            with self._typed():
                self._owner = _connect(f"{self.path}.owner", timeout=0)
                self._owner.execute("BEGIN EXCLUSIVE")  # held until this process closes it, or ends
                self._db = db = _connect(self.path, timeout=5)
        with self._typed():
            [(sound,)] = db.execute("PRAGMA quick_check(1)")
            if sound != "ok":
                raise SchedulerStateError(self.path, f"is damaged ({' '.join(sound.split())}). {DELETE_IT}")
            [(version,)] = db.execute("PRAGMA user_version")
            check_version(self.path, version)
            if version == 0 and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise SchedulerStateError(self.path, "is another program's database. Choose another path.")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA secure_delete = ON")
            if version == 0:
                start = f"INSERT INTO meta VALUES ('now', 0.0); PRAGMA user_version = {VERSION};"
                db.executescript(f"BEGIN; {_SCHEMA} {start} COMMIT;")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._typed():
            if self._db is None:
                raise SchedulerStateError(self.path, "is closed: the scheduler was closed. Make another one.")
            yield self._db

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # some errors, as of a full disk, have ended it already
                    db.execute("ROLLBACK")
                raise

    def _typed(self) -> contextlib.AbstractContextManager[None]:
        return typed(self.path)


_UPSERT = """INSERT INTO texts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(digest) DO UPDATE SET
    text = coalesce(excluded.text, text), tokens = excluded.tokens, count = excluded.count, fast = excluded.fast,
    slow = excluded.slow, last = excluded.last, asked = excluded.asked, place = excluded.place,
    sources = excluded.sources"""


def _connect(path: str, timeout: float) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=timeout, check_same_thread=False, isolation_level=None)


def _row(digest: str, known: Known) -> tuple[object, ...]:
    use = known.use
    counted = (known.tokens, use.count, use.fast, use.slow, use.last)
    return (digest, known.text, *counted, known.asked, known.place, json.dumps(known.sources))
