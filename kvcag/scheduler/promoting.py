"""Text → cache, ahead of the questions: what is hot, in which order, after which instruction."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kvcag.core import KVCacheRecords
from kvcag.document_cache import Ids
from kvcag.documents import text_and_metadata
from kvcag.engines.background import encode_in_background
from kvcag.engines.hf import HFEngine
from kvcag.engines.model_lock import Interrupted
from kvcag.errors import ContextLengthError, EmptyPromptError, UnknownItemError
from kvcag.memory import KVCacheMemory
from kvcag.scheduler.counters import Counters, Known, digest_of
from kvcag.scheduler.metrics import Tally
from kvcag.scheduler.policy import Use
from kvcag.scheduler.state import State
from kvcag.scheduler.store import ScheduledStore
from kvcag.scheduler.working_set import Cached

_MARGIN = 1.25
"""How many times more a text has to be worth than each cache that it displaces, to be encoded for that: otherwise two
texts that are asked for alike would displace each other for ever."""
_TRIES = 8
"""Texts that are too large, or not worth it, before a pass ends: those that follow are worth less."""
_SCORED_AT_ONCE = 512


class Promoter:
    """Encodes texts while nobody asks anything, and keeps them.

    Args:
        memory: whose instruction and separator stand around texts until questions show what does.
        engine: the model.
        store: where they are kept.
        counters: how often they were asked for, and where they stood.
        state: their texts.
        tally: where what is done is counted.
        stop: gives up, between two layers.
        quiet_s: see `CacheScheduler`.
        piece_tokens: see `CacheScheduler`.
        promote_after: see `CacheScheduler`.
        meanwhile: called now and then while an answer is waited for.
    """

    def __init__(
        self,
        memory: KVCacheMemory,
        engine: HFEngine,
        store: ScheduledStore,
        counters: Counters,
        state: State,
        tally: Tally,
        *,
        stop: threading.Event,
        quiet_s: float,
        piece_tokens: int,
        promote_after: int,
        meanwhile: Callable[[], None],
    ) -> None:
        self._memory, self._engine, self._store = memory, engine, store
        self._counters, self._state, self._tally = counters, state, tally
        self._stop, self._quiet_s, self._meanwhile = stop, quiet_s, meanwhile
        self._piece_tokens, self._promote_after = piece_tokens, promote_after
        self._refused: set[str] = set()

    def promote_hot(self) -> list[str]:
        """Encode what is worth more than what it displaces, the most worth first; the ids of the caches.

        Raises:
            Interrupted: the scheduler was closed meanwhile.
        """
        promoted: list[str] = []
        not_worth_it = 0
        for _, digest in self._candidates():
            known = self._counters.known.get(digest)
            if known is None or self._store.working.of_text(digest):
                continue
            entry = self._estimate(digest, known)
            with self._store.lock:
                room = self._store.working.room_for(entry, self._counters.now, margin=_MARGIN)
            if room is None:
                not_worth_it += 1
                if not_worth_it == _TRIES:
                    break
                continue
            key = self._encode(digest, known, "hot, and not cached", force=False)
            promoted += [key] if key else []
        return promoted

    def promote(self, what: object) -> str:
        """Encode one text now, given as such or by the id of a cache that it had; the id of its cache.

        Raises:
            EmptyPromptError: it is empty.
            StoreFullError: it is larger than the budget.
            UnknownItemError: no cache of this id is, or was, kept.
        """
        text = self._text(what)
        digest = digest_of(text)
        known = self._counters.known.get(digest) or Known(Use(last=self._counters.now), len(text) // 4 + 1, text)
        key = self._encode(digest, known, "on demand", force=True)
        assert key is not None
        return key

    def caches_of(self, what: object) -> list[Cached]:
        """The caches that are kept of a text, or under an id."""
        if isinstance(what, str) and what in self._store.working.entries:
            return [self._store.working.entries[what]]
        return self._store.working.of_text(digest_of(text_and_metadata(what)[0]))

    def _text(self, what: object) -> str:
        text = text_and_metadata(what)[0]
        if isinstance(what, str) and what.startswith("kv:sha256:"):
            recorded = self._state.records(what)
            if recorded is None:
                raise UnknownItemError([what])
            text = recorded[1].composed_text_memory
        if not text.strip():
            raise EmptyPromptError("a text is empty: there is nothing to encode")
        return text

    def _candidates(self) -> list[tuple[float, str]]:
        """What is asked for and not cached, the most worth first. Scored while nobody asks, as all the rest."""
        found: list[tuple[float, str]] = []
        not_these = self._refused | {entry.digest for entry in list(self._store.working.entries.values())}
        texts = list(self._counters.known.items())
        for start in range(0, len(texts), _SCORED_AT_ONCE):
            with self._engine.lock.idle(self._quiet_s, self._stop, self._meanwhile):
                for digest, known in texts[start : start + _SCORED_AT_ONCE]:
                    hot = known.use.count >= self._promote_after and digest not in not_these
                    if hot and self._shown(known):
                        worth = self._store.working.worth(self._estimate(digest, known), self._counters.now)
                        found.append((worth, digest))
        return sorted(found, reverse=True)

    def _estimate(self, digest: str, known: Known) -> Cached:
        return Cached("", digest, known.tokens, known.tokens * self._engine.bytes_per_token)

    def _shown(self, known: Known) -> bool:
        """Whether it is known how this text will stand in a prompt: it did, or others did as retrievers find them."""
        return known.asked or not self._counters.places or self._counters.place_for(known) is not None

    def _segment(self, digest: str, known: Known) -> tuple[Ids, str] | None:
        """The instruction that a text will stand after, and the text as it will stand."""
        text = known.text if known.text is not None else self._state.text(digest)
        if text is None:
            return None
        place = self._counters.place_for(known)
        if place is None:
            head_ids = self._engine.template.instruction_ids(self._memory.instruction)
            ends = known.asked or text.endswith("\n")
            return head_ids, text if ends else text + self._memory.separator
        return place.head_ids, text if known.asked else text + (place.ending or "")

    def _fits(self, entry: Cached, known: Known, force: bool) -> bool:
        """Whether it is worth its room, now that its tokens are counted. Raises `StoreFullError` if it has to be."""
        known.tokens = entry.tokens
        with self._store.lock:
            if force and not self._store.working.can_hold(entry):
                raise self._store.full(entry)
            return force or self._store.working.room_for(entry, self._counters.now, margin=_MARGIN) is not None

    def _encode(self, digest: str, known: Known, reason: str, *, force: bool) -> str | None:
        """Encode a text and keep it; its id, or None where it was not kept."""
        began = time.monotonic()
        segment = self._segment(digest, known)
        if segment is None:
            return None
        head_ids, text = segment
        token_ids = self._engine.template.encode(text)
        key = self._memory.documents.key(token_ids)
        if self._store.contains(key):
            self._store.reconcile()
            return key
        entry = Cached(key, digest, len(token_ids), len(token_ids) * self._engine.bytes_per_token)
        if not self._fits(entry, known, force):
            return None
        try:
            layers, interruptions = encode_in_background(
                self._engine,
                head_ids,
                token_ids,
                stop=self._stop,
                namespace=self._memory.namespace,
                piece_tokens=self._piece_tokens,
                quiet_s=self._quiet_s,
                meanwhile=self._meanwhile,
                wanted=lambda: not self._store.contains(key),
            )
            with self._engine.lock.idle(self._quiet_s, self._stop, self._meanwhile):
                pass  # a question that has come meanwhile does not wait for a disk, either
        except Interrupted:
            if self._stop.is_set():
                raise
            return None  # a question has encoded it meanwhile
        except ContextLengthError as error:
            if force:
                raise
            self._refused.add(digest)
            self._store.log("failed", entry, str(error))
            return None
        self._tally.add(interruptions=interruptions)
        item = self._engine.item_of(layers, head_ids, token_ids)
        item.records = KVCacheRecords(text_memories=[text], composed_text_memory=text)
        item.metadata = {"source_text": text}
        kept = self._store.keep(item, "promoted", reason, force=force, seconds=time.monotonic() - began)
        return key if kept else None
