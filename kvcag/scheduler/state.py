"""The saved state of a scheduler: a SQLite file with one table, a row of counters for each text."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvcag.errors import InvalidInputError, SchedulerStateError
from kvcag.stores.files import make_private, unavailable

_VERSION = 3
_CREATE = f"BEGIN; CREATE TABLE texts(digest TEXT PRIMARY KEY, stats TEXT); PRAGMA user_version = {_VERSION}; COMMIT;"


class StateFile:
    """Stores a row for each text, by the text's digest. One process writes; others may read (`read_rows`).

    Args:
        path: the file. If it is missing, it is created, readable only by this user.

    Raises:
        SchedulerStateError: the file is damaged, in use by another scheduler, or not a scheduler's database.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._connections = contextlib.ExitStack()
        with unavailable(path):
            make_private(Path(path).absolute().parent)
            for each in (path, f"{path}.owner"):  # SQLite gives its other files the mode of the first
                os.close(os.open(each, os.O_RDWR | os.O_CREAT, 0o600))
        try:
            with _typed(self.path):
                owner = self._connect(f"{self.path}.owner", timeout=0)
                owner.execute("BEGIN EXCLUSIVE")  # until this process closes it or ends
                self._db = self._connect(self.path, timeout=5)
                is_new = _is_new(self._db, self.path)
                for setting in ("journal_mode = WAL", "synchronous = NORMAL", "secure_delete = ON"):
                    self._db.execute(f"PRAGMA {setting}")
                if is_new:
                    self._db.executescript(_CREATE)
        except BaseException:
            self.close()
            raise

    def rows(self) -> dict[str, Any]:
        """All rows, by digest."""
        with _typed(self.path):
            return _rows(self._db)

    def write(self, rows: Mapping[str, object], gone: set[str]) -> None:
        """Replace `rows` and delete the rows with the digests `gone`, in one transaction. Not thread-safe."""
        replaced = [(digest, json.dumps(row)) for digest, row in rows.items()]
        with _typed(self.path):
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany("REPLACE INTO texts VALUES (?, ?)", replaced)
                self._db.executemany("DELETE FROM texts WHERE digest = ?", [(digest,) for digest in gone])
            if gone:  # a deleted text must not remain in the write-ahead log
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close the file, so that another scheduler can open it."""
        self._connections.close()

    def _connect(self, path: str, timeout: float) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=timeout, check_same_thread=False, isolation_level=None)
        return self._connections.enter_context(contextlib.closing(connection))


def read_rows(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The rows of a state file, by digest. A scheduler may be writing the file meanwhile.

    Raises:
        InvalidInputError: the file does not exist.
        SchedulerStateError: the file is damaged, or not a scheduler's database.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise InvalidInputError(f"there is no file {name}: pass the path that was given to CacheScheduler as state=")
    uri = f"{Path(path).absolute().as_uri()}?mode=ro"
    with _typed(name), contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        return {} if _is_new(db, name) else _rows(db)


def _rows(db: sqlite3.Connection) -> dict[str, Any]:
    return {digest: json.loads(stats) for digest, stats in db.execute("SELECT digest, stats FROM texts")}


def _is_new(db: sqlite3.Connection, path: str) -> bool:
    """Whether the database is new and empty.

    Raises:
        SchedulerStateError: the file is damaged, of another release, or of another program.
    """
    [(sound,)] = db.execute("PRAGMA quick_check(1)")
    if sound != "ok":
        raise sqlite3.DatabaseError(f"malformed: {' '.join(sound.split())}")
    [(version,)] = db.execute("PRAGMA user_version")
    [(tables,)] = db.execute("SELECT count(*) FROM sqlite_master")
    if not version and tables:
        raise SchedulerStateError(path, "is another program's database. Choose another path.")
    if version not in (0, _VERSION):
        raise SchedulerStateError(
            path, f"has version {version}, but this release reads {_VERSION}: upgrade kvcag, or choose another path."
        )
    return not version


@contextlib.contextmanager
def _typed(path: str) -> Iterator[None]:
    """Turn SQLite's errors into a `SchedulerStateError` with advice."""
    try:
        yield
    except sqlite3.Error as error:
        reason = f"cannot be used: {error}."
        if "locked" in str(error) or "busy" in str(error):
            reason = "is in use by another scheduler, or locked by another program. Close that, or choose another path."
        elif "malformed" in str(error) or "not a database" in str(error):
            reason = f"is damaged ({error}). Delete it and its -wal and -shm files: they hold counters, but no caches."
        raise SchedulerStateError(path, reason) from error
