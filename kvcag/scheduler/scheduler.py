"""CacheScheduler: keeps the caches that are worth their bytes, and encodes what is hot before anybody asks."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

from pydantic import BaseModel
from typing_extensions import Self

from kvcag.chat_template import Prompt
from kvcag.core import KVCacheRecords
from kvcag.documents import text_and_metadata
from kvcag.engines.hf import HFEngine
from kvcag.engines.model_lock import Interrupted
from kvcag.errors import InvalidInputError, SchedulerStateError, UnsupportedModelError
from kvcag.memory import KVCacheMemory
from kvcag.scheduler.counters import Counters
from kvcag.scheduler.log import LogEntry
from kvcag.scheduler.metrics import SchedulerMetrics, Tally
from kvcag.scheduler.policy import GDSF, Policy
from kvcag.scheduler.promoting import Promoter
from kvcag.scheduler.state import State
from kvcag.scheduler.store import ScheduledStore
from kvcag.scheduler.tidying import Tidier
from kvcag.scheduler.working_set import WorkingSet

_logger = logging.getLogger("kvcag.scheduler")
_WRITE_DOWN_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass of a scheduler did: the ids of the caches."""

    promoted: list[str]
    demoted: list[str]
    dropped: list[str]


def own_identity(document: object) -> str | None:
    """The id that a document brings with it, if it does: LangChain's `Document.id`, LlamaIndex's `node_id`."""
    for field in ("id", "node_id"):
        found = getattr(document, field, None)
        if isinstance(found, str) and found:
            return found
    return None


