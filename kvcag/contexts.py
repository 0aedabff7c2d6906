"""Items → one context: exact, merged, or what `auto` chooses, and an account of how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, cast, get_args

import torch

from kvcag.cache.layers import LayerKV, concat, layers_of
from kvcag.cache.merge import MergedBefore, Part, check_mergeable, merge, refine
from kvcag.cache.merge import Strategy as MergeStrategy
from kvcag.calibration import calibration_of, usual_drift_of
from kvcag.chat_template import Prompt
from kvcag.core import Item, KVCacheItem, MergedContext, MergeReport, Mode, ids_digest
from kvcag.document_cache import DocumentCache, Ids, same_ids
from kvcag.engines.base import Engine
from kvcag.engines.hf import HFEngine
from kvcag.errors import InvalidInputError, UnsupportedModelError
from kvcag.streams import holding

Strategy: TypeAlias = MergeStrategy | Literal["exact", "auto"]
STRATEGIES: tuple[str, ...] = (*get_args(MergeStrategy), "exact", "auto")

DEFAULT_RATIO = 0.2
"""The recompute ratio of `query`: the share of context tokens that a merge computes again."""

MAX_KL = 0.05
"""Nats per token that `auto` lets a merged context be off, on the calibration's probes."""


def check_strategy(strategy: str, ratio: float) -> None:
    """Refuse an unknown strategy or a ratio out of range.

    Raises:
        InvalidInputError: as said.
    """
    if strategy not in STRATEGIES:
        raise InvalidInputError(f"unknown strategy {strategy!r}. Use one of {', '.join(STRATEGIES)}.")
    if not 0 <= ratio <= 1:
        raise InvalidInputError(f"ratio is {ratio}; it is the share of tokens to recompute, from 0 to 1.")


def reusable(
    documents: DocumentCache,
    prompt: Prompt,
    strategy: Strategy = "auto",
    ratio: float = DEFAULT_RATIO,
    max_kl: float = MAX_KL,
) -> Mode | None:
    """How the engine's recent contexts hold all that a prompt needs of its documents; None if they do not.

    They do where the context is known exactly, and where the prompt continues a conversation over a context that was
    merged with the same settings. Under `auto` they also do where the context was merged for this question, or refined
    for a second one: it is being encoded in the background then, and is exact soon.
    """
    engine, namespace, context_ids = documents.engine, documents.namespace, prompt.context_ids
    if engine.known_prefix(context_ids, namespace) == len(context_ids):
        return "prefix"
    model = cast("HFEngine", engine)
    merged = model.merge_history.get(namespace, context_ids)
    if merged is None or merged.settings != (strategy, ratio, max_kl):
        return None
    known = model.known_prefix(prompt.token_ids[:-1], namespace, merged=True) - len(context_ids)
    if known < 0:
        return None
    answers = len(engine.template.generation_ids)
    asked = [tail[: len(tail) - answers] for tail in merged.tails]
    again = [len(tail) for tail in asked if len(tail) <= known and prompt.tail_ids[: len(tail)] == tail]
    follows = any(len(prompt.tail_ids) > length + answers for length in again)
    return "merged" if follows or (strategy == "auto" and (again or len(asked) > 1)) else None


def context_of_prompt(
    documents: DocumentCache,
    prompt: Prompt,
    strategy: Strategy = "auto",
    ratio: float = DEFAULT_RATIO,
    max_kl: float = MAX_KL,
) -> MergedContext:
    """The context of a prompt with documents: reused, merged from cached documents, or encoded and kept.

    Args:
        documents: where its documents are kept.
        prompt: from `ChatTemplate.prompt`, of messages that hold documents.
        strategy: see `KVCacheMemory.merge`.
        ratio: the recompute ratio, in [0, 1].
        max_kl: what `auto` allows, in nats per token.
    """
    check_strategy(strategy, ratio)
    engine, namespace = documents.engine, documents.namespace
    known = engine.known_prefix(prompt.context_ids, namespace)
    asked = strategy, ratio, max_kl
    chosen, ratio, reason = _choose(engine, prompt.context_ids, known, strategy, ratio, max_kl)
    if chosen == "exact":
        return _because(engine.exact_context(prompt.context_ids, prompt.tail_ids, namespace), reason)
    model = cast("HFEngine", engine)
    if strategy == "auto" and chosen == "query":
        refined = _refined(model, prompt.context_ids, prompt.tail_ids, ratio, namespace, asked)
        if refined is not None:
            return refined
    documents.store.prefetch(documents.key(token_ids) for token_ids in prompt.document_ids)
    found = [
        documents.find_or_encode(prompt.head_ids, token_ids, text)
        for token_ids, text in zip(prompt.document_ids, prompt.documents, strict=True)
    ]
    items = [item for item, _ in found]
    encoded = sum(len(item.token_ids) for item, is_new in found if is_new)
    if encoded:  # the first of them encoded the instruction too
        encoded += max(0, len(prompt.head_ids) - known)
    return _merged(model, prompt.head_ids, items, prompt.tail_ids, chosen, ratio, namespace, encoded, reason, asked)


