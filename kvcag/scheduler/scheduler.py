"""CacheScheduler: counts retrievals and questions, and encodes hot texts while the model is idle."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

from typing_extensions import Self

from kvcag.chat_template import SEPARATOR, Prompt
from kvcag.concurrency import CANCELLATION, Cancellation, Cancelled
from kvcag.core import KVCacheItem
from kvcag.documents import documents_of, text_and_metadata
from kvcag.engines.hf import HFEngine
from kvcag.errors import (
    ContextLengthError,
    EmptyPromptError,
    InvalidInputError,
    UnknownItemError,
    UnsupportedModelError,
)
from kvcag.memory import KVCacheMemory
from kvcag.scheduler.store import Policy, ScheduledStore, gdsf, logger
from kvcag.scheduler.texts import Texts, TextStats, digest_of

_MARGIN = 1.25
"""A text is encoded ahead only if it is worth this many times more than each cache that it evicts. Without a margin,
two texts that are used equally often would evict each other forever."""
_TRIES = 8
"""A pass ends after this many texts that are not worth their bytes, since all further texts are worth less."""
_SCORED_AT_ONCE = 512
_HOT = 2
"""The number of uses after which a text is encoded ahead. Most texts are used only once."""
_REMEMBERED = 100_000
"""The maximum number of counted texts. Above it, the coldest texts without a cache are forgotten."""


class PassReport(NamedTuple):
    """The result of one pass: the ids of the caches that it encoded, evicted and dropped as outdated."""

    promoted: list[str]
    demoted: list[str]
    dropped: list[str]


def identity_of(document: object) -> str | None:
    """A document's own id (LangChain's `Document.id`, LlamaIndex's `node_id`); None if it has none."""
    found = getattr(document, "id", None) or getattr(document, "node_id", None)
    return found if isinstance(found, str) and found else None


