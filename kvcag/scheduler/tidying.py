"""Cache → text: what changed, what is too much, what is cold."""

from __future__ import annotations

from kvcag.scheduler.counters import Counters
from kvcag.scheduler.state import State
from kvcag.scheduler.store import ScheduledStore


class Tidier:
    """Lets caches go, and forgets texts that nobody asks for.

    Args:
        store: where caches are kept.
        counters: how often their texts were asked for.
        state: where that is written down.
        cold_after: see `CacheScheduler`.
        remember: see `CacheScheduler`.
    """

    def __init__(
        self, store: ScheduledStore, counters: Counters, state: State, cold_after: float | None, remember: int
    ) -> None:
        self._store, self._counters, self._state = store, counters, state
        self._cold_after, self._remember = cold_after, remember

    def tidy(self) -> tuple[list[str], list[str]]:
        """Everything there is to do; the ids of what was demoted and of what was dropped."""
        dropped = self.drop_changed()
        with self._store.lock:
            self._store.reconcile()
            excess = self._store.working.excess(self._counters.now)
            demoted = self._store.let_go(excess, "demoted", "over the budget")
            if self._cold_after is not None:
                entries = self._store.working.entries.values()
                cold = [entry for entry in entries if entry.managed and self._idle(entry.digest) > self._cold_after]
                demoted += self._store.let_go(cold, "demoted", f"not asked for in {self._cold_after:g} rounds")
        self._forget_coldest()
        return [entry.key for entry in demoted], dropped

    def drop_changed(self) -> list[str]:
        """Write down what was counted, and drop the caches of texts that another text took the place of."""
        self._state.save(self._counters)
        with self._counters.lock:
            changed, self._counters.changed = self._counters.changed, []
            changed = [digest for digest in changed if digest not in self._counters.identities.values()]
            for digest in changed:
                self._counters.known.pop(digest, None)
                self._counters.fresh.add(digest)
        dropped: list[str] = []
        for digest in changed:
            with self._store.lock:
                entries = self._store.let_go(self._store.working.of_text(digest), "dropped", "its text changed")
            dropped += [entry.key for entry in entries]
        return dropped

    def _idle(self, digest: str) -> float:
        return self._counters.now - self._counters.use_of(digest).last

    def _forget_coldest(self) -> None:
        """Count no more texts than are to be remembered."""
        known = self._counters.known
        if len(known) <= self._remember:
            return
        cached = {entry.digest for entry in list(self._store.working.entries.values())}
        cold = sorted((each.use.last, digest) for digest, each in list(known.items()) if digest not in cached)
        with self._counters.lock:
            for _, digest in cold[: len(known) - self._remember]:
                self._counters.forget(digest)
                self._counters.fresh.add(digest)
        self._state.save(self._counters)
        self._state.forget_records(self._remember)