def context_of_items(
    documents: DocumentCache,
    head_ids: Ids,
    items: Sequence[Item],
    tail_ids: Ids,
    strategy: Strategy = "auto",
    ratio: float = DEFAULT_RATIO,
    max_kl: float = MAX_KL,
) -> MergedContext:
    """Instruction and items as one context, for the question in `tail_ids`. Arguments as for `context_of_prompt`.

    Raises:
        InvalidInputError: an item that this engine did not make; an unknown strategy, a ratio out of range.
        FingerprintMismatchError: another model made an item.
    """
    check_strategy(strategy, ratio)
    engine, namespace = documents.engine, documents.namespace
    for item in items:
        engine.check_item(item)
    context_ids = (*head_ids, *same_ids(items))
    known = engine.known_prefix(context_ids, namespace)
    asked = strategy, ratio, max_kl
    chosen, ratio, reason = _choose(engine, context_ids, known, strategy, ratio, max_kl)
    if chosen == "exact":
        return _because(engine.exact_context(context_ids, tail_ids, namespace), reason)
    return _merged(cast("HFEngine", engine), head_ids, items, tail_ids, chosen, ratio, namespace, 0, reason, asked)


def _choose(
    engine: Engine,
    context_ids: Ids,
    known: int,
    strategy: Strategy,
    ratio: float,
    max_kl: float,
) -> tuple[MergeStrategy | Literal["exact"], float, str]:
    """The strategy to use, its recompute ratio, and why, where it is not the one that was asked for."""
    if not engine.merges:
        asked = "" if strategy in ("exact", "auto") else f"{strategy!r} was asked for, but "
        return "exact", 1.0, f"{asked}a server reads a prompt in order and reuses what it knows of its beginning"
    if strategy == "exact":
        return "exact", 1.0, ""
    if known == len(context_ids):
        return "exact", 1.0, "" if strategy == "auto" else f"the context is known, so {strategy!r} was not needed"
    if strategy != "auto":
        return strategy, ratio, ""
    model = cast("HFEngine", engine)
    try:
        with model.exclusive() as live:
            check_mergeable(live)
    except UnsupportedModelError as refused:
        return "exact", 1.0, f"auto: {refused}"
    calibration = calibration_of(engine)
    if calibration is None:
        return "query", ratio, "auto: not calibrated; kvcag.calibrate(engine, documents) measures what merging costs"
    verdict = calibration.cheapest(max_kl)
    if verdict is None:
        return "exact", 1.0, f"auto: no strategy came within KL {max_kl:g} for less than a full prefill"
    measured = f"KL {verdict.kl:.3f} of {max_kl:g} allowed, at {verdict.cost:.0%} of a full prefill"
    return verdict.strategy, verdict.ratio, f"auto: {verdict.strategy} {verdict.ratio:g}, {measured}"