class CacheScheduler:
    """Encodes hot texts ahead of questions, and keeps a memory's caches within a byte budget.

    The scheduler counts which texts are retrieved (LangChain's and LlamaIndex's handlers call `observe`) and which
    texts stand in the memory's prompts. A background thread encodes hot texts while no question is being answered. The
    scheduler replaces the memory's store by one with the budget, and `close` restores the store. Thread-safe.

    The logger `kvcag.scheduler` logs all decisions; `why` explains the last decision about a text.

    ```python
    scheduler = CacheScheduler(llm.memory(), budget_bytes=2 << 30, state="scheduler.sqlite")
    chain.invoke({"input": question}, config={"callbacks": [SchedulerCallback(scheduler)]})
    ```

    Args:
        memory: the memory whose caches are scheduled.
        budget_bytes: the budget for keys and values, in bytes.
        policy: computes the worth of a cache per byte.
        state: a SQLite file that stores counters and texts across restarts. None: they are in memory only.
        every_s: the time between passes, in seconds, if no question comes. None starts no thread: only `run_once`
            makes passes.
        quiet_s: the time without a question, in seconds, before encoding ahead starts or continues.
        identity: returns the identity of a document. If a document with another text but the same identity is observed,
            the new text replaces the old one, and the old text's cache is deleted.

    Raises:
        InvalidInputError: the budget is not positive, or the memory already has a scheduler.
        SchedulerStateError: `state` is damaged, in use by another scheduler, or not a scheduler's database.
        UnsupportedModelError: the memory's engine does not give access to its caches.
    """

    def __init__(
        self,
        memory: KVCacheMemory,
        budget_bytes: int,
        *,
        policy: Policy = gdsf,
        state: str | os.PathLike[str] | None = None,
        every_s: float | None = 30.0,
        quiet_s: float = 0.25,
        identity: Callable[[Any], str | None] = identity_of,
    ) -> None:
        if budget_bytes <= 0:
            raise InvalidInputError(f"budget_bytes is {budget_bytes}: it must be more than 0")
        if isinstance(memory.store, ScheduledStore):
            raise InvalidInputError("the memory already has a scheduler: close that one first")
        if not memory.engine.merges:
            raise UnsupportedModelError(
                f"{type(memory.engine).__name__} does not give access to its caches, so they cannot be scheduled. Use "
                "an HFEngine."
            )
        self.memory, self.every_s, self.identity = memory, every_s, identity
        self._engine = cast("HFEngine", memory.engine)
        self._quiet_s = quiet_s
        self._texts = Texts(state, self._engine.fingerprint.digest)
        self._store = ScheduledStore(memory.store, budget_bytes, policy, self._texts, self._engine)
        self._stop, self._wake, self._passing = Cancellation(), threading.Event(), threading.RLock()
        self._reconciled_at = 0.0
        self._tidy(reconcile=True)
        memory.store = self._store
        memory.watchers.append(self._asked)
        atexit.register(self.close)  # stop the thread before the interpreter shuts down modules that the thread needs
        self._thread = threading.Thread(target=self._work, name="kvcag-scheduler", daemon=True)
        if every_s is not None:
            self._thread.start()

    # --- watching ----------------------------------------------------------------------------------------------

    def observe(self, documents: object) -> None:
        """Count the documents that a retriever found. Takes microseconds and never waits.

        Args:
            documents: one or several documents as `KVCacheMemory.from_textual_memory` takes them: a str, a LangChain
                `Document` or a LlamaIndex node.

        Raises:
            InvalidInputError: a document has no text. No document was counted.
        """
        self.step_aside()
        read = [(*text_and_metadata(document), self.identity(document)) for document in documents_of(documents)]
        for text, metadata, identity in read:
            if text.strip():
                self._texts.retrieved(text, identity, metadata)
        self._wake.set()

    def step_aside(self) -> None:
        """Pause encoding ahead at once, because a question comes. LangChain's and LlamaIndex's handlers call this."""
        self._engine.lock.announce(self._quiet_s)

    def _asked(self, prompt: Prompt) -> None:
        self.step_aside()
        self._texts.asked(prompt)
        self._wake.set()

    # --- on demand ---------------------------------------------------------------------------------------------

    def run_once(self) -> PassReport:
        """Make one pass now: delete the caches of changed texts and those over the budget, and encode hot texts.

        Questions still go first. Returns when everything is encoded.
        """
        with self._pass():
            demoted, dropped = self._tidy(reconcile=True)
            return PassReport(self._promote_hot(), demoted, dropped)

    def promote(self, texts: object) -> list[str]:
        """Encode texts now, regardless of their worth, and return the ids of their caches.

        Args:
            texts: one or several documents, as for `observe`, or ids of deleted caches.

        Raises:
            ContextLengthError: a text is longer than the model's context.
            EmptyPromptError: a text is empty.
            StoreFullError: a text's cache is larger than the budget.
            UnknownItemError: no known text had a cache with this id.
        """
        promoted = []
        with self._pass():
            for document in documents_of(texts):
                text, digest = self._find(document)
                text = self._texts.stats(digest).text or text
                if _is_key(text):
                    raise UnknownItemError([text])
                if not text.strip():
                    raise EmptyPromptError("a text is empty: leave it out")
                promoted.append(self._encode(digest, text, "on demand", force=True))
        return [key for key in promoted if key is not None]

    def demote(self, texts: object) -> list[str]:
        """Delete caches, and return their ids. The texts stay known. Texts without a cache are ignored.

        Args:
            texts: one or several texts, or ids of caches.

        Raises:
            InvalidInputError: the scheduler is closed.
        """
        self._check_open()
        digests = {self._find(document)[1] for document in documents_of(texts)}
        with self._store.lock:
            entries = [entry for entry in self._store.entries.values() if entry.digest in digests]
            return self._store.evict(entries, "demoted", "on demand")

    # --- looking -----------------------------------------------------------------------------------------------

    def why(self, text: object) -> TextStats:
        """Explain why a text is or is not cached. `str()` of the result is a sentence.

        Args:
            text: a document as for `observe`, or the id of a cache.

        Raises:
            UnknownItemError: the text was never retrieved, asked or encoded, or was forgotten.
        """
        given, digest = self._find(text)
        if digest not in self._texts.known:
            raise UnknownItemError([given])
        return replace(self._texts.stats(digest))

    def metrics(self) -> dict[str, float]:
        """The scheduler's metrics by name.

        Present values: `documents` (number of counted texts), `caches`, `cached_bytes` (including stored instructions)
        and `budget_bytes`.

        Counts since this object was made: `retrieved` (texts that retrievers found), `asked` (texts in prompts),
        `reused_tokens` (tokens of documents found in the store), `encoded_tokens` (tokens encoded for a question) and
        `hit_rate`, which is reused_tokens / (reused_tokens + encoded_tokens). Also the number of decisions of each kind
        (`TextStats.action`); `failed` also counts failed passes.
        """
        with self._store.lock:
            entries, totals = list(self._store.entries.values()), dict(self._texts.totals)
        reused, tokens = totals["reused_tokens"], totals["reused_tokens"] + totals["encoded_tokens"]
        return {
            "documents": len(self._texts.known),
            "caches": sum(bool(entry.digest) for entry in entries),
            "cached_bytes": sum(entry.bytes for entry in entries),
            "budget_bytes": self._store.budget_bytes,
            "hit_rate": reused / tokens if tokens else 0.0,
            **totals,
        }

    # --- ending ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the thread within the time of one layer, save the counters, and restore the memory's own store."""
        self._stop.cancel()
        self._wake.set()
        atexit.unregister(self.close)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        with self._passing:
            if self._asked not in self.memory.watchers:
                return
            self.memory.watchers.remove(self._asked)
            if self.memory.store is self._store:
                self.memory.store = self._store.inner
            try:
                self._texts.save()
            finally:
                self._texts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- passes ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Run the thread: make a pass after every question, and every `every_s` seconds."""
        while not self._stop.cancelled:
            self._wake.wait(self.every_s)
            self._wake.clear()
            try:
                with self._pass():
                    self._texts.save()  # now, since the following wait may be long
                    self._wait_until_idle()  # the question is answered first
                    self._tidy(reconcile=time.monotonic() - self._reconciled_at >= (self.every_s or 0.0))
                    self._promote_hot()
            except Exception:
                if self._stop.sleep(0.0):  # the scheduler was closed meanwhile
                    return
                logger.exception("a pass of the scheduler failed and will be tried again")
                self._texts.add("failed", 1)
                self._stop.sleep(self.every_s or 0.0)

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """Run one pass at a time, and save its decisions."""
        with self._passing:
            self._check_open()
            outer = CANCELLATION.set(self._stop)
            try:
                yield
                self._texts.save()
            except Cancelled:
                self._check_open()
            finally:
                CANCELLATION.reset(outer)

    def _check_open(self) -> None:
        if self._stop.cancelled:
            raise InvalidInputError("the scheduler is closed: make another one")

    def _wait_until_idle(self) -> None:
        """Wait until no question is being answered or announced.

        Raises:
            Cancelled: the scheduler was closed.
        """
        with self._engine.lock.acquire(background=True):
            self._stop.check()

    def _tidy(self, *, reconcile: bool) -> tuple[list[str], list[str]]:
        """Delete caches of changed texts and caches over the budget. Returns the ids of the demoted and dropped caches.

        Args:
            reconcile: first compare the entries with the store, which may take long.
        """
        with self._store.lock:
            if reconcile:
                self._store.reconcile()
                self._reconciled_at = time.monotonic()
            changed = [e for e in self._store.entries.values() if e.managed and e.digest not in self._texts.known]
            dropped = self._store.evict(changed, "dropped", "its text changed")
            demoted = self._store.evict(self._store.room_for(None) or (), "demoted", "over the budget")
            self._texts.forget_coldest(_REMEMBERED, self._cached())
        return demoted, dropped

    # --- encoding ahead ----------------------------------------------------------------------------------------

    def _promote_hot(self) -> list[str]:
        """Encode texts that are worth more than what they evict, in order of worth. Returns the ids of the caches."""
        promoted: list[str] = []
        tries = _TRIES
        for _, digest in self._candidates():
            text = self._texts.stats(digest).text
            if not text or digest in self._cached():  # forgotten, or encoded for a question meanwhile
                continue
            key = self._encode(digest, text, "hot and not cached", force=False)
            if key is not None:
                promoted.append(key)
            elif not (tries := tries - 1):
                break
        return promoted

    def _candidates(self) -> list[tuple[float, str]]:
        """The worth and the digest of hot texts that are not cached, in descending order of worth.

        If prompts render texts in another form than retrievers return them, a text is left out until a prompt had it.
        """
        found: list[tuple[float, str]] = []
        cached = self._cached()
        shown = self._texts.head_ids is None or self._texts.ending is not None
        for number, (digest, stats) in enumerate(list(self._texts.known.items())):
            if number % _SCORED_AT_ONCE == 0:
                self._wait_until_idle()
            is_hot = stats.count >= _HOT and stats.action != "failed"
            if is_hot and digest not in cached and (shown or stats.asked):
                found.append((self._store.worth(self._store.entry("", digest, stats.tokens)), digest))
        return sorted(found, reverse=True)

    def _encode(self, digest: str, text: str, reason: str, *, force: bool) -> str | None:
        """Encode a text as prompts render it, and store it. Returns the cache's id, or None if it was not stored."""
        stats, head_ids = self._texts.stats(digest), self._texts.head_ids
        ending = SEPARATOR if head_ids is None else self._texts.ending or ""
        if not stats.asked and not text.endswith(ending):
            text += ending
        if head_ids is None:
            head_ids = self._engine.template.instruction_ids(self.memory.instruction)
        token_ids = self._engine.template.encode_text(text)
        stats.tokens = len(token_ids)
        key = self.memory.documents.key(token_ids)
        entry = self._store.entry(key, digest, len(token_ids))
        if self._store.contains(key):
            return key
        if self._store.room_for(entry, margin=_MARGIN, force=force) is None:
            if stats.action != "passed":
                self._store.note("passed", entry, "worth less than what it would evict")
            return None
        self._wait_until_idle()
        with self.memory.documents.keeping(token_ids, text):
            if not force and digest not in self._texts.known:  # the text was deleted before `keeping` began
                return None
            try:
                with self._engine.in_background():
                    item = self.memory.documents.encode(head_ids, token_ids, text)
            except ContextLengthError as error:
                self._store.note("failed", entry, str(error))  # `_candidates` leaves out failed texts
                if force:
                    raise
                return None
            self._wait_until_idle()  # a question that came meanwhile must not wait for the disk
            return key if self._store.keep(cast("KVCacheItem", item), "promoted", reason, force=force) else None

    def _find(self, document: object) -> tuple[str, str]:
        """The given text or id, and the digest of the text as prompts render it; empty for an unknown id."""
        text = text_and_metadata(document)[0]
        if (entry := self._store.entries.get(text)) is not None:
            return text, entry.digest
        if _is_key(text):
            known = list(self._texts.known.items())
            return text, next((digest for digest, stats in known if stats.id == text), "")
        return text, self._texts.shown_as.get(digest_of(text), digest_of(text))

    def _cached(self) -> set[str]:
        """The digests of the texts that are cached."""
        with self._store.lock:
            return {entry.digest for entry in self._store.entries.values()}


def _is_key(text: str) -> bool:
    return text.startswith("kv:sha256:")
