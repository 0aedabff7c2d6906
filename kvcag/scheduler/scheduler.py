"""CacheScheduler: watches what is retrieved and asked, and encodes hot texts while the model is idle."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, cast

from typing_extensions import Self

from kvcag.chat_template import Prompt
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
from kvcag.scheduler.store import Cached, Metrics, Policy, ScheduledStore, WorkingSet, gdsf, logger
from kvcag.scheduler.texts import Texts, TextStats, digest_of

_SAVE_EVERY_S = 5.0
_POLL_S = 0.01
_MARGIN = 1.25
"""How many times more a text must be worth than each cache that it evicts, to be encoded ahead. Without a margin, two
texts that are used equally often would evict each other forever."""
_TRIES = 8
"""Texts that are not worth their room before a pass ends: those that follow are worth less."""
_SCORED_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did: the ids of the caches."""

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
        promote_after: uses after which a text is encoded ahead.
        cold_after: rounds without a use after which a cache is deleted even if there is room; None: never.
        remember: how many texts to count. The coldest ones without a cache are forgotten.
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
        promote_after: int = 2,
        cold_after: float | None = None,
        remember: int = 100_000,
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
        self._quiet_s, self._promote_after = quiet_s, promote_after
        self._cold_after, self._remember = cold_after, remember
        self._metrics = Metrics(budget_bytes=budget_bytes)
        self._texts = Texts(state, self._engine.fingerprint.digest)
        self._working = WorkingSet(budget_bytes, policy, self._texts.stats)
        self._store = ScheduledStore(memory.store, self._working, self._texts, self._metrics, self._engine)
        self._stop, self._wake, self._passing = Cancellation(), threading.Event(), threading.RLock()
        self._too_long: set[str] = set()
        self._saved_at = time.monotonic()
        self._tidy()
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
        self._metrics.add(retrieved_total=len(read))
        self._wake.set()

    def step_aside(self) -> None:
        """Announce a question: encoding ahead pauses at once. LangChain's and LlamaIndex's handlers call this."""
        self._engine.lock.announce(self._quiet_s)

    def _asked(self, prompt: Prompt) -> None:
        self.step_aside()
        self._texts.asked(prompt)
        self._metrics.add(asked_total=len(prompt.documents))
        self._wake.set()

    # --- on demand ---------------------------------------------------------------------------------------------

    def run_once(self) -> PassReport:
        """Make one pass now: delete the caches of changed, cold and excess texts, and encode the hot ones.

        Questions go first here too. It returns when everything is encoded.
        """
        with self._pass():
            demoted, dropped = self._tidy()
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
        with self._pass():
            self._texts.save()
            return [self._promote(document) for document in documents_of(texts)]

    def demote(self, texts: object) -> list[str]:
        """Delete caches and return their ids. The texts stay known; what is not cached is ignored.

        Args:
            texts: one or several texts, or ids of caches.
        """
        self._check_open()
        with self._store.lock:
            entries = [entry for each in documents_of(texts) for entry in self._working.of_text(self._digest(each))]
            return self._store.evict(entries, "demoted", "on demand")

    # --- looking -----------------------------------------------------------------------------------------------

    def why(self, text: object) -> TextStats:
        """Explain why a text is or is not cached. `str()` of it is a sentence.

        Args:
            text: what `observe` takes, or the id of a cache.

        Raises:
            UnknownItemError: the text was never retrieved, asked or encoded, or it was forgotten.
        """
        digest = self._digest(text)
        if digest not in self._texts.known:
            raise UnknownItemError([text_and_metadata(text)[0]])
        return replace(self._texts.stats(digest), text=self._texts.text(digest))

    def metrics(self) -> Metrics:
        """The figures now. `dataclasses.asdict` makes them a dict."""
        with self._store.lock:
            return replace(
                self._metrics,
                documents=len(self._texts.known),
                caches=len(self._working.entries),
                cached_bytes=self._working.bytes,
            )

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- passes ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """The thread: a pass after every question, and every `every_s` seconds."""
        CANCELLATION.set(self._stop)
        while not self._stop.cancelled:
            asked = self._wake.wait(self.every_s)
            self._wake.clear()
            try:
                with self._passing:
                    self._wait_until_idle()  # the question is answered first
                    self._drop_changed() if asked else self._tidy()
                    self._promote_hot()
            except Cancelled:
                return
            except Exception as error:
                logger.exception("a pass of the scheduler failed and will be tried again")
                self._metrics.fail(f"a pass failed and will be tried again: {type(error).__name__}: {error}")
                self._stop.sleep(self.every_s or 0.0)

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """One pass at a time."""
        with self._passing:
            self._check_open()
            outer = CANCELLATION.set(self._stop)
            try:
                yield
            except Cancelled:
                self._check_open()
                raise
            finally:
                CANCELLATION.reset(outer)

    def _check_open(self) -> None:
        if self._stop.cancelled:
            raise InvalidInputError("the scheduler is closed: make another one")

    def _wait_until_idle(self) -> None:
        """Wait until no question is being answered or on its way, and save the counters now and then.

        Raises:
            Cancelled: the scheduler was closed.
        """
        while not self._engine.lock.is_idle:
            self._stop.sleep(_POLL_S)
            self._stop.check()
            if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
                self._saved_at = time.monotonic()
                self._texts.save()
        self._stop.check()

    # --- deleting caches ---------------------------------------------------------------------------------------

    def _tidy(self) -> tuple[list[str], list[str]]:
        """Delete what changed, what is over the budget and what is cold. Returns the demoted and the dropped ids."""
        dropped = self._drop_changed()
        with self._store.lock:
            self._store.reconcile()
            demoted = self._store.evict(self._working.excess(self._texts.now), "demoted", "over the budget")
            if self._cold_after is not None:
                oldest = self._texts.now - self._cold_after
                entries = list(self._working.entries.values())
                cold = [e for e in entries if e.managed and self._texts.stats(e.digest).last < oldest]
                demoted += self._store.evict(cold, "demoted", f"not used for {self._cold_after:g} rounds")
            self._texts.forget_coldest(self._remember, {entry.digest for entry in self._working.entries.values()})
        self._texts.save()
        return demoted, dropped

    def _drop_changed(self) -> list[str]:
        """Delete the caches of texts that another text has replaced."""
        dropped = []
        for digest in self._texts.take_changed():
            with self._store.lock:
                dropped += self._store.evict(self._working.of_text(digest), "dropped", "its text changed")
        self._texts.save()
        return dropped

    # --- encoding ahead ----------------------------------------------------------------------------------------

    def _promote_hot(self) -> list[str]:
        """Encode what is worth more than what it evicts, the most worth first. Returns the ids of the caches.

        Raises:
            Cancelled: the scheduler was closed meanwhile.
        """
        promoted: list[str] = []
        not_worth_it = 0
        for _, digest in self._candidates():
            stats = self._texts.known.get(digest)
            if stats is None or self._working.of_text(digest):
                continue
            if not self._is_worth_it(self._estimate(digest, stats)):
                self._texts.decide(digest, "passed", "worth less than what it would evict")
                not_worth_it += 1
                if not_worth_it == _TRIES:
                    break
            elif key := self._encode(digest, stats, self._texts.text(digest), "hot and not cached", force=False):
                promoted.append(key)
        return promoted

    def _promote(self, document: object) -> str:
        digest = self._digest(document)
        text = self._texts.text(digest)
        if text is None:
            text = text_and_metadata(document)[0]
            if _is_key(text):
                raise UnknownItemError([text])
            if not text.strip():
                raise EmptyPromptError("a text is empty: there is nothing to encode")
        key = self._encode(digest, self._texts.known.get(digest) or TextStats(), text, "on demand", force=True)
        assert key is not None
        return key

    def _candidates(self) -> list[tuple[float, str]]:
        """Worth and digest of the texts that are hot and not cached, the most worth first.

        A text that prompts show in another form than retrievers do is left out until it has stood in a prompt.
        """
        found: list[tuple[float, str]] = []
        cached = self._too_long | {entry.digest for entry in list(self._working.entries.values())}
        texts = list(self._texts.known.items())
        shown = self._texts.head_ids is None or self._texts.ending is not None
        for start in range(0, len(texts), _SCORED_AT_ONCE):
            self._wait_until_idle()
            for digest, stats in texts[start : start + _SCORED_AT_ONCE]:
                if stats.count >= self._promote_after and digest not in cached and (shown or stats.asked):
                    found.append((self._working.worth(self._estimate(digest, stats), self._texts.now), digest))
        return sorted(found, reverse=True)

    def _encode(self, digest: str, stats: TextStats, text: str | None, reason: str, *, force: bool) -> str | None:
        """Encode a text as it will stand in prompts, and store it. Returns its id, or None if it was not stored."""
        if text is None:
            return None
        head_ids = self._texts.head_ids
        if head_ids is None:
            head_ids = self._engine.template.instruction_ids(self.memory.instruction)
        if not stats.asked:
            ending = self.memory.separator if self._texts.head_ids is None else self._texts.ending or ""
            text += "" if text.endswith(ending or "\n") else ending
        token_ids = self._engine.template.encode_text(text)
        key = self.memory.documents.key(token_ids)
        if self._store.contains(key):
            self._store.reconcile()
            return key
        stats.tokens = len(token_ids)
        entry = replace(self._estimate(digest, stats), key=key)
        if force and not self._working.can_hold(entry):
            raise self._store.full(entry)
        if not force and not self._is_worth_it(entry):
            return None
        self._wait_until_idle()
        try:
            with self._engine.in_background():
                item = self.memory.documents.encode(head_ids, token_ids, text)
        except ContextLengthError as error:
            if force:
                raise
            self._too_long.add(digest)
            self._store.note("failed", entry, str(error))
            return None
        self._wait_until_idle()  # a question that has come meanwhile does not wait for the disk
        if not self._store.contains(key):  # else a question has encoded it meanwhile
            if not self._store.keep(cast("KVCacheItem", item), "promoted", reason, force=force):
                return None
            self._metrics.add(promoted_tokens_total=len(token_ids))
        return key

    def _is_worth_it(self, entry: Cached) -> bool:
        with self._store.lock:
            return self._working.room_for(entry, self._texts.now, margin=_MARGIN) is not None

    def _estimate(self, digest: str, stats: TextStats) -> Cached:
        return Cached("", digest, stats.tokens, stats.tokens * self._engine.bytes_per_token)

    def _digest(self, document: object) -> str:
        """The digest of a text, as prompts show it, or of the text of a cache's id."""
        text = text_and_metadata(document)[0]
        if text in self._working.entries:
            return self._working.entries[text].digest
        if _is_key(text):
            known = list(self._texts.known.items())
            return next((digest for digest, stats in known if stats.id == text), "")
        return self._texts.shown_as.get(digest_of(text), digest_of(text))


def _is_key(text: str) -> bool:
    return text.startswith("kv:sha256:")
