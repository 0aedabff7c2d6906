"""Items → one context: exact, merged or encoded, and an account of how it was made."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal, TypeAlias

import torch

from kvcag.cache.layers import ContextCache, LayerKV, cache_of, layers_of, share
from kvcag.cache.merge import Part, merge
from kvcag.cache.merge import Strategy as MergeStrategy
from kvcag.chat_template import Prompt
from kvcag.core import KVCacheItem, MergedContext, MergeReport, ids_digest
from kvcag.document_cache import Counter, Ids, Keeper
from kvcag.engines.hf import HFEngine

Strategy: TypeAlias = MergeStrategy | Literal["exact", "auto"]

MAX_KL = 0.05
"""Nats a token that `auto` lets a merged context be off, on the calibration's probes."""


def compose(
    engine: HFEngine,
    head_ids: tuple[int, ...],
    items: Sequence[KVCacheItem],
    tail_ids: tuple[int, ...],
    strategy: Strategy,
    ratio: float,
    *,
    max_kl: float = MAX_KL,
    encoded: int = 0,
    tenant: str = "",
) -> MergedContext:
    """Head and items as one context, for the question in `tail_ids`.

    Args:
        engine: the model that made the items.
        head_ids: what stands before them.
        items: in the order in which they shall stand.
        tail_ids: what follows them.
        strategy: as `KVCacheMemory.merge` takes it.
        ratio: the recompute ratio.
        max_kl: what `auto` allows.
        encoded: how many of these tokens the caller has just encoded, for the report.
        tenant: whose recent contexts may be reused.
    """
    context_ids = (*head_ids, *chain.from_iterable(item.token_ids.tolist() for item in items))
    strategy, ratio, reason = _resolve(engine, strategy, ratio, max_kl)
    if strategy == "exact":
        return exact_context(engine, context_ids, tail_ids, tenant, reason)
    head, head_reused = engine.prefill(head_ids, tenant=tenant) if head_ids else ([], 0)
    parts = [Part(torch.tensor(head_ids, dtype=torch.long), head, 0, exact=True)] if head_ids else []
    for index, item in enumerate(items):
        exact = index == 0 and item.exact and item.prefix_digest == ids_digest(head_ids)
        layers = _beside(head, layers_of(item.memory), engine.device)
        parts.append(Part(item.token_ids, layers, item.base_position, exact=exact))
    with engine.exclusive() as model:
        tail = torch.tensor(tail_ids, dtype=torch.long)
        merged = merge(model, parts, tail, strategy=strategy, ratio=ratio, usual_drift=lambda: engine.usual_drift)
    recomputed = len(merged.recomputed)
    encoded = min(encoded + len(head_ids) - head_reused, len(context_ids) - recomputed)
    report = MergeReport(
        mode="exact" if all(part.exact for part in parts) else "merged",
        strategy=strategy,
        context_tokens=len(context_ids),
        reused_tokens=len(context_ids) - recomputed - encoded,
        recomputed_tokens=recomputed,
        encoded_tokens=encoded,
        reason=reason,
    )
    return _context(engine, merged.layers, context_ids, tail_ids, report)


def _beside(head: Sequence[LayerKV], layers: Sequence[LayerKV], device: torch.device) -> list[LayerKV]:
    """An item's layers where the head's are, or on `device`: a disk's or a remote's are read into the host's memory."""
    places = [keys.device for keys, _ in head] or [device] * len(layers)
    return [(keys.to(at), values.to(at)) for (keys, values), at in zip(layers, places, strict=True)]


def exact_context(
    engine: HFEngine, context_ids: tuple[int, ...], tail_ids: tuple[int, ...], tenant: str = "", reason: str = ""
) -> MergedContext:
    """Head and documents encoded in this order, as far as they were not before."""
    engine.warn_unless_kept(len(context_ids))
    layers, reused = engine.prefill(context_ids, tenant=tenant)
    encoded = len(context_ids) - reused
    report = MergeReport("exact" if reused else "encoded", "exact", len(context_ids), reused, 0, encoded, reason)
    return _context(engine, layers, context_ids, tail_ids, report)


def _resolve(
    engine: HFEngine, strategy: Strategy, ratio: float, max_kl: float
) -> tuple[MergeStrategy | Literal["exact"], float, str]:
    """What `auto` stands for: the cheapest strategy that passed the calibration, else all tokens encoded in order."""
    if strategy != "auto":
        return strategy, ratio, ""
    if engine.calibration is None:
        return (
            "exact",
            1.0,
            "auto: not calibrated, so all was encoded; engine.calibrate(documents) measures what may be merged",
        )
    verdict = engine.calibration.cheapest(max_kl)
    if verdict is None:
        return "exact", 1.0, f"auto: no strategy came within KL {max_kl:g} for less than a full prefill"
    measured = f"KL {verdict.kl:.3f} of {max_kl:g} allowed, at {verdict.cost:.0%} of a full prefill"
    return verdict.strategy, verdict.ratio, f"auto: {verdict.strategy} {verdict.ratio:g}, {measured}"


