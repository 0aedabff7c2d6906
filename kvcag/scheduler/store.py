"""The store of a memory that has a scheduler: within the byte budget, whoever puts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvcag.cache.layers import layers_of, nbytes
from kvcag.core import KVCacheItem
from kvcag.errors import StoreError, StoreFullError
from kvcag.fingerprint import ModelFingerprint
from kvcag.memory import is_context
from kvcag.scheduler.counters import Counters, digest_of
from kvcag.scheduler.log import LogEntry
from kvcag.scheduler.metrics import Tally
from kvcag.scheduler.state import State
from kvcag.scheduler.working_set import Cached, WorkingSet
from kvcag.stores.base import KVStore, StoreStats
from kvcag.stores.format import Manifest


class ScheduledStore(KVStore):
    """A store whose items are a working set: what is put enters if it is worth its bytes, and what it displaces leaves.

    What leaves is recorded before it is deleted, so a text is never lost. What somebody has to find again under its id,
    an item that `KVCacheMemory.add` put or a context with a handle, always enters and never leaves by itself.

    Args:
        inner: where items live.
        working: which are kept.
        counters: how often their texts were asked for.
        state: where what was done is written down.
        tally: where it is counted.
        fingerprint: the model; items of another one are not counted and stay as they are.
        bytes_per_token: of keys and values.
    """

    def __init__(
        self,
        inner: KVStore,
        working: WorkingSet,
        counters: Counters,
        state: State,
        tally: Tally,
        fingerprint: ModelFingerprint,
        bytes_per_token: int,
    ) -> None:
        self.inner, self.working = inner, working
        self._counters, self._state, self._tally = counters, state, tally
        self._fingerprint, self._bytes_per_token = fingerprint, bytes_per_token
        self.lock = threading.RLock()

    # --- as a store --------------------------------------------------------------------------------------------

    def get(self, key: str) -> KVCacheItem | None:
        """The item, or None."""
        item = self.inner.get(key)
        if item is not None:
            self._tally.add(reused_tokens=len(item.token_ids))
        elif key in self.working.entries:
            with self.lock:  # which waits for a put of it
                self._note_gone(key)
        return item

    def put(self, item: KVCacheItem) -> None:
        """Keep an item, if it is worth its bytes.

        Raises:
            StoreFullError: it was added under an id of its own, and does not fit beside others like it.
        """
        self._tally.add(encoded_tokens=len(item.token_ids))
        self.keep(item, "kept", "encoded for a question")

    def keep(
        self,
        item: KVCacheItem,
        action: str,
        reason: str,
        *,
        force: bool = False,
        seconds: float = 0.0,
    ) -> bool:
        """Keep an item, and say why; whether it was kept.

        Raises:
            StoreFullError: it is forced, or somebody's own, and does not fit.
        """
        entry = self._entry(item)
        force = force or not entry.managed
        with self.lock:
            fits = self.working.can_hold(entry)
            if force and not fits:
                raise self.full(entry)
            self._counters.met(item.records.composed_text_memory, entry.tokens)
            leaving = self.working.room_for(entry, self._counters.now, force=force)
            if leaving is None:
                why = "worth less than what it would displace" if fits else "larger than the budget"
                self.log("passed", entry, f"{reason}; {why}", seconds)
                return False
            self.let_go(leaving, "demoted", f"made room for {item.id}")
            self._state.cached(entry, item.records)
            self.working.add(entry)
            try:
                self.inner.put(item)
            except BaseException:
                self.working.remove(entry.key)
                if not self.inner.contains(entry.key):
                    self._state.uncached([entry.key])
                raise
            self.log(action, entry, f"{reason}; {self._uses(entry)}", seconds)
            return True

    def delete(self, keys: Iterable[str]) -> None:
        """Forget items, for their owner."""
        with self.lock:
            listed = list(keys)
            self.let_go(
                [e for key in listed if (e := self.working.entries.get(key))], "dropped", "deleted by its owner"
            )
            self.inner.delete(listed)

    def purge(self, source: str) -> list[str]:
        """Delete everything that was made from one text, and every record of it."""
        with self.lock:
            purged = dict.fromkeys(self.inner.purge(source))
            for digest in self._state.purge(source, self._counters):
                purged |= dict.fromkeys(entry.key for entry in self.working.of_text(digest))
            self.inner.delete(purged)
            for key in purged:
                self.working.remove(key)
            return list(purged)

    def contains(self, key: str) -> bool:
        """As the store beneath."""
        return self.inner.contains(key)

    def keys(self) -> Iterator[str]:
        """As the store beneath."""
        return self.inner.keys()

    def manifest(self, key: str) -> Manifest | None:
        """As the store beneath."""
        return self.inner.manifest(key)

    def stats(self) -> StoreStats:
        """As the store beneath."""
        return self.inner.stats()

    def prefetch(self, keys: Iterable[str]) -> object:
        """As the store beneath."""
        return self.inner.prefetch(keys)

    def close(self) -> None:
        """Close the store beneath."""
        self.inner.close()

    def full(self, entry: Cached) -> StoreFullError:
        """The error where a cache cannot enter, whatever leaves."""
        fixed = sum(e.bytes for e in self.working.entries.values() if not e.managed)
        return StoreFullError(entry.key, entry.bytes, self.working.budget_bytes, fixed)

    # --- as a working set --------------------------------------------------------------------------------------

    def let_go(self, entries: Iterable[Cached], action: str, reason: str) -> list[Cached]:
        """Delete caches, recorded first. Held: `lock`."""
        listed = list(entries)
        if not listed:
            return []
        self._state.uncached(entry.key for entry in listed)
        self.inner.delete([entry.key for entry in listed])
        for entry in listed:
            self.working.remove(entry.key)
        self.log_all(action, [(entry, f"{reason}; {self._uses(entry)}") for entry in listed])
        return listed

    def reconcile(self) -> None:
        """Count what is in the store and not known, and no longer what is not in it any more."""
        with self.lock:
            there = set(self.inner.keys())
            for key in [key for key in self.working.entries if key not in there]:
                self._note_gone(key)
            for key in there - self.working.entries.keys():
                try:
                    manifest = self.inner.manifest(key)
                except StoreError:  # damaged: whoever asks for it encodes it again
                    continue
                if manifest is not None and self._is_ours(manifest):
                    entry = self._found(manifest)
                    self._state.cached(entry, manifest.records)
                    self.working.add(entry)
                    self.log("found", entry, "it was in the store")

    def log(self, action: str, entry: Cached, reason: str, seconds: float = 0.0) -> None:
        """Write down what was done with a cache."""
        self.log_all(action, [(entry, reason)], seconds)

    def log_all(self, action: str, entries: Iterable[tuple[Cached, str]], seconds: float = 0.0) -> None:
        """Write down what was done with caches, each with its reason."""
        now, at = self._counters.now, time.time()
        made = [
            LogEntry(at, action, e.key, e.digest, e.tokens, e.bytes, self.working.worth(e, now), seconds, reason)
            for e, reason in entries
        ]
        for entry in made:
            self._tally.count(action, entry.tokens, seconds)
        self._state.log(made)

    def _note_gone(self, key: str) -> None:
        entry = self.working.entries.get(key)
        if entry is not None and not self.inner.contains(key):
            self.working.remove(key)
            self._state.uncached([key])
            self.log("gone", entry, "the store let it go by itself")

    def _entry(self, item: KVCacheItem) -> Cached:
        size = nbytes(layers_of(item.memory))
        text = item.records.composed_text_memory
        return Cached(item.id, digest_of(text), len(item.token_ids), size, _is_managed(item.id, item.metadata))

    def _found(self, manifest: Manifest) -> Cached:
        self._counters.met(manifest.records.composed_text_memory, manifest.tokens)
        digest = digest_of(manifest.records.composed_text_memory)
        size = manifest.tokens * self._bytes_per_token
        return Cached(manifest.id, digest, manifest.tokens, size, _is_managed(manifest.id, manifest.metadata))

    def _is_ours(self, manifest: Manifest) -> bool:
        return manifest.fingerprint is not None and self._fingerprint.matches(manifest.fingerprint)

    def _uses(self, entry: Cached) -> str:
        use, now = self._counters.use_of(entry.digest), self._counters.now
        if not use.count:
            return "its text was never asked for"
        times = f"{use.count} time{'s' * (use.count > 1)}"
        return f"its text was asked for {times}, last {now - use.last:.1f} rounds ago"


def _is_managed(id: str, metadata: Mapping[str, Any]) -> bool:
    """Whether nobody has to find it under its id: it was kept by its content, and is no context that has a handle."""
    return id.startswith("kv:sha256:") and not is_context(metadata)
