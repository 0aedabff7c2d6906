"""A store that keeps within a byte budget the caches that are worth most, and counts what happens to them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from kvcag.cache.layers import layers_of, nbytes
from kvcag.core import KVCacheItem
from kvcag.engines.hf import HFEngine
from kvcag.errors import StoreError, StoreFullError
from kvcag.memory import is_context
from kvcag.scheduler.texts import Texts, TextStats, digest_of, sources_of
from kvcag.stores.base import KVStore, StoreStats
from kvcag.stores.format import Manifest

logger = logging.getLogger("kvcag.scheduler")
_counting = threading.Lock()
_ATTENTION_TOKENS = 8192
"""The length in tokens at which attention costs as much as the rest of a prefill."""

Policy: TypeAlias = Callable[[TextStats, int, int, float], float]
"""`(stats, tokens, size in bytes, now in rounds)` → the worth of a cache per byte. The least worth leaves first."""


def gdsf(stats: TextStats, tokens: int, size: int, now: float) -> float:
    """Prefill tokens saved per round and byte: frequency × cost / size. The default policy.

    After GreedyDual-Size-Frequency (Cherkasova 1998), with frequencies that fade (`TextStats.rate`). A long text is
    worth more per token than a short one, since attention is quadratic.
    """
    return stats.rate(now) * tokens * (1 + tokens / _ATTENTION_TOKENS) / max(size, 1)


@dataclass(frozen=True, slots=True)
class Cached:
    """A stored cache.

    Attributes:
        key: its item's id.
        digest: of its text, from `digest_of`.
        tokens: its length.
        bytes: of its keys and values.
        managed: False for an item that the caller added under an id or handle of their own. It counts towards the
            budget and is never evicted.
    """

    key: str
    digest: str
    tokens: int
    bytes: int
    managed: bool = True


class WorkingSet:
    """The stored caches and their budget. Sizes and counters only; no tensors.

    Args:
        budget_bytes: the most that keys and values may take together.
        policy: what a cache is worth.
        stats_of: digest → the stats of a text.
    """

    def __init__(self, budget_bytes: int, policy: Policy, stats_of: Callable[[str], TextStats]) -> None:
        self.budget_bytes = budget_bytes
        self.entries: dict[str, Cached] = {}
        self.bytes = 0
        self._policy, self._stats_of = policy, stats_of

    def add(self, entry: Cached) -> None:
        """Add a cache, in place of one with the same key."""
        self.remove(entry.key)
        self.entries[entry.key] = entry
        self.bytes += entry.bytes

    def remove(self, key: str) -> None:
        """Remove a cache, if it is there."""
        entry = self.entries.pop(key, None)
        self.bytes -= entry.bytes if entry else 0

    def of_text(self, digest: str) -> list[Cached]:
        """The caches of a text. May be called while another thread adds."""
        return [entry for entry in list(self.entries.values()) if entry.digest == digest]

    def worth(self, entry: Cached, now: float) -> float:
        """What a cache is worth per byte, stored or not."""
        return self._policy(self._stats_of(entry.digest), entry.tokens, entry.bytes, now)

    def protected_bytes(self, but: str = "") -> int:
        """Bytes of the caches that are never evicted, leaving out the one with the key `but`."""
        return sum(entry.bytes for entry in self.entries.values() if not entry.managed and entry.key != but)

    def can_hold(self, new: Cached) -> bool:
        """Whether a cache fits beside the protected ones."""
        return new.bytes + self.protected_bytes(new.key) <= self.budget_bytes

    def room_for(self, new: Cached, now: float, *, margin: float = 1.0, force: bool = False) -> list[Cached] | None:
        """The caches to evict for a new one, the least worth first. None: it does not fit, or is not worth it.

        Args:
            new: the new cache.
            now: the moment, in rounds.
            margin: how many times more it must be worth than each cache that it evicts. A text that is asked for once
                evicts nothing that is asked for often (TinyLFU: Einziger, Friedman and Manes 2017).
            force: accept it whatever it is worth.
        """
        if not self.can_hold(new):
            return None
        present = self.entries.get(new.key)
        leaving = self._least_worth(self.bytes - (present.bytes if present else 0) + new.bytes, now, new.key)
        worth = self.worth(new, now)
        if not force and any(worth <= margin * self.worth(entry, now) for entry in leaving):
            return None
        return leaving

    def excess(self, now: float) -> list[Cached]:
        """The caches to evict so that the rest fits the budget."""
        return self._least_worth(self.bytes, now)

    def _least_worth(self, total: int, now: float, but: str = "") -> list[Cached]:
        """The least worth caches that bring `total` bytes within the budget, and no more than necessary."""
        over = total - self.budget_bytes
        if over <= 0:
            return []

        def order(entry: Cached) -> tuple[float, float, str]:
            return self.worth(entry, now), self._stats_of(entry.digest).last, entry.key

        leaving: list[Cached] = []
        for entry in sorted((e for e in self.entries.values() if e.managed and e.key != but), key=order):
            if over <= 0:
                break
            leaving.append(entry)
            over -= entry.bytes
        for entry in reversed(leaving):  # one of the last may be so large that an earlier one can stay
            if over + entry.bytes <= 0:
                leaving.remove(entry)
                over += entry.bytes
        return leaving


@dataclass(slots=True)
class Metrics:
    """The figures of a scheduler. Names that end in `_total` count since it was made and only grow.

    Attributes:
        documents: texts that are counted.
        caches: caches that are stored.
        cached_bytes: bytes of their keys and values.
        budget_bytes: the budget for these.
        retrieved_total: texts that retrievers found.
        asked_total: texts that stood in prompts.
        reused_tokens_total: tokens of documents that were found in the store.
        encoded_tokens_total: tokens of documents that were encoded for a question.
        promoted_total: caches that were encoded ahead and stored.
        promoted_tokens_total: their tokens.
        kept_total: caches that were encoded for a question and stored.
        passed_total: caches that were encoded and not stored.
        demoted_total: caches that were deleted for better ones, for the budget, or on demand.
        dropped_total: caches whose text changed, or that the caller deleted.
        gone_total: caches that the store evicted.
        failures_total: texts and passes that failed.
        last_error: the last failure; empty if there was none.
    """

    documents: int = 0
    caches: int = 0
    cached_bytes: int = 0
    budget_bytes: int = 0
    retrieved_total: int = 0
    asked_total: int = 0
    reused_tokens_total: int = 0
    encoded_tokens_total: int = 0
    promoted_total: int = 0
    promoted_tokens_total: int = 0
    kept_total: int = 0
    passed_total: int = 0
    demoted_total: int = 0
    dropped_total: int = 0
    gone_total: int = 0
    failures_total: int = 0
    last_error: str = ""

    @property
    def hit_rate(self) -> float:
        """The share of the documents' tokens that was found in the store."""
        tokens = self.reused_tokens_total + self.encoded_tokens_total
        return self.reused_tokens_total / tokens if tokens else 0.0

    def add(self, **amounts: int) -> None:
        """Raise counters. Thread-safe."""
        with _counting:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def fail(self, reason: str) -> None:
        """Count a failure and keep its reason."""
        self.add(failures_total=1)
        self.last_error = reason


