"""How often each text is retrieved and asked, and what was decided about it: counters in one SQLite table."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from kvcag.chat_template import Prompt
from kvcag.contexts import Ids
from kvcag.errors import InvalidInputError, SchedulerStateError
from kvcag.stores.base import MADE_OF, SOURCE_FIELDS
from kvcag.stores.files import make_private, unavailable

_FAST, _SLOW = 3.0, 20.0
"""Half-lives of the two averages of a text's uses, in rounds."""
_MIN_ROUND = 20
"""The fewest uses in a round, so that the first questions do not count as many rounds."""
_PENDING = 64
_PENDING_S = 60.0
"""A text that stands in a prompt this soon after a retriever found it counts as one use."""

_VERSION = 2
_TABLE = "CREATE TABLE texts(digest TEXT PRIMARY KEY, text TEXT, stats TEXT)"
_SAVE = (
    "INSERT INTO texts VALUES (?, ?, ?) "
    "ON CONFLICT(digest) DO UPDATE SET text = coalesce(excluded.text, text), stats = excluded.stats"
)
_DELETE_IT = "Delete it and its -wal and -shm files to begin again: it holds counters and texts, and no caches."


def digest_of(text: str) -> str:
    """SHA-256, in hex, of a text without the white space around it."""
    return hashlib.sha256(text.strip().encode()).hexdigest()


@dataclass(slots=True)
class TextStats:
    """What is known of a text. `str()` of it is a sentence that explains why the text is or is not cached.

    Moments are counted in rounds: a round is as many uses as there are known texts. So nothing ages while no questions
    come, and a round means the same for a hundred texts as for a hundred thousand.

    Attributes:
        tokens: its length; estimated until it has stood in a prompt.
        text: as it stands in prompts if `asked`, else as a retriever found it. None in memory once it is saved.
        count: how often it was retrieved or asked.
        fast: uses, of which half are forgotten every 3 rounds.
        slow: uses, of which half are forgotten every 20 rounds.
        last: the moment of the last use.
        asked: whether it has stood in a prompt.
        id: the id of its cache; empty if it never had one.
        action: the last decision: `promoted` (encoded ahead), `kept` (encoded for a question and stored), `found`
            (already in the store), `passed` (not stored), `demoted` (its cache was deleted), `dropped` (its text
            changed, or the caller deleted it), `gone` (the store evicted it), `failed` (encoding or storing it failed),
            `seen` (nothing yet).
        reason: why.
        at: when, in seconds since the epoch; 0 for `seen`.
        sources: what its documents' metadata name as their sources, for `purge`.
        identities: which documents have this text.
        found_as: digests of the texts that retrievers find and prompts show as this one.
    """

    tokens: int = 0
    text: str | None = None
    count: int = 0
    fast: float = 0.0
    slow: float = 0.0
    last: float = 0.0
    asked: bool = False
    id: str = ""
    action: str = "seen"
    reason: str = "it has not been encoded"
    at: float = 0.0
    sources: list[str] = field(default_factory=list)
    identities: list[str] = field(default_factory=list)
    found_as: list[str] = field(default_factory=list)

    @property
    def is_cached(self) -> bool:
        """Whether its cache is stored."""
        return self.action in ("promoted", "kept", "found")

    def __str__(self) -> str:
        when = f" at {datetime.fromtimestamp(self.at):%Y-%m-%d %H:%M:%S}" if self.at else ""
        uses = f"used {self.count} time{'s' * (self.count != 1)}"
        return f"{'cached' if self.is_cached else 'not cached'}: {self.action}{when}; {self.reason}; {uses}"

    def add_use(self, now: float) -> None:
        """Count a use at the moment `now`."""
        since = now - self.last
        self.count += 1
        self.fast = self.fast * 2 ** (-since / _FAST) + 1
        self.slow = self.slow * 2 ** (-since / _SLOW) + 1
        self.last = now

    def rate(self, now: float) -> float:
        """Expected uses per round: the mean of a quick and a steady average, as load averages are."""
        since = now - self.last
        return math.log(2) / 2 * (self.fast * 2 ** (-since / _FAST) / _FAST + self.slow * 2 ** (-since / _SLOW) / _SLOW)


@dataclass(slots=True)
class _Pending:
    """A text that a retriever found, and that may stand in a prompt soon."""

    text: str
    times: int
    at: float