class CacheScheduler:
    """Keeps a working set of a memory's caches within a byte budget, and fills it ahead of the questions.

    It counts which texts are retrieved (`observe`; LangChain's and LlamaIndex's handlers call it) and asked (it watches
    the memory's prompts). In the background, while nobody asks anything, what is hot is encoded; what is cold goes back
    to text, and its records stay. The memory's store is replaced by one that holds the budget, whoever puts; `close`
    gives it back. Safe to use from several threads.

    ```python
    scheduler = CacheScheduler(llm.memory(), budget_bytes=2 << 30, state="scheduler.sqlite")
    chain.invoke({"input": question}, config={"callbacks": [SchedulerCallback(scheduler)]})
    ```

    Args:
        memory: whose caches these are.
        budget_bytes: the most that their keys and values may take.
        policy: what they are worth; `GDSF()` by default.
        state: a SQLite file that keeps counters, records and the log over a restart. None keeps them in memory.
        every_s: seconds after which a pass is made though nothing was asked; None makes passes only in `run_once`, and
            starts no thread.
        quiet_s: for how long nobody has to have asked before something is encoded ahead.
        piece_tokens: tokens of one forward pass while encoding ahead.
        promote_after: how often a text has to have been asked for before it is encoded ahead.
        cold_after: rounds without a use after which a cache goes back to text though there is room; None: never.
        remember: how many texts to count, the coldest that have no cache being forgotten.
        identity: what stands for a document, so that another text under the same one replaces it and drops its cache.

    Raises:
        InvalidInputError: the budget is not positive, or the memory has a scheduler.
        SchedulerStateError: `state` is damaged, no such database, or another scheduler has it.
        UnsupportedModelError: the memory's engine keeps no caches that could be taken out.
    """

    def __init__(
        self,
        memory: KVCacheMemory,
        budget_bytes: int,
        *,
        policy: Policy | None = None,
        state: str | os.PathLike[str] | None = None,
        every_s: float | None = 30.0,
        quiet_s: float = 0.25,
        piece_tokens: int = 64,
        promote_after: int = 2,
        cold_after: float | None = None,
        remember: int = 100_000,
        identity: Callable[[Any], str | None] = own_identity,
    ) -> None:
        engine = _engine_of(memory, budget_bytes)
        self.memory, self.every_s, self.identity = memory, every_s, identity
        self._lock, self._quiet_s = engine.lock, quiet_s
        self._counters, self._tally = Counters(), Tally()
        self._state = State(state, engine.fingerprint.digest)
        self._state.load(self._counters)
        self._working = WorkingSet(budget_bytes, policy or GDSF(), self._counters.use_of)
        self._store = ScheduledStore(
            memory.store,
            self._working,
            self._counters,
            self._state,
            self._tally,
            engine.fingerprint,
            engine.bytes_per_token,
        )
        self._stop, self._wake, self._passing = threading.Event(), threading.Event(), threading.RLock()
        self._tidier = Tidier(self._store, self._counters, self._state, cold_after, remember)
        self._promoter = Promoter(
            memory,
            engine,
            self._store,
            self._counters,
            self._state,
            self._tally,
            stop=self._stop,
            quiet_s=quiet_s,
            piece_tokens=piece_tokens,
            promote_after=promote_after,
            meanwhile=self._write_down_now_and_then,
        )
        self._written_at = time.monotonic()
        self._tidier.tidy()
        memory.store = self._store
        memory.watchers.append(self._asked)
        atexit.register(self.close)  # before the interpreter tears down what the thread stands on
        self._thread = threading.Thread(target=self._work, name="kvcag-scheduler", daemon=True)
        if every_s is not None:
            self._thread.start()

    # --- watching ----------------------------------------------------------------------------------------------

    def observe(self, documents: object) -> None:
        """Count what a retriever found. Takes microseconds, and never waits.

        Args:
            documents: one or several of what `KVCacheMemory.from_textual_memory` takes: str, LangChain `Document`s,
                LlamaIndex nodes.

        Raises:
            InvalidInputError: a text cannot be read from one of them. None was counted.
        """
        self.step_aside()
        read = [(*text_and_metadata(document), self.identity(document)) for document in _several(documents)]
        for text, metadata, identity in read:
            if text.strip():
                self._counters.retrieved(text, identity, metadata)
        self._tally.add(retrieved=len(read))
        self._wake.set()

    def step_aside(self) -> None:
        """A question is on its way: whatever is being encoded ahead pauses at once. What is watched calls this."""
        self._lock.announce()

    def _asked(self, prompt: Prompt) -> None:
        self.step_aside()
        self._counters.asked(prompt)
        self._tally.add(asked=len(prompt.documents))
        self._wake.set()

    # --- on demand ---------------------------------------------------------------------------------------------

    def run_once(self) -> PassReport:
        """Make one pass now: drop what changed, demote what is too much or cold, promote what is hot.

        Answers go first here, too: it returns when all is encoded.
        """
        with self._pass():
            demoted, dropped = self._tidier.tidy()
            return PassReport(self._promoter.promote_hot(), demoted, dropped)

    def promote(self, texts: object) -> list[str]:
        """Encode texts now, whatever they are worth, and return the ids of their caches.

        Args:
            texts: one or several of what `observe` takes, or ids of caches that went back to text.

        Raises:
            EmptyPromptError: a text is empty.
            StoreFullError: a text's cache is larger than the budget.
            UnknownItemError: no cache of this id is, or was, kept.
        """
        with self._pass():
            self._state.save(self._counters)
            return [self._promoter.promote(each) for each in _several(texts)]

    def demote(self, texts: object) -> list[str]:
        """Put caches back to text, and return their ids; what is not cached is ignored. Their records stay.

        Args:
            texts: ids of caches, or texts.
        """
        with self._store.lock:
            self._open()
            entries = [entry for each in _several(texts) for entry in self._promoter.caches_of(each)]
            return [entry.key for entry in self._store.let_go(entries, "demoted", "on demand")]

    # --- looking -----------------------------------------------------------------------------------------------

    def log(self, limit: int = 100) -> list[LogEntry]:
        """The last things that were done, and why; the oldest first."""
        return self._state.logged(limit)

    def records(self, id: str) -> KVCacheRecords | None:
        """Which texts a cache was made from, while it is kept and after it went back to text."""
        found = self._state.records(id)
        return None if found is None else found[1]

    def metrics(self) -> SchedulerMetrics:
        """Its figures; `.prometheus()` writes them for a scrape."""
        tally = self._tally
        with self._store.lock, tally.lock:
            actions = {f"{name}_total": tally.actions.get(name, 0) for name in _COUNTED}
            return SchedulerMetrics(
                documents=len(self._counters.known),
                caches=len(self._working.entries),
                cached_bytes=self._working.bytes,
                budget_bytes=self._working.budget_bytes,
                retrieved_total=tally.retrieved,
                asked_total=tally.asked,
                reused_tokens_total=tally.reused_tokens,
                encoded_tokens_total=tally.encoded_tokens,
                promoted_tokens_total=tally.promoted_tokens,
                promoting_seconds_total=tally.promoting_seconds,
                interruptions_total=tally.interruptions,
                failures_total=tally.actions.get("failed", 0),
                **actions,
            )

    # --- ending ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop within a layer's time, write down what was counted, and give the memory its own store back."""
        self._stop.set()
        self._wake.set()
        atexit.unregister(self.close)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()  # it looks at `_stop` between two layers, and wherever it waits
        with self._passing:
            if self._asked not in self.memory.watchers:
                return
            self.memory.watchers.remove(self._asked)
            if self.memory.store is self._store:
                self.memory.store = self._store.inner
            try:
                self._state.save(self._counters)
            finally:
                self._state.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- passes ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """The thread: a pass whenever something was asked for, and now and then."""
        while not self._stop.is_set():
            asked = self._wake.wait(self.every_s)
            self._wake.clear()
            try:
                with self._passing:
                    with self._lock.idle(self._quiet_s, self._stop, self._write_down_now_and_then):
                        pass  # the question that woke this is answered first
                    if asked:
                        self._tidier.drop_changed()
                    else:
                        self._tidier.tidy()
                    self._promoter.promote_hot()
            except Interrupted:
                return
            except Exception as error:
                self._report(error)
                self._stop.wait(self.every_s)

    def _write_down_now_and_then(self) -> None:
        """While an answer is waited for: what was counted is not lost to a crash on a busy day."""
        if time.monotonic() - self._written_at > _WRITE_DOWN_EVERY_S:
            self._written_at = time.monotonic()
            self._state.save(self._counters)

    def _report(self, error: Exception) -> None:
        _logger.error("a pass of the scheduler failed, and is tried again: %s", error, exc_info=error)
        self._tally.count("failed", 0, 0.0)
        reason = f"a pass failed, and is tried again: {type(error).__name__}: {error}"
        with suppress(SchedulerStateError):  # the log may be what failed
            self._state.log([LogEntry(time.time(), "failed", "", "", 0, 0, 0.0, 0.0, reason)])

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """One pass at a time, on demand."""
        with self._passing:
            self._open()
            try:
                yield
            except Interrupted:
                raise InvalidInputError(_CLOSED) from None

    def _open(self) -> None:
        if self._stop.is_set():
            raise InvalidInputError(_CLOSED)


_CLOSED = "the scheduler is closed: make another one"
_COUNTED = ("promoted", "kept", "passed", "demoted", "dropped", "gone")


def _engine_of(memory: KVCacheMemory, budget_bytes: int) -> HFEngine:
    if budget_bytes <= 0:
        raise InvalidInputError(f"budget_bytes is {budget_bytes}, and must be more than 0")
    if isinstance(memory.store, ScheduledStore):
        raise InvalidInputError("the memory has a scheduler already: close that one first")
    if not memory.engine.merges:
        raise UnsupportedModelError(
            f"{type(memory.engine).__name__} keeps no caches that could be taken out, so there is nothing to schedule: "
            "use an HFEngine."
        )
    return cast("HFEngine", memory.engine)


def _several(texts: object) -> list[object]:
    """One or several; a document of LangChain's or LlamaIndex's can be iterated over, too, and is one."""
    return list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str | BaseModel) else [texts]