class ScheduledStore(KVStore):
    """A store within a byte budget: an item enters if it is worth its bytes, and what it evicts is deleted.

    The text of a cache is saved before the cache is stored, and deleting it leaves the text, so no text is lost. An
    item with an id of its own, and a context with a handle, always enters and is never evicted.

    Args:
        inner: where items live.
        working: which are stored.
        texts: how often their texts are used.
        metrics: counts what happens.
        engine: the model; items of another model are not counted and stay as they are.
    """

    def __init__(self, inner: KVStore, working: WorkingSet, texts: Texts, metrics: Metrics, engine: HFEngine) -> None:
        self.inner, self.working = inner, working
        self._texts, self._metrics, self._engine = texts, metrics, engine
        self.lock = threading.RLock()

    def get(self, key: str) -> KVCacheItem | None:
        """The item, or None."""
        item = self.inner.get(key)
        if item is not None:
            self._metrics.add(reused_tokens_total=len(item.token_ids))
        elif key in self.working.entries:
            with self.lock:  # waits for a `put` of this key
                self._note_gone(key)
        return item

    def put(self, item: KVCacheItem) -> None:
        """Store an item, if it is worth its bytes.

        Raises:
            StoreFullError: it has an id or a handle of its own, and does not fit beside others like it.
        """
        self._metrics.add(encoded_tokens_total=len(item.token_ids))
        self.keep(item, "kept", "encoded for a question")

    def keep(self, item: KVCacheItem, action: str, reason: str, *, force: bool = False) -> bool:
        """Store an item and note why. Returns whether it was stored.

        Raises:
            StoreFullError: `force` is set or the item is protected, and it does not fit.
            SchedulerStateError: its text cannot be saved. It was not stored.
        """
        text = item.records.composed_text_memory
        managed = _is_managed(item.id, item.metadata)
        entry = Cached(item.id, digest_of(text), len(item.token_ids), nbytes(layers_of(item.memory)), managed)
        force = force or not managed
        with self.lock:
            fits = self.working.can_hold(entry)
            if force and not fits:
                raise self.full(entry)
            sources = {*item.records.text_memories, *sources_of(item.metadata)}
            self._texts.encoded(text, entry.tokens, entry.key, sources)
            leaving = self.working.room_for(entry, self._texts.now, force=force)
            if leaving is None:
                why = "worth less than what it would evict" if fits else "larger than the budget"
                self.note("passed", entry, f"{reason}; {why}")
                self._texts.save()
                return False
            self.evict(leaving, "demoted", f"made room for {item.id}")
            self.note(action, entry, reason)
            self._texts.save()
            self.working.add(entry)
            try:
                self.inner.put(item)
            except BaseException as error:
                self.working.remove(entry.key)
                self.note("failed", entry, f"the store failed: {error}")
                raise
            return True

    def delete(self, keys: Iterable[str]) -> None:
        """Delete items, for the caller."""
        with self.lock:
            listed = list(keys)
            entries = [self.working.entries[key] for key in listed if key in self.working.entries]
            self.evict(entries, "dropped", "deleted by the caller")
            self.inner.delete(listed)

    def purge(self, source: str) -> list[str]:
        """Delete every cache that was made from one text, and every trace of the text."""
        with self.lock:
            purged = dict.fromkeys(self.inner.purge(source))
            digests = {self.working.entries[key].digest for key in purged if key in self.working.entries}
            digests |= self._texts.purge(source, digests)
            purged |= dict.fromkeys(entry.key for digest in digests for entry in self.working.of_text(digest))
            self.inner.delete(purged)
            for key in purged:
                self.working.remove(key)
            return list(purged)

    def contains(self, key: str) -> bool:
        """Whether the inner store holds it."""
        return self.inner.contains(key)

    def keys(self) -> Iterator[str]:
        """The inner store's keys."""
        return self.inner.keys()

    def manifest(self, key: str) -> Manifest | None:
        """The inner store's manifest."""
        return self.inner.manifest(key)

    def stats(self) -> StoreStats:
        """The inner store's stats."""
        return self.inner.stats()

    def prefetch(self, keys: Iterable[str]) -> object:
        """Prefetch from the inner store."""
        return self.inner.prefetch(keys)

    def close(self) -> None:
        """Close the inner store."""
        self.inner.close()

    def full(self, entry: Cached) -> StoreFullError:
        """The error for a cache that does not fit beside the protected ones."""
        return StoreFullError(entry.key, entry.bytes, self.working.budget_bytes, self.working.protected_bytes())

    def evict(self, entries: Iterable[Cached], action: str, reason: str) -> list[str]:
        """Delete caches, after their texts are saved. Call it with `lock` held. Returns their keys."""
        listed = list(entries)
        if listed:
            for entry in listed:
                self.note(action, entry, reason)
            self._texts.save()
            self.inner.delete([entry.key for entry in listed])
            for entry in listed:
                self.working.remove(entry.key)
        return [entry.key for entry in listed]

    def reconcile(self) -> None:
        """Bring the working set in step with what is in the inner store."""
        with self.lock:
            stored = set(self.inner.keys())
            for key in self.working.entries.keys() - stored:
                self._note_gone(key)
            for key in stored - self.working.entries.keys():
                try:
                    manifest = self.inner.manifest(key)
                except StoreError:  # a damaged file; the next question that needs it encodes it again
                    continue
                made_by = manifest.fingerprint if manifest else None
                if manifest is None or made_by is None or not self._engine.fingerprint.matches(made_by):
                    continue
                text, size = manifest.records.composed_text_memory, manifest.tokens * self._engine.bytes_per_token
                managed = _is_managed(key, manifest.metadata)
                entry = Cached(key, digest_of(text), manifest.tokens, size, managed)
                sources = {*manifest.records.text_memories, *sources_of(manifest.metadata)}
                self._texts.encoded(text, entry.tokens, key, sources)
                self.working.add(entry)
                if not self._texts.stats(entry.digest).is_cached:
                    self.note("found", entry, "it was in the store")
            self._texts.save()

    def note(self, action: str, entry: Cached, reason: str) -> None:
        """Log, count and remember a decision about a cache."""
        logger.info("%s %s (%d tokens): %s", action, entry.key, entry.tokens, reason)
        self._texts.decide(entry.digest, action, reason)
        if action == "failed":
            self._metrics.fail(reason)
        elif action != "found":
            self._metrics.add(**{f"{action}_total": 1})

    def _note_gone(self, key: str) -> None:
        entry = self.working.entries.get(key)
        if entry is not None and not self.inner.contains(key):
            self.working.remove(key)
            self.note("gone", entry, "the store evicted it")


def _is_managed(id: str, metadata: Mapping[str, Any]) -> bool:
    """Whether an item may be evicted: its id is a content key, and it is not a context with a handle."""
    return id.startswith("kv:sha256:") and not is_context(metadata)
