"""How often each text is retrieved and asked, and what was decided about it."""

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
"""The fewest uses in a round, so that the first questions do not count as many rounds."""
_FOUND = 256
_FOUND_S = 60.0
"""A text that stands in a prompt this soon after a retriever found it counts as one use."""
_COUNTED = ("retrieved", "asked", "reused_tokens", "encoded_tokens")
_DECIDED = ("promoted", "kept", "found", "passed", "demoted", "dropped", "gone", "failed")
_PROMPT = "prompt"
"""The row of the state that says how the last prompt looked."""


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
        text: as it stands in prompts if `asked`, else as a retriever found it.
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


class _Found(NamedTuple):
    """A text that a retriever found, and that may stand in a prompt soon."""

    digest: str
    text: str
    at: float


class Texts:
    """The texts that are retrieved and asked, counted in memory.

    Counting takes microseconds and touches no disk; `save` writes what changed, in one transaction. Thread-safe.

    Args:
        path: the file in which they are saved. None: they are not saved.
        model: the digest of the model's fingerprint. Token ids of another model are not loaded.

    Attributes:
        known: digest → stats.
        totals: what was counted and decided since this object was made, by its name in `CacheScheduler.metrics`.
        shown_as: the digest of a text as retrievers find it → its digest as prompts show it, where the two differ.
        head_ids: the tokens before the documents in the last prompt; None until a prompt was seen.
        ending: what prompts add to the end of a retrieved text; None if they show retrieved texts in another form.
        now: the current moment, in rounds.

    Raises:
        SchedulerStateError: the file is damaged, in use by another scheduler, or not a scheduler's.
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
        """The stats of a text; empty ones if it is unknown."""
        return self.known.get(digest) or TextStats()

    # --- counting ----------------------------------------------------------------------------------------------

    def add(self, name: str, amount: int) -> None:
        """Raise a total."""
        with self.lock:
            self.totals[name] += amount

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
            self._found.append(_Found(digest, text, time.monotonic()))
            self.totals["retrieved"] += 1

    def asked(self, prompt: Prompt) -> None:
        """Count the documents of a prompt, and learn from it how prompts show what retrievers find."""
        if not prompt.documents:  # token ids alone say nothing of the texts
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
        """Remember a text that has a cache. This does not count as a use."""
        with self.lock:
            digest = digest_of(text)
            stats = self.known.setdefault(digest, TextStats(tokens, text, last=self.now))
            stats.id = id
            own = {source for source in sources if digest_of(source) == digest}
            stats.sources = sorted({*stats.sources, *sources} - own)
            self._fresh.add(digest)

    def decide(self, digest: str, action: str, reason: str) -> None:
        """Count a decision, and note it where the text is known."""
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
        """What a retriever found a moment ago: a text by its digest, or one within another. Its use was counted."""
        earliest = time.monotonic() - _FOUND_S
        for found in self._found:
            if found.at >= earliest and (found.digest == digest or found.text.strip() in within):
                self._found.remove(found)
                return found
        return None

    def _replace_within(self, digest: str, text: str) -> bool:
        """Let `text` take over the uses and identities of a retrieved text that it contains. Whether it has one."""
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
        """Forget texts; the next `save` deletes them from the file."""
        with self.lock:
            gone = set(digests)
            for digest in gone & self.known.keys():
                for identity in self.known.pop(digest).identities:
                    del self._identities[identity]
            self.shown_as = {found: shown for found, shown in self.shown_as.items() if shown not in gone}
            self._found = deque((one for one in self._found if one.digest not in gone), _FOUND)
            self._fresh |= gone

    def forget_coldest(self, remember: int, cached: set[str]) -> None:
        """Forget the texts that were not used for longest until `remember` are left; never one in `cached`."""
        with self.lock:
            if (excess := len(self.known) - remember) > 0:
                self.forget(sorted(self.known.keys() - cached, key=lambda digest: self.known[digest].last)[:excess])

    def purge(self, sources: set[str], digests: Iterable[str] = ()) -> set[str]:
        """Forget the texts that are one of `sources` or name one as their source, and `digests`. No trace stays.

        Returns the digests of all of them.
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
        """Write what changed.

        Raises:
            SchedulerStateError: it cannot be written. The next `save` writes it.
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
        """Let another scheduler open the file."""
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
    """The texts in a scheduler's state, those with the latest decisions last. The scheduler may be running.

    Raises:
        InvalidInputError: there is no such file.
        SchedulerStateError: it is not a scheduler's, or damaged.
    """
    texts = [TextStats(**row) for digest, row in read_rows(path).items() if digest != _PROMPT]
    return sorted(texts, key=lambda stats: stats.at)
