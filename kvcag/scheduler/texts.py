"""Counts of each text's uses, and the last decision about the text."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from kvcag.chat_template import Prompt
from kvcag.contexts import Ids
from kvcag.errors import SchedulerStateError
from kvcag.scheduler.state import StateFile, read_rows
from kvcag.stores.base import says, sources_of

_FAST, _SLOW = 3.0, 20.0
"""Half-lives of the two averages of a text's uses, in rounds."""
_MIN_ROUND = 20
"""The minimum number of uses in a round, so that the first questions do not count as many rounds."""
_FOUND = 256
_FOUND_S = 60.0
"""If a text stands in a prompt within this time after a retriever found it, both together count as one use."""
_COUNTED = ("retrieved", "asked", "reused_tokens", "encoded_tokens")
_DECIDED = ("promoted", "kept", "found", "passed", "demoted", "dropped", "gone", "failed")
_PROMPT = "prompt"
"""The key of the row that records the form of the last prompt."""


def digest_of(text: str) -> str:
    """The SHA-256, in hex, of a text without surrounding white space."""
    return hashlib.sha256(text.strip().encode()).hexdigest()


@dataclass(slots=True)
class TextStats:
    """Statistics of a text, and the last decision about it. `str()` explains why the text is or is not cached.

    Time is counted in rounds: a round is as many uses as there are known texts. So nothing ages while no questions
    come, and a round means the same for a hundred texts as for a hundred thousand.

    Attributes:
        tokens: the number of tokens; an estimate until the text stood in a prompt.
        text: the text as prompts render it if `asked` is True; otherwise as a retriever found it.
        count: the number of uses: retrievals and questions.
        fast: a count of uses that halves every 3 rounds.
        slow: a count of uses that halves every 20 rounds.
        last: the time of the last use, in rounds.
        asked: whether the text stood in a prompt.
        id: the id of the text's cache; empty if it never had one.
        action: the last decision: `promoted` (encoded ahead), `kept` (encoded for a question and stored), `found`
            (already in the store), `passed` (not stored), `demoted` (its cache was deleted), `dropped` (its text
            changed, or the caller deleted it), `gone` (the store evicted it), `failed` (encoding or storing it failed),
            `seen` (no decision yet).
        reason: the reason of the decision.
        at: the time of the decision, in seconds since the epoch; 0 for `seen`.
        sources: the sources that the metadata of its documents name, for `purge`.
        identities: the identities of the documents with this text.
    """

    tokens: int = 0
    text: str = ""
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

    @property
    def is_cached(self) -> bool:
        """Whether the text's cache is stored."""
        return self.action in ("promoted", "kept", "found")

    def __str__(self) -> str:
        when = f" at {datetime.fromtimestamp(self.at):%Y-%m-%d %H:%M:%S}" if self.at else ""
        uses = f"used {self.count} time{'s' * (self.count != 1)}"
        return f"{'cached' if self.is_cached else 'not cached'}: {self.action}{when}; {self.reason}; {uses}"

    def add_use(self, now: float) -> None:
        """Count a use at the time `now`, in rounds."""
        since = now - self.last
        self.count += 1
        self.fast = self.fast * 2 ** (-since / _FAST) + 1
        self.slow = self.slow * 2 ** (-since / _SLOW) + 1
        self.last = now

    def rate(self, now: float) -> float:
        """Expected uses per round: the mean of a fast and a slow moving average, like load averages."""
        since = now - self.last
        return math.log(2) / 2 * (self.fast * 2 ** (-since / _FAST) / _FAST + self.slow * 2 ** (-since / _SLOW) / _SLOW)


class _Found(NamedTuple):
    """A text that a retriever found and that may soon stand in a prompt. `at` is in seconds (`time.monotonic`)."""

    digest: str
    text: str
    at: float


