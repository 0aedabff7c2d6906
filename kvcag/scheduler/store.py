"""A store with a byte budget, which evicts the caches that are worth least."""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from kvcag.core import KVCacheItem
from kvcag.engines.hf import HFEngine
from kvcag.errors import StoreError, StoreFullError
from kvcag.memory import is_context
from kvcag.scheduler.texts import Texts, TextStats, digest_of
from kvcag.stores.base import DeletionReport, Described, KVStore, Listed, StoreStats, sources_of
from kvcag.stores.files import Manifest, is_instruction

logger = logging.getLogger("kvcag.scheduler")
_SALT = secrets.token_bytes(16)
_ATTENTION_TOKENS = 8192
"""The length in tokens at which attention costs as much as the rest of a prefill."""

Policy: TypeAlias = Callable[[TextStats, int, int, float], float]
"""A function of `(stats, tokens, size in bytes, now in rounds)` that returns the worth of a cache per byte. The cache
that is worth least is evicted first."""


def gdsf(stats: TextStats, tokens: int, size: int, now: float) -> float:
    """Prefill tokens saved per round and byte: frequency × cost / size. The default policy.

    After GreedyDual-Size-Frequency (Cherkasova 1998), with frequencies that decay (`TextStats.rate`). A long text is
    worth more per token than a short one, since the cost of attention is quadratic.
    """
    return stats.rate(now) * tokens * (1 + tokens / _ATTENTION_TOKENS) / max(size, 1)


@dataclass(frozen=True, slots=True)
class Cached:
    """A cache that is stored, or that may be stored.

    Attributes:
        key: the id of its item, made from its token ids.
        digest: the `digest_of` its text; empty for an instruction.
        tokens: its number of tokens.
        bytes: the size of its keys and values in bytes.
        managed: False for an item that the caller added with their own id or handle. Such an item counts towards the
            budget, but is never evicted.
    """

    key: str
    digest: str
    tokens: int
    bytes: int
    managed: bool = True


def room_for(
    new: Cached | None,
    stored: Iterable[Cached],
    budget_bytes: int,
    worth: Callable[[Cached], float],
    *,
    margin: float = 1.0,
    force: bool = False,
) -> list[Cached] | None:
    """The caches to evict for a new cache, in ascending order of worth.

    Returns None if the new cache does not fit, or is worth less than the caches that it would evict.

    Args:
        new: the new cache, which replaces a stored cache with the same key. None: only bring the stored caches within
            the budget.
        stored: all stored caches.
        budget_bytes: the budget for all keys and values, in bytes.
        worth: returns the worth of a cache per byte.
        margin: the new cache must be worth this many times more than each cache that it evicts, so that a text that is
            used once does not evict texts that are used often (TinyLFU: Einziger, Friedman and Manes 2017).
        force: accept the new cache regardless of its worth.
    """
    others = [entry for entry in stored if new is None or entry.key != new.key]
    over = sum(entry.bytes for entry in others) + (new.bytes if new else 0) - budget_bytes
    leaving: list[Cached] = []
    if over > 0:
        for entry in sorted((e for e in others if e.managed), key=lambda entry: (worth(entry), entry.key)):
            if over > 0:
                leaving.append(entry)
                over -= entry.bytes
        for entry in reversed(leaving):  # the last evicted cache may be so large that an earlier one can stay
            if over + entry.bytes <= 0:
                leaving.remove(entry)
                over += entry.bytes
    if new is None or force:
        return leaving if new is None or over <= 0 else None
    return leaving if over <= 0 and all(worth(new) > margin * worth(entry) for entry in leaving) else None