def _context(
    engine: HFEngine,
    layers: Sequence[LayerKV],
    context_ids: tuple[int, ...],
    tail_ids: tuple[int, ...],
    report: MergeReport,
) -> MergedContext:
    return MergedContext(
        cache=cache_of(layers),
        token_ids=torch.tensor(context_ids, dtype=torch.long),
        tail_ids=torch.tensor(tail_ids, dtype=torch.long),
        report=report,
        fingerprint=engine.fingerprint,
    )


@dataclass(frozen=True, slots=True)
class Merging(Keeper):
    """A keeper that also puts together what it keeps.

    Attributes:
        promote_after: see `KVCacheMemory`.
        asked: how often each combination was asked for.
        encoding: of questions that are asked at once, one encodes.
    """

    promote_after: int | None = None
    asked: Counter = field(default_factory=Counter)
    encoding: threading.Lock = field(default_factory=threading.Lock)

    def put(self, item: KVCacheItem) -> None:
        """Keep an item. Its owner may go on writing into it."""
        self.store.put(item.model_copy(update={"memory": share(item.memory)}))

    def get(self, id: str) -> KVCacheItem | None:
        """The item; generating with its `memory` leaves what is stored as it is."""
        item = self.store.get(id)
        return None if item is None else item.model_copy(update={"memory": share(item.memory)})

    def clear(self) -> None:
        """Forget this tenant's recent contexts."""
        self.engine.prefixes.clear(self.tenant)

    def known(self, prompt: Prompt) -> int:
        """How many of the context's tokens were read before, in this order."""
        return self.engine.prefixes.match(prompt.context_ids, self.tenant)[0]

    def cache(self, head_ids: Ids, items: Sequence[KVCacheItem]) -> ContextCache:
        """Head and items as one cache, re-rotated and with nothing recomputed."""
        context = self._compose(head_ids, items, (), "rotate", 0.0)
        exact = context.report.mode == "exact"
        return ContextCache.of(layers_of(context.cache), context.token_ids, context.fingerprint, exact=exact)

    def merge(
        self,
        head_ids: Ids,
        items: Sequence[KVCacheItem],
        tail_ids: Ids,
        strategy: Strategy,
        ratio: float,
        max_kl: float = MAX_KL,
    ) -> MergedContext:
        """Head and items as one context, for the question in `tail_ids`; see `kvcag.contexts.compose`."""
        if strategy == "auto" and (hot := self._hot(head_ids, items, tail_ids)):
            return hot
        return self._compose(head_ids, items, tail_ids, strategy, ratio, max_kl=max_kl)

    def context_for(self, prompt: Prompt, strategy: Strategy, ratio: float, max_kl: float) -> MergedContext:
        """The context of a prompt with documents; see `KVCacheMemory.context_for`."""
        with self.encoding:
            known = self.known(prompt)
            if strategy == "exact" or known == len(prompt.context_ids):
                return exact_context(self.engine, prompt.context_ids, prompt.tail_ids, self.tenant)
            self.store.prefetch(self.key(prompt.head_ids, token_ids) for token_ids in prompt.document_ids)
            kept = [
                self.keep(prompt.head_ids, token_ids, text)
                for token_ids, text in zip(prompt.document_ids, prompt.documents, strict=True)
            ]
        items = [one.item for one in kept]
        encoded = sum(len(one.item.token_ids) for one in kept if one.created)
        if encoded:  # and the head with the first of them
            encoded += max(0, len(prompt.head_ids) - known)
        if strategy == "auto" and (hot := self._hot(prompt.head_ids, items, prompt.tail_ids)):
            return hot
        context = self._compose(
            prompt.head_ids, items, prompt.tail_ids, strategy, ratio, max_kl=max_kl, encoded=encoded
        )
        reasons = "; ".join(dict.fromkeys(one.reason for one in kept if one.reason))
        if reasons:
            reasons = "; ".join(filter(None, (context.report.reason, reasons)))
            context = replace(context, report=replace(context.report, reason=reasons))
        return context

    def _compose(
        self,
        head_ids: Ids,
        items: Sequence[KVCacheItem],
        tail_ids: Ids,
        strategy: Strategy,
        ratio: float,
        *,
        max_kl: float = MAX_KL,
        encoded: int = 0,
    ) -> MergedContext:
        return compose(
            self.engine,
            head_ids,
            items,
            tail_ids,
            strategy,
            ratio,
            max_kl=max_kl,
            encoded=encoded,
            tenant=self.tenant,
        )

    def _hot(self, head_ids: Ids, items: Sequence[KVCacheItem], tail_ids: Ids) -> MergedContext | None:
        """The exact context, where it is known, or is asked so often in this order that it is worth encoding."""
        context_ids = (*head_ids, *chain.from_iterable(item.token_ids.tolist() for item in items))
        if self.engine.prefixes.match(context_ids, self.tenant)[0] == len(context_ids):
            return exact_context(self.engine, context_ids, tail_ids, self.tenant)
        if self.promote_after is None or not self.engine.keeps(len(context_ids)) or len(items) < 2:
            return None
        if self.asked.count(context_ids) <= self.promote_after:
            return None
        reason = f"merged {self.promote_after} times in this order, so encoded as a whole"
        return exact_context(self.engine, context_ids, tail_ids, self.tenant, reason)