class Texts:
    """The texts that are retrieved and asked, counted in memory and saved to one SQLite table.

    Counting takes microseconds and touches no disk; `save` writes what changed, in one transaction. Thread-safe.

    Args:
        path: the database, created if it is missing, readable by this user alone. None: in memory.
        model: the digest of the model's fingerprint. Token ids of another model are not loaded.

    Attributes:
        known: digest → stats.
        shown_as: the digest of a text as retrievers find it → its digest as prompts show it, where the two differ.
        head_ids: the tokens before the documents in the last prompt; None until a prompt was seen.
        ending: what prompts add to the end of a retrieved text; None if they show retrieved texts in another form.
        now: the current moment, in rounds.
        changed: digests of texts that another text has replaced.

    Raises:
        SchedulerStateError: the database is damaged, in use by another scheduler, or not a scheduler's.
    """

    def __init__(self, path: str | os.PathLike[str] | None, model: str) -> None:
        self.path = "in memory" if path is None else os.fspath(path)
        self.known: dict[str, TextStats] = {}
        self.shown_as: dict[str, str] = {}
        self.head_ids: Ids | None = None
        self.ending: str | None = None
        self.now = 0.0
        self.changed: list[str] = []
        self.lock = threading.RLock()
        self._identities: dict[str, str] = {}
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._fresh: set[str] = set()
        self._model = model
        self._db_lock = threading.RLock()
        self._owner: sqlite3.Connection | None = None
        self._db: sqlite3.Connection | None = None
        try:
            self._open(path)
            self._load()
        except BaseException:
            self.close()
            raise

    # --- counting ----------------------------------------------------------------------------------------------

    def stats(self, digest: str) -> TextStats:
        """The stats of a text; empty ones if it is unknown."""
        return self.known.get(digest) or TextStats()

    def retrieved(self, text: str, identity: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        """Count a text that a retriever found.

        Args:
            text: as it was found.
            identity: what identifies the document. Another text with the same identity replaces this one.
            metadata: the document's; the sources that it names are remembered for `purge`.
        """
        with self.lock:
            found = digest_of(text)
            digest = self.shown_as.get(found, found)
            stats = self._count(digest, text)
            stats.sources = sorted({*stats.sources, *sources_of(metadata or {})})
            if identity is not None:
                self._identify(identity, digest)
            times = self._pending.pop(digest).times if digest in self._pending else 0
            self._pending[digest] = _Pending(text, times + 1, time.monotonic())
            if len(self._pending) > _PENDING:
                self._pending.popitem(last=False)

    def asked(self, prompt: Prompt) -> None:
        """Count the documents of a prompt, and learn from it how prompts show what retrievers find."""
        if not prompt.documents:  # token ids alone say nothing of the texts
            return
        with self.lock:
            digests = [digest_of(text) for text in prompt.documents]
            retrieved = [self._take_pending(digest) for digest in digests]
            endings: set[str] = set()
            rendered = False
            for digest, text, found in zip(digests, prompt.documents, retrieved, strict=True):
                self.shown_as.pop(digest, None)
                if found is not None and digest_of(found) == digest:
                    endings.add(text[len(found) :])
                elif found is not None or self._replace_pending_within(digest, text):
                    rendered = True
                else:
                    self._count(digest, text)
            if rendered:
                self.ending = None
            elif endings:
                self.ending = min(endings)
            elif self.head_ids is None:
                first = prompt.documents[0]
                self.ending = first[len(first.rstrip()) :]
            moved, self.head_ids = self.head_ids != prompt.head_ids, prompt.head_ids
            for digest, text, ids in zip(digests, prompt.documents, prompt.document_ids, strict=True):
                stats = self.known.get(digest) or self._count(digest, text)  # a purge may have come in between
                if moved or not stats.asked or stats.text is not None:
                    stats.text = text
                stats.asked, stats.tokens = True, len(ids)
                self._fresh.add(digest)

    def encoded(self, text: str, tokens: int, id: str, sources: Iterable[str]) -> None:
        """Remember a text whose cache is stored. This does not count as a use."""
        with self.lock:
            digest = digest_of(text)
            stats = self.known.setdefault(digest, TextStats(tokens, text, last=self.now))
            stats.id = id
            own = {source for source in sources if digest_of(source) == digest}
            stats.sources = sorted({*stats.sources, *sources} - own)
            self._fresh.add(digest)

    def decide(self, digest: str, action: str, reason: str) -> None:
        """Note a decision about a text, if it is known."""
        with self.lock:
            stats = self.known.get(digest)
            if stats is not None and (stats.action, stats.reason) != (action, reason):
                stats.action, stats.reason, stats.at = action, reason, time.time()
                self._fresh.add(digest)

    def take_changed(self) -> list[str]:
        """Forget the texts that another text has replaced, and return their digests."""
        with self.lock:
            changed = [digest for digest in self.changed if not self.stats(digest).identities]
            self.changed = []
            for digest in changed:
                self.forget(digest)
            return changed

    def forget_coldest(self, remember: int, cached: set[str]) -> None:
        """Forget the texts that were not used for longest until `remember` are left; never one in `cached`."""
        with self.lock:
            excess = len(self.known) - remember
            if excess > 0:
                cold = sorted((stats.last, digest) for digest, stats in self.known.items() if digest not in cached)
                for _, digest in cold[:excess]:
                    self.forget(digest)

    def forget(self, digest: str) -> None:
        """Forget a text; the next `save` deletes it from the database."""
        with self.lock:
            stats = self.known.pop(digest, TextStats())
            self._pending.pop(digest, None)
            self._fresh.add(digest)
            for identity in stats.identities:
                del self._identities[identity]
            for found in stats.found_as:
                if self.shown_as.get(found) == digest:
                    del self.shown_as[found]

    def purge(self, source: str, digests: Iterable[str] = ()) -> set[str]:
        """Delete every trace of the texts that are `source` or name it as their source, and of `digests`.

        Returns the digests of all of them.
        """
        with self._db_lock:
            with self.lock:
                own = digest_of(source)
                purged = {own, self.shown_as.get(own, own), *digests}
                purged |= {digest for digest, stats in self.known.items() if source in stats.sources}
                for digest in purged:
                    self.forget(digest)
            self.save()
            with self._reading() as db:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # no copy stays in the write-ahead log
        return purged

    def _count(self, digest: str, text: str) -> TextStats:
        stats = self.known.get(digest)
        if stats is None:
            stats = self.known[digest] = TextStats(len(text) // 4 + 1, text, last=self.now)
        self.now += 1 / max(len(self.known), _MIN_ROUND)
        stats.add_use(self.now)
        self._fresh.add(digest)
        return stats

    def _identify(self, identity: str, digest: str) -> None:
        before = self._identities.get(identity)
        if before == digest:
            return
        if before is not None:
            self.known[before].identities.remove(identity)
            self._fresh.add(before)
            if not self.known[before].identities:
                self.changed.append(before)
        self._identities[identity] = digest
        self.known[digest].identities.append(identity)

    def _take_pending(self, digest: str) -> str | None:
        """The text as a retriever found it a moment ago, or None. Its use has been counted."""
        pending = self._pending.get(digest)
        if pending is None or time.monotonic() - pending.at > _PENDING_S:
            return None
        pending.times -= 1
        if not pending.times:
            del self._pending[digest]
        return pending.text

    def _replace_pending_within(self, digest: str, text: str) -> bool:
        """Whether `text` contains one that was retrieved a moment ago. Prompts show that one as `text`."""
        earliest = time.monotonic() - _PENDING_S
        for found, pending in self._pending.items():
            inner = pending.text.strip()
            if pending.at >= earliest and inner and inner in text:
                self._replace(found, digest, text)
                return True
        return False

    def _replace(self, found: str, digest: str, text: str) -> None:
        """Let `text` take over the uses, sources and identities of a retrieved text."""
        self._take_pending(found)
        was = self.known.get(found, TextStats())
        if was.asked or digest in self.known or found not in self.known:
            stats = self._count(digest, text)
            stats.identities += was.identities
            was.identities = []
            if not was.asked:
                self.known.pop(found, None)
        else:
            stats = self.known[digest] = self.known.pop(found)
            stats.text = text
        self._fresh |= {found, digest}
        self._identities |= dict.fromkeys(stats.identities, digest)
        self.shown_as[found] = digest
        stats.found_as = sorted({*stats.found_as, found})

    # --- the database ------------------------------------------------------------------------------------------

    def text(self, digest: str) -> str | None:
        """A text, from memory or from the database."""
        stats = self.known.get(digest)
        if stats is None or stats.text is not None:
            return None if stats is None else stats.text
        with self._reading() as db:
            found = db.execute("SELECT text FROM texts WHERE digest = ?", (digest,)).fetchone()
        return None if found is None else found[0]

    def save(self) -> None:
        """Write what changed, in one transaction.

        Raises:
            SchedulerStateError: it cannot be written. The next `save` writes it.
        """
        with self._db_lock:  # from reading to writing: otherwise a text that is purged in between would come back
            with self.lock:
                fresh, self._fresh = self._fresh, set()
                rows = [self._row(digest) for digest in fresh & self.known.keys()]
                gone = [(digest,) for digest in fresh - self.known.keys()]
            if not fresh:
                return
            try:
                with self._writing() as db:
                    db.executemany(_SAVE, rows)
                    db.executemany("DELETE FROM texts WHERE digest = ?", gone)
            except SchedulerStateError:
                with self.lock:
                    self._fresh |= fresh
                raise
            with self.lock:
                for digest in (fresh & self.known.keys()) - self._fresh:
                    self.known[digest].text = None

    def close(self) -> None:
        """Close the database, which lets another scheduler open it."""
        with self._db_lock:
            for connection in (self._db, self._owner):
                if connection is not None:
                    connection.close()
            self._db = self._owner = None

    def _row(self, digest: str) -> tuple[str, str | None, str]:
        stats = self.known[digest]
        saved = asdict(stats) | {"prompt": [self._model, self.head_ids, self.ending] if stats.asked else None}
        return digest, saved.pop("text"), json.dumps(saved)

    def _load(self) -> None:
        with self._reading() as db:
            rows = [(digest, json.loads(saved)) for digest, saved in db.execute("SELECT digest, stats FROM texts")]
        for digest, saved in sorted(rows, key=lambda row: row[1]["last"]):
            prompt = saved.pop("prompt")
            stats = self.known[digest] = TextStats(**saved)
            self._identities |= dict.fromkeys(stats.identities, digest)
            self.shown_as |= dict.fromkeys(stats.found_as, digest)
            self.now = stats.last
            if prompt and prompt[0] == self._model:
                self.head_ids, self.ending = tuple(prompt[1]), prompt[2]

    def _open(self, path: str | os.PathLike[str] | None) -> None:
        if path is None:
            self._db = db = _connect(":memory:", timeout=0)
        else:
            file = Path(path)
            with unavailable(file):
                make_private(file.absolute().parent)
                os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
            with _typed(self.path):
                self._owner = _connect(f"{self.path}.owner", timeout=0)
                self._owner.execute("BEGIN EXCLUSIVE")  # until this process closes it or ends
                self._db = db = _connect(self.path, timeout=5)
        with _typed(self.path):
            [(sound,)] = db.execute("PRAGMA quick_check(1)")
            if sound != "ok":
                raise SchedulerStateError(self.path, f"is damaged ({' '.join(sound.split())}). {_DELETE_IT}")
            [(version,)] = db.execute("PRAGMA user_version")
            if version:
                _check_version(self.path, version)
            elif db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise SchedulerStateError(self.path, "is another program's database. Choose another path.")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA secure_delete = ON")
            if not version:
                db.executescript(f"BEGIN; {_TABLE}; PRAGMA user_version = {_VERSION}; COMMIT;")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._db_lock, _typed(self.path):
            if self._db is None:
                raise SchedulerStateError(self.path, "is closed, as its scheduler is. Make another scheduler.")
            yield self._db

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # some errors, such as a full disk, have ended it already
                    db.execute("ROLLBACK")
                raise


def sources_of(metadata: Mapping[str, Any]) -> set[str]:
    """What a document's or an item's metadata names as its sources."""
    sources = {str(metadata[name]) for name in SOURCE_FIELDS if metadata.get(name)}
    return sources | {str(source) for source in metadata.get(MADE_OF, ())}


def read_texts(path: str | os.PathLike[str]) -> list[TextStats]:
    """The texts in a scheduler's database, those with the latest decisions last. The scheduler may be running.

    Raises:
        InvalidInputError: there is no such file.
        SchedulerStateError: it is not a scheduler's database, or damaged.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise InvalidInputError(f"there is no file {name}: pass the path that CacheScheduler has as state=")
    uri = f"{Path(path).absolute().as_uri()}?mode=ro"
    with _typed(name), contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        _check_version(name, db.execute("PRAGMA user_version").fetchone()[0])
        rows = [(text, json.loads(saved)) for text, saved in db.execute("SELECT text, stats FROM texts")]
    texts = [TextStats(text=text, **{k: v for k, v in saved.items() if k != "prompt"}) for text, saved in rows]
    return sorted(texts, key=lambda stats: stats.at)


@contextlib.contextmanager
def _typed(path: str) -> Iterator[None]:
    """Turn SQLite's errors into a `SchedulerStateError` that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        message = str(error)
        if "locked" in message or "busy" in message:
            reason = "is in use by another scheduler, or locked by another program. Close that, or choose another path."
        elif "malformed" in message or "not a database" in message:
            reason = f"is damaged ({message}). {_DELETE_IT}"
        else:
            reason = f"cannot be used: {message}."
        raise SchedulerStateError(path, reason) from error


def _check_version(path: str, version: int) -> None:
    if version == 0:
        raise SchedulerStateError(path, "is not a scheduler's database. Pass the path that CacheScheduler has.")
    if version != _VERSION:
        raise SchedulerStateError(
            path, f"has version {version}, and this release reads {_VERSION}: upgrade kvcag, or choose another path."
        )


def _connect(path: str, timeout: float) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=timeout, check_same_thread=False, isolation_level=None)