class Texts:
    """Counts in memory which texts are retrieved and asked.

    Counting takes microseconds and does not use the disk; `save` writes all changes in one transaction. Thread-safe.

    Args:
        path: the file for the counts. None: they are not saved.
        model: the digest of the model's fingerprint. Token ids of another model are not loaded.

    Attributes:
        known: the stats of each text, by digest.
        totals: counts and decisions since this object was made, by their names in `CacheScheduler.metrics`.
        shown_as: the digest of a text as prompts render it, by its digest as retrievers find it, if the two differ.
        head_ids: the token ids before the documents in the last prompt; None before the first prompt.
        ending: the text that prompts add to the end of a retrieved text; None if they change retrieved texts otherwise.
        now: the current time, in rounds.

    Raises:
        SchedulerStateError: the file is damaged, in use by another scheduler, or not a scheduler's database.
    """

    def __init__(self, path: str | os.PathLike[str] | None, model: str) -> None:
        self.known: dict[str, TextStats] = {}
        self.totals = dict.fromkeys((*_COUNTED, *_DECIDED), 0)
        self.shown_as: dict[str, str] = {}
        self.head_ids: Ids | None = None
        self.ending: str | None = None
        self.now = 0.0
        self.lock = threading.RLock()
        self._identities: dict[str, str] = {}
        self._found: deque[_Found] = deque(maxlen=_FOUND)
        self._fresh: set[str] = set()
        self._model = model
        self._saving = threading.RLock()
        self._state = None if path is None else StateFile(path)
        if self._state is not None:
            self._load(self._state.rows())

    def stats(self, digest: str) -> TextStats:
        """The stats of a text; new, empty stats if the text is unknown."""
        return self.known.get(digest) or TextStats()

    # --- counting ----------------------------------------------------------------------------------------------

    def add(self, name: str, amount: int) -> None:
        """Add an amount to a total."""
        with self.lock:
            self.totals[name] += amount

    def retrieved(self, text: str, identity: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        """Count a text that a retriever found.

        Args:
            text: the text as the retriever found it.
            identity: the identity of the document. A later text with the same identity replaces this text.
            metadata: the metadata of the document. The sources that it names are remembered for `purge`.
        """
        with self.lock:
            found = digest_of(text)
            digest = self.shown_as.get(found, found)
            stats = self._count(digest, text)
            stats.sources = sorted({*stats.sources, *sources_of(metadata or {})})
            if identity is not None:
                self._identify(identity, digest)
            self._found.append(_Found(digest, text, time.monotonic()))
            self.totals["retrieved"] += 1

    def asked(self, prompt: Prompt) -> None:
        """Count the documents of a prompt, and learn from it how prompts render retrieved texts."""
        if not prompt.documents:  # a prompt of token ids alone has no texts to count
            return
        with self.lock:
            self.totals["asked"] += len(prompt.documents)
            digests = [digest_of(text) for text in prompt.documents]
            retrieved = [self._take(digest) for digest in digests]
            endings: set[str] = set()
            is_rendered = False
            for digest, text, found in zip(digests, prompt.documents, retrieved, strict=True):
                self.shown_as.pop(digest, None)
                if found is not None and digest_of(found.text) == digest:
                    endings.add(text[len(found.text) :])
                elif found is not None or self._replace_within(digest, text):
                    is_rendered = True
                else:
                    self._count(digest, text)
            if is_rendered:
                self.ending = None
            elif endings:
                self.ending = min(endings)
            elif self.head_ids is None:
                first = prompt.documents[0]
                self.ending = first[len(first.rstrip()) :]
            self.head_ids = prompt.head_ids
            for digest, text, ids in zip(digests, prompt.documents, prompt.kept_ids, strict=True):
                stats = self.known.get(digest) or self._count(digest, text)  # a purge may have come in between
                stats.text, stats.asked, stats.tokens = text, True, len(ids)
                self._fresh |= {digest, _PROMPT}

    def encoded(self, text: str, tokens: int, id: str, sources: Iterable[str]) -> None:
        """Remember a text that has a cache. Does not count as a use."""
        with self.lock:
            digest = digest_of(text)
            stats = self.known.setdefault(digest, TextStats(tokens, text, last=self.now))
            stats.id = id
            own = {source for source in sources if digest_of(source) == digest}
            stats.sources = sorted({*stats.sources, *sources} - own)
            self._fresh.add(digest)

    def decide(self, digest: str, action: str, reason: str) -> None:
        """Count a decision, and record it in the text's stats if the text is known."""
        with self.lock:
            self.totals[action] += 1
            stats = self.known.get(digest)
            if stats is not None:
                stats.action, stats.reason, stats.at = action, reason, time.time()
                self._fresh.add(digest)

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
                self.forget({before})
        self._identities[identity] = digest
        self.known[digest].identities.append(identity)

    def _take(self, digest: str, within: str = "") -> _Found | None:
        """Remove and return a text that a retriever found recently: by its digest, or if it is part of `within`.

        Its use was counted already when it was retrieved.
        """
        earliest = time.monotonic() - _FOUND_S
        for found in self._found:
            if found.at >= earliest and (found.digest == digest or found.text.strip() in within):
                self._found.remove(found)
                return found
        return None

    def _replace_within(self, digest: str, text: str) -> bool:
        """If `text` contains a retrieved text, take over the uses and identities of that text, and return True."""
        found = self._take(digest, within=text)
        if found is None:
            return False
        was = self.stats(found.digest)
        if was.asked or digest in self.known:
            stats = self._count(digest, text)
            stats.identities += was.identities
            was.identities = []
        else:
            stats = self.known[digest] = was
        if not was.asked:
            self.known.pop(found.digest, None)
        self._fresh |= {found.digest, digest}
        self._identities |= dict.fromkeys(stats.identities, digest)
        self.shown_as[found.digest] = digest
        return True

    # --- forgetting --------------------------------------------------------------------------------------------

    def forget(self, digests: Iterable[str]) -> None:
        """Forget texts. The next `save` deletes them from the file."""
        with self.lock:
            gone = set(digests)
            for digest in gone & self.known.keys():
                for identity in self.known.pop(digest).identities:
                    del self._identities[identity]
            self.shown_as = {found: shown for found, shown in self.shown_as.items() if shown not in gone}
            self._found = deque((one for one in self._found if one.digest not in gone), _FOUND)
            self._fresh |= gone

    def forget_coldest(self, remember: int, cached: set[str]) -> None:
        """Forget the least recently used texts until `remember` are left. Never forgets a text in `cached`."""
        with self.lock:
            if (excess := len(self.known) - remember) > 0:
                self.forget(sorted(self.known.keys() - cached, key=lambda digest: self.known[digest].last)[:excess])

    def purge(self, sources: set[str], digests: Iterable[str] = ()) -> set[str]:
        """Forget texts and every trace of them, also in the file, and return their digests.

        Args:
            sources: forget texts that equal or contain one of these, or whose documents name one as their source.
            digests: also forget the texts with these digests.

        Raises:
            SchedulerStateError: the file cannot be written.
        """
        with self._saving:
            with self.lock:
                own = {digest_of(source) for source in sources}
                purged = {*own, *(self.shown_as.get(digest, digest) for digest in own), *digests}
                purged |= {
                    digest
                    for digest, stats in self.known.items()
                    if not sources.isdisjoint(stats.sources) or any(says(stats.text, source) for source in sources)
                }
                self.forget(purged)
            self.save()
        return purged

    # --- the file ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write all changes to the file.

        Raises:
            SchedulerStateError: the file cannot be written. The next `save` tries again.
        """
        with self._saving:  # from reading to writing: otherwise a text that is purged in between would come back
            with self.lock:
                fresh, self._fresh = self._fresh, set()
                rows: dict[str, Any] = {digest: asdict(self.known[digest]) for digest in fresh & self.known.keys()}
                gone = fresh - self.known.keys() - {_PROMPT}
                if _PROMPT in fresh:
                    rows[_PROMPT] = [self._model, self.head_ids, self.ending]
            try:
                if fresh and self._state is not None:
                    self._state.write(rows, gone)
            except SchedulerStateError:
                with self.lock:
                    self._fresh |= fresh
                raise

    def close(self) -> None:
        """Close the file, so that another scheduler can open it."""
        with self._saving:
            if self._state is not None:
                self._state.close()

    def _load(self, rows: dict[str, Any]) -> None:
        model, head_ids, ending = rows.pop(_PROMPT, ("", None, None))
        if model == self._model:
            self.head_ids, self.ending = tuple(head_ids), ending
        self.known = {digest: TextStats(**row) for digest, row in rows.items()}
        for digest, stats in self.known.items():
            self._identities |= dict.fromkeys(stats.identities, digest)
            self.now = max(self.now, stats.last)


def read_texts(path: str | os.PathLike[str]) -> list[TextStats]:
    """The texts in a scheduler's state file, in order of their last decisions. The scheduler may be running.

    Raises:
        InvalidInputError: the file does not exist.
        SchedulerStateError: the file is damaged, or not a scheduler's database.
    """
    texts = [TextStats(**row) for digest, row in read_rows(path).items() if digest != _PROMPT]
    return sorted(texts, key=lambda stats: stats.at)
