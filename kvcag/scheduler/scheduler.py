"""CacheScheduler: watches what is retrieved and asked, and encodes hot texts while the model is idle."""

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
"""How many times more a text must be worth than each cache that it evicts, to be encoded ahead. Without a margin, two
texts that are used equally often would evict each other forever."""
_TRIES = 8
"""Texts that are not worth their room before a pass ends: those that follow are worth less."""
_SCORED_AT_ONCE = 512
_HOT = 2
"""Uses after which a text is encoded ahead: most texts are used once."""
_REMEMBERED = 100_000
"""Texts that are counted. The coldest ones without a cache are forgotten."""


class PassReport(NamedTuple):
    """The result of one pass: the ids of the caches."""

    promoted: list[str]
    demoted: list[str]
    dropped: list[str]


def identity_of(document: object) -> str | None:
    """A document's own id, or None: LangChain's `Document.id`, LlamaIndex's `node_id`."""
    found = getattr(document, "id", None) or getattr(document, "node_id", None)
    return found if isinstance(found, str) and found else None


class CacheScheduler:
    """Encodes hot texts ahead of questions, and keeps a memory's caches within a byte budget.

    It counts which texts are retrieved (`observe`, called by LangChain's and LlamaIndex's handlers) and which are asked
    (it watches the memory's prompts). A background thread encodes hot texts while no question is being answered.
    The memory's store is replaced by one with the budget; `close` restores it. Thread-safe.

    Decisions are logged by `logging`, as `kvcag.scheduler`; `why` explains the last one about a text.

    ```python
    scheduler = CacheScheduler(llm.memory(), budget_bytes=2 << 30, state="scheduler.sqlite")
    chain.invoke({"input": question}, config={"callbacks": [SchedulerCallback(scheduler)]})
    ```

    Args:
        memory: the memory whose caches are scheduled.
        budget_bytes: the most that keys and values may take.
        policy: what a cache is worth per byte.
        state: a SQLite file that keeps counters and texts over a restart. None keeps them in memory.
        every_s: seconds after which a pass runs although nothing was asked. None starts no thread: only `run_once`
            makes passes.
        quiet_s: seconds without a question before encoding ahead starts or goes on.
        identity: what identifies a document. Another text with the same identity replaces it, and its cache is deleted.

    Raises:
        InvalidInputError: the budget is not positive, or the memory already has a scheduler.
        SchedulerStateError: `state` is damaged, in use by another scheduler, or not a scheduler's database.
        UnsupportedModelError: the memory's engine does not give out its caches.
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
                f"{type(memory.engine).__name__} does not give out its caches, so there is nothing to schedule: use an "
                "HFEngine."
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
        atexit.register(self.close)  # before the interpreter shuts down what the thread needs
        self._thread = threading.Thread(target=self._work, name="kvcag-scheduler", daemon=True)
        if every_s is not None:
            self._thread.start()

    # --- watching ----------------------------------------------------------------------------------------------

    def observe(self, documents: object) -> None:
        """Count what a retriever found. Takes microseconds and never waits.

        Args:
            documents: one or several of what `KVCacheMemory.from_textual_memory` takes: str, LangChain `Document`,
                LlamaIndex node.

        Raises:
            InvalidInputError: one of them has no text. None was counted.
        """
        self.step_aside()
        read = [(*text_and_metadata(document), self.identity(document)) for document in documents_of(documents)]
        for text, metadata, identity in read:
            if text.strip():
                self._texts.retrieved(text, identity, metadata)
        self._wake.set()

    def step_aside(self) -> None:
        """Announce a question: encoding ahead pauses at once. LangChain's and LlamaIndex's handlers call this."""
        self._engine.lock.announce(self._quiet_s)

    def _asked(self, prompt: Prompt) -> None:
        self.step_aside()
        self._texts.asked(prompt)
        self._wake.set()

    # --- on demand ---------------------------------------------------------------------------------------------

    def run_once(self) -> PassReport:
        """Make one pass now: delete the caches of changed texts and what is over the budget, and encode the hot ones.

        Questions go first here too. It returns when everything is encoded.
        """
        with self._pass():
            demoted, dropped = self._tidy(reconcile=True)
            return PassReport(self._promote_hot(), demoted, dropped)

    def promote(self, texts: object) -> list[str]:
        """Encode texts now, whatever they are worth, and return the ids of their caches.

        Args:
            texts: one or several of what `observe` takes, or ids of caches that were deleted since.

        Raises:
            ContextLengthError: a text is longer than the model's context.
            EmptyPromptError: a text is empty.
            StoreFullError: a text's cache is larger than the budget.
            UnknownItemError: no text is known that had a cache with this id.
        """
        promoted = []
        with self._pass():
            for document in documents_of(texts):
                text, digest = self._find(document)
                text = self._texts.stats(digest).text or text
                if _is_key(text):
                    raise UnknownItemError([text])
                if not text.strip():
                    raise EmptyPromptError("a text is empty: there is nothing to encode")
                promoted.append(self._encode(digest, text, "on demand", force=True))
        return [key for key in promoted if key is not None]

    def demote(self, texts: object) -> list[str]:
        """Delete caches and return their ids. The texts stay known; what is not cached is ignored.

        Args:
            texts: one or several texts, or ids of caches.
        """
        self._check_open()
        digests = {self._find(document)[1] for document in documents_of(texts)}
        with self._store.lock:
            entries = [entry for entry in self._store.entries.values() if entry.digest in digests]
            return self._store.evict(entries, "demoted", "on demand")

    # --- looking -----------------------------------------------------------------------------------------------

    def why(self, text: object) -> TextStats:
        """Explain why a text is or is not cached. `str()` of it is a sentence.

        Args:
            text: what `observe` takes, or the id of a cache.

        Raises:
            UnknownItemError: the text was never retrieved, asked or encoded, or it was forgotten.
        """
        given, digest = self._find(text)
        if digest not in self._texts.known:
            raise UnknownItemError([given])
        return replace(self._texts.stats(digest))

    def metrics(self) -> dict[str, float]:
        """The figures by name.

        Now: `documents` (texts that are counted), `caches`, `cached_bytes` (with those of stored instructions),
        `budget_bytes`.

        Since this object was made: `retrieved` and `asked` (texts that retrievers found and that stood in prompts);
        `reused_tokens` (tokens of documents that were found in the store), `encoded_tokens` (tokens that were encoded
        for a question) and `hit_rate`, the first as a share of both; and for each action in `TextStats.action`, how
        often it was decided. Passes that failed count as `failed`, too.
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
        """Stop the thread within one layer's time, save the counters, and restore the memory's own store."""
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
        """The thread: a pass after every question, and every `every_s` seconds."""
        while not self._stop.cancelled:
            self._wake.wait(self.every_s)
            self._wake.clear()
            try:
                with self._pass():
                    self._texts.save()  # before a wait that may be long
                    self._wait_until_idle()  # the question is answered first
                    self._tidy(reconcile=time.monotonic() - self._reconciled_at >= (self.every_s or 0.0))
                    self._promote_hot()
            except Exception:
                if self._stop.sleep(0.0):  # closed meanwhile
                    return
                logger.exception("a pass of the scheduler failed and will be tried again")
                self._texts.add("failed", 1)
                self._stop.sleep(self.every_s or 0.0)

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """One pass at a time; its decisions are saved."""
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
        """Wait until no question is being answered or on its way.

        Raises:
            Cancelled: the scheduler was closed.
        """
        with self._engine.lock.acquire(background=True):
            self._stop.check()

    def _tidy(self, *, reconcile: bool) -> tuple[list[str], list[str]]:
        """Delete what changed and what is over the budget. Returns the demoted and the dropped ids.

        Args:
            reconcile: look into the store first, which may take long.
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
        """Encode what is worth more than what it evicts, the most worth first. Returns the ids of the caches."""
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
        """Worth and digest of the texts that are hot and not cached, the most worth first.

        A text that prompts show in another form than retrievers do is left out until it has stood in a prompt.
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
        """Encode a text as it will stand in prompts, and store it. Returns its id, or None if it was not stored."""
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
            if not force and digest not in self._texts.known:  # it was deleted before this work could be told
                return None
            try:
                with self._engine.in_background():
                    item = self.memory.documents.encode(head_ids, token_ids, text)
            except ContextLengthError as error:
                self._store.note("failed", entry, str(error))  # it is not tried again
                if force:
                    raise
                return None
            self._wait_until_idle()  # a question that has come meanwhile does not wait for the disk
            return key if self._store.keep(cast("KVCacheItem", item), "promoted", reason, force=force) else None

    def _find(self, document: object) -> tuple[str, str]:
        """A text or a cache's id as it was given, and the digest of the text, as prompts show it; empty if unknown."""
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