def _merged(
    engine: HFEngine,
    head_ids: Ids,
    items: Sequence[Item],
    tail_ids: Ids,
    strategy: MergeStrategy,
    ratio: float,
    namespace: str,
    encoded: int,
    reason: str,
    asked: tuple[str, float, float],
) -> MergedContext:
    """Move each document to its position and recompute what the strategy chooses; `encoded` is for the report."""
    head, head_reused = engine.prefill(head_ids, namespace=namespace) if head_ids else ([], 0)
    start_ids, start, first_recomputed = head_ids, head, 0
    if items[0].prefix_digest != ids_digest(head_ids):
        # Encoded behind another instruction. Nearly all that this costs in accuracy is the first document's exactness
        # (benchmarks/instruction_key.py), so it is computed behind this one, and is then a recent context.
        start_ids = (*head_ids, *items[0].token_ids.tolist())
        start, known = engine.prefill(start_ids, namespace=namespace)
        first_recomputed = len(start_ids) - max(known, len(head_ids))
    parts = [Part(torch.tensor(start_ids, dtype=torch.long), start, 0, is_exact=True)] if start_ids else []
    for index, item in enumerate(items):
        assert isinstance(item, KVCacheItem)
        if index == 0 and len(start_ids) > len(head_ids):
            continue
        layers = _beside(head, layers_of(item.memory), engine.device)
        parts.append(Part(item.token_ids, layers, item.base_position, is_exact=index == 0 and item.is_exact))
    context_ids = (*head_ids, *same_ids(items))
    drift = None  # before the model is taken: it is learned with the model, under a lock of its own
    if (strategy == "rotate" or int(ratio * len(context_ids)) == 0) and not all(part.is_exact for part in parts):
        drift = usual_drift_of(engine)
    epoch = engine.prefixes.epoch(namespace)
    with engine.exclusive() as model:
        tail = torch.tensor(tail_ids, dtype=torch.long)
        merged = merge(model, parts, tail, strategy=strategy, ratio=ratio, usual_drift=lambda: drift)
    if engine.prefixes.epoch(namespace) == epoch:
        engine.merge_history.put(namespace, context_ids, MergedBefore(merged.layout, [tuple(tail_ids)], asked))
        engine.prefixes.replace_merged(context_ids, merged.layers, namespace)
    recomputed = len(merged.recomputed) + first_recomputed
    encoded = min(encoded + len(head_ids) - head_reused, len(context_ids) - recomputed)
    report = MergeReport(
        mode="prefix" if all(part.is_exact for part in parts) else "merged",
        strategy=strategy,
        context_tokens=len(context_ids),
        reused_tokens=len(context_ids) - recomputed - encoded,
        recomputed_tokens=recomputed,
        encoded_tokens=encoded,
        reason=reason,
    )
    return engine.context_of(merged.layers, context_ids, tail_ids, report)


def _refined(
    engine: HFEngine, context_ids: Ids, tail_ids: Ids, ratio: float, namespace: str, asked: tuple[str, float, float]
) -> MergedContext | None:
    """A context that was merged for one question, refined for another; None where it is not among the recent ones.

    From the next question on it is reused as it is, and it is encoded as a whole when the model is idle.
    """
    before = engine.merge_history.get(namespace, context_ids)
    if before is None or before.settings != asked:
        return None
    with holding(before.refining):
        matched, pieces = engine.prefixes.match(context_ids, namespace, merged=True)
        if matched < len(context_ids):
            return None
        layers = concat(pieces)
        with engine.exclusive() as model:
            chosen = refine(model, layers, before.layout, torch.tensor(tail_ids, dtype=torch.long), ratio=ratio)
        engine.prefixes.replace_merged(context_ids, layers, namespace)
        before.layout.open[chosen] = False
        before.tails.append(tail_ids)
    engine.encode_when_idle(context_ids, namespace)
    reused = len(context_ids) - len(chosen)
    reason = "merged for an earlier question, refined for this one"
    report = MergeReport("merged", "query", len(context_ids), reused, len(chosen), 0, reason)
    return engine.context_of(layers, context_ids, tail_ids, report)


def _beside(head: Sequence[LayerKV], layers: Sequence[LayerKV], device: torch.device) -> list[LayerKV]:
    """An item's layers where the instruction's are, or on `device`: stores may hold them in the host's memory."""
    places = [keys.device for keys, _ in head] or [device] * len(layers)
    return [(keys.to(at), values.to(at)) for (keys, values), at in zip(layers, places, strict=True)]


def _because(context: MergedContext, reason: str) -> MergedContext:
    return replace(context, report=replace(context.report, reason=reason)) if reason else context