class ScheduledStore(KVStore):
    """Wraps a store with a byte budget: it stores an item only if the item is worth its bytes.

    The text of a cache is saved before the cache is evicted, so no text is lost. An item with the caller's own id, and
    a context with a handle, is always stored and never evicted. So is an instruction, if it fits.

    Args:
        inner: the store that holds the items.
        budget_bytes: the budget for all keys and values, in bytes.
        policy: computes the worth of a cache per byte.
        texts: the counts of the texts' uses, and the decisions about them.
        engine: the model. Items of other models are neither counted nor changed.

    Attributes:
        entries: the stored caches, by their ids.
        lock: held while entries change.
    """

    def __init__(self, inner: KVStore, budget_bytes: int, policy: Policy, texts: Texts, engine: HFEngine) -> None:
        self.inner, self.budget_bytes = inner, budget_bytes
        self.entries: dict[str, Cached] = {}
        self.lock = threading.RLock()
        self._policy, self._texts, self._engine = policy, texts, engine

    def get(self, key: str) -> KVCacheItem | None:
        """The item with this id, or None. Counts its tokens as reused."""
        item = self.inner.get(key)
        if item is not None:
            self._texts.add("reused_tokens", len(item.token_ids))
        return item

    def put(self, item: KVCacheItem) -> None:
        """Store an item if it is worth its bytes.

        Raises:
            StoreFullError: the item has the caller's own id or handle, and does not fit beside other such items.
        """
        self._texts.add("encoded_tokens", len(item.token_ids))
        self.keep(item, "kept", "encoded for a question")

    def keep(self, item: KVCacheItem, action: str, reason: str, *, force: bool = False) -> bool:
        """Store an item if it is worth its bytes, and record the decision. Returns whether it was stored.

        Args:
            item: the item.
            action: the decision to record if the item is stored.
            reason: the reason of the decision.
            force: store the item regardless of its worth.

        Raises:
            StoreFullError: `force` is True or the item is never evicted, and it does not fit.
            SchedulerStateError: the texts of evicted caches cannot be saved. Nothing was changed.
        """
        entry = self.entry(item.id, _digest_of(item), len(item.token_ids), item)
        with self.lock:
            self._remember(entry, item)
            leaving = self.room_for(entry, force=force or not entry.managed)
            if leaving is None:
                self.note("passed", entry, f"{reason}; worth less than what it would evict, or larger than the budget")
                return False
            self.evict(leaving, "demoted", "made room for another")
            self.inner.put(item)
            self.entries[entry.key] = entry
            if entry.digest:
                self.note(action, entry, reason)
            return True

    def delete(self, keys: Iterable[str]) -> None:
        """Delete items by id."""
        with self.lock:
            listed = list(keys)
            entries = [self.entries[key] for key in listed if key in self.entries]
            self.evict(entries, "dropped", "deleted by the caller")
            self.inner.delete(listed)

    def forget(self, texts: Iterable[str]) -> None:
        """Forget texts, so that they are not encoded again."""
        self._texts.purge(set(texts))

    @property
    def is_exact(self) -> bool:
        """Whether the inner store is exact."""
        return self.inner.is_exact

    @property
    def place(self) -> str:
        """The inner store's place."""
        return self.inner.place

    @property
    def places(self) -> frozenset[object]:
        """The inner store's places."""
        return self.inner.places

    def erase(self, keys: Iterable[str]) -> DeletionReport:
        """Delete items and every trace of their texts, so that the texts are not encoded again."""
        listed = list(keys)
        with self.lock:
            self._texts.purge(set(), {self.entries[key].digest for key in listed if key in self.entries})
            return self._gone(self.inner.erase(listed))

    def erase_where(self, chosen: Callable[[Described], bool], *, unreadable: bool = False) -> DeletionReport:
        """Delete items and every trace of their texts, so that the texts are not encoded again."""
        with self.lock:
            return self._gone(self.inner.erase_where(chosen, unreadable=unreadable))

    def purge(self, source: str) -> DeletionReport:
        """Delete every cache made from one text, and every trace of the text."""
        with self.lock:
            digests = self._texts.purge({source})  # first, since encoding ahead checks that the text is still known
            keys = [entry.key for entry in self.entries.values() if entry.digest in digests]
            return super().purge(source) + self._gone(self.inner.erase(keys))

    def clear(self) -> DeletionReport:
        """Delete every item, and forget every text."""
        with self.lock:
            self._texts.purge(set(), list(self._texts.known))
            return super().clear()

    def deletions(self) -> Hashable:
        """The `deletions` of the inner store."""
        return self.inner.deletions()

    def _moment(self) -> Hashable:
        return self.inner._moment()

    def _deleted_since(self, key: str, since: Hashable) -> bool:
        return self.inner._deleted_since(key, since)

    def _used(self, key: str) -> None:
        self.inner._used(key)

    def _gone(self, report: DeletionReport) -> DeletionReport:
        gone = [self.entries.pop(key) for key in report.ids if key in self.entries]
        for entry in gone:
            self.note("dropped", entry, "deleted by the caller")
        self._texts.purge(set(), {entry.digest for entry in gone})
        return report

    def contains(self, key: str) -> bool:
        """Whether the inner store contains the item."""
        return self.inner.contains(key)

    def containing(self, keys: Iterable[str]) -> set[str]:
        """The ids, among `keys`, of items that the inner store contains."""
        return self.inner.containing(keys)

    def keys(self) -> Iterator[str]:
        """The inner store's keys."""
        return self.inner.keys()

    def listing(self) -> Iterator[Listed]:
        """The items of the inner store."""
        return self.inner.listing()

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

    def entry(self, key: str, digest: str, tokens: int, made: KVCacheItem | Manifest | None = None) -> Cached:
        """The entry of a cache with this many tokens: of the item `made`, or (None) of a text that may be encoded."""
        managed = made is None or (key.startswith("kv:sha256:") and not is_context(made.metadata))
        return Cached(key, digest, tokens, tokens * self._engine.bytes_per_token, managed)

    def worth(self, entry: Cached) -> float:
        """The worth of a cache per byte now, whether or not it is stored."""
        return self._policy(self._texts.stats(entry.digest), entry.tokens, entry.bytes, self._texts.now)

    def room_for(self, new: Cached | None, *, margin: float = 1.0, force: bool = False) -> list[Cached] | None:
        """Call the function `room_for` with this store's entries, budget and worth.

        Raises:
            StoreFullError: `force` is True, and the cache does not fit beside the caches that are never evicted.
        """
        with self.lock:
            stored = list(self.entries.values())
        leaving = room_for(new, stored, self.budget_bytes, self.worth, margin=margin, force=force)
        if leaving is None and force and new is not None:
            protected = sum(entry.bytes for entry in stored if not entry.managed and entry.key != new.key)
            raise StoreFullError(new.key, new.bytes, self.budget_bytes, protected)
        return leaving

    def evict(self, entries: Iterable[Cached], action: str, reason: str) -> list[str]:
        """Save the texts of caches, then delete the caches. Returns their keys."""
        listed = list(entries)
        keys = [entry.key for entry in listed]
        if listed:
            with self.lock:
                for entry in listed:
                    self.note(action, entry, reason)
                self._texts.save()
                self.inner.delete(keys)
                for key in keys:
                    self.entries.pop(key, None)
        return keys

    def reconcile(self) -> None:
        """Update the entries to the present contents of the inner store, which other processes may change."""
        with self.lock:
            stored = set(self.inner.keys())
            for key in self.entries.keys() - stored:
                self.note("gone", self.entries.pop(key), "the store evicted it")
            for key in stored - self.entries.keys():
                try:
                    manifest = self.inner.manifest(key)
                except StoreError:  # a damaged file: the next question that needs the text encodes it again
                    continue
                made_by = manifest.fingerprint if manifest else None
                if manifest is None or made_by is None or not self._engine.fingerprint.matches(made_by):
                    continue
                entry = self.entry(key, _digest_of(manifest), manifest.tokens, manifest)
                self._remember(entry, manifest)
                self.entries[key] = entry
                if entry.digest and not self._texts.stats(entry.digest).is_cached:
                    self.note("found", entry, "it was in the store")

    def note(self, action: str, entry: Cached, reason: str) -> None:
        """Log, count and record a decision about a cache.

        The log has a salted hash of the id, which is the same within one run. An id is a hash of the text: with it, a
        reader of the log could test whether a text was used here.
        """
        name = hmac.digest(_SALT, entry.key.encode(), "sha256").hex()[:12]
        logger.info("%s %s (%d tokens): %s", action, name, entry.tokens, reason)
        self._texts.decide(entry.digest, action, reason)

    def _remember(self, entry: Cached, made: KVCacheItem | Manifest) -> None:
        if not entry.digest:
            return
        sources = {*made.records.text_memories, *sources_of(made.metadata)}
        self._texts.encoded(made.records.composed_text_memory, entry.tokens, entry.key, sources)


def _digest_of(made: KVCacheItem | Manifest) -> str:
    """The digest of an item's text; empty for an instruction, which is not counted as a text."""
    return "" if is_instruction(made.id) else digest_of(made.records.composed_text_memory)
