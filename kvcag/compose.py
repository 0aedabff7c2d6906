"""Items → context: encoded in this order, or merged, and accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal, TypeAlias

import torch

from kvcag.cache.hf import LayerKV, cache_of, layers_of
from kvcag.cache.merge import Part, merge
from kvcag.cache.merge import Strategy as MergeStrategy
from kvcag.context import MergedContext, MergeReport
from kvcag.engines.hf import HFEngine
from kvcag.items import KVCacheItem, ids_digest

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
