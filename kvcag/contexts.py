"""Finds or encodes documents, and makes one context of them: exact, merged, or as `auto` chooses."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, TypeAlias, cast
from weakref import WeakValueDictionary

import torch

from kvcag.cache.layers import LayerKV, Layers, cache_of, concat, cut, layers_of, length_of, share, states_of
from kvcag.cache.merge import Merged, MergedBefore, Part, check_merge, merge, refine
from kvcag.calibration import calibration_of, learned_drift_of, usual_drift_of
from kvcag.chat_template import Prompt
from kvcag.concurrency import holding
from kvcag.core import (
    EncodedItem,
    Item,
    KVCacheItem,
    MergedContext,
    MergeReport,
    MergeSettings,
    MergeStrategy,
    Mode,
    VLLMKVCacheItem,
    content_key,
    ids_digest,
)
from kvcag.engines.base import Engine
from kvcag.engines.decode import KnownPrefix
from kvcag.engines.hf import HFEngine
from kvcag.errors import (
    CacheWarning,
    FingerprintMismatchError,
    InvalidInputError,
    StoreError,
    StoreUnavailableError,
    UnsupportedModelError,
    WarnOnce,
)
from kvcag.fingerprint import KVCacheRecords
from kvcag.stores.base import ENCODED_BEHIND, KVStore, sources_of, stands_behind
from kvcag.stores.files import INSTRUCTION, WORTH_STORING, Manifest


def reusable(documents: DocumentCache, prompt: Prompt, settings: MergeSettings) -> Mode | None:
    """Return whether the prompt's context can be reused from the engine's recent contexts, and how; None if not.

    It can be reused if it is known exactly (`prefix`), or if the prompt continues a conversation over a context that
    was merged with the same settings (`merged`). `auto` also reuses a context that was merged for this question before,
    or refined for a second question: by then it is being encoded in the background, and will soon be exact.

    A prompt without documents has an empty context. It is `merged` if a conversation with an edited history
    (`with_kept_history`) has a longer prefix of it than the exact contexts have.
    """
    engine, namespace, context_ids = documents.engine, documents.namespace, prompt.context_ids
    model = cast("HFEngine", engine)
    if engine.known_prefix(context_ids, namespace) == len(context_ids):
        if not model.merge_history.continues(namespace, prompt.token_ids, settings, behind=len(context_ids)):
            return "prefix"
        before = prompt.token_ids[:-1]
        exact, known = model.known_prefix(before, namespace), model.known_prefix(before, namespace, merged=True)
        return "merged" if known > exact else "prefix"
    merged = model.merge_history.get(namespace, context_ids)
    if merged is None or merged.settings != settings:
        return None
    known = model.known_prefix(prompt.token_ids[:-1], namespace, merged=True) - len(context_ids)
    if known < 0:
        return None
    answers = len(engine.template.generation_ids)
    questions = [tail[: len(tail) - answers] for tail in merged.tails]
    again = [len(tail) for tail in questions if len(tail) <= known and prompt.tail_ids[: len(tail)] == tail]
    follows = any(len(prompt.tail_ids) > length + answers for length in again)
    return "merged" if follows or (settings.strategy == "auto" and (again or len(questions) > 1)) else None


def context_of_prompt(documents: DocumentCache, prompt: Prompt, settings: MergeSettings) -> MergedContext:
    """Return the context of a prompt with documents: reused, merged from cached documents, or encoded and stored.

    Args:
        documents: finds, encodes and stores the documents.
        prompt: from `ChatTemplate.prompt`, of messages with documents.
        settings: how to merge.
    """
    with documents.instruction(prompt.instruction_ids):
        return _context_of_prompt(documents, prompt, settings)


def _context_of_prompt(documents: DocumentCache, prompt: Prompt, settings: MergeSettings) -> MergedContext:
    engine, namespace, context_ids = documents.engine, documents.namespace, prompt.context_ids
    known = engine.known_prefix(context_ids, namespace)
    chosen, ratio, reason = _choose(engine, context_ids, known, settings)
    if chosen == "exact" and not is_stored_whole(documents, prompt):
        return _because(engine.exact_context(context_ids, prompt.tail_ids, namespace), reason)
    model = cast("HFEngine", engine)
    if settings.strategy == "auto" and chosen == "query":
        refined = _refined(model, context_ids, prompt.tail_ids, ratio, namespace, settings)
        if refined is not None:
            return refined
    at, pieces = _recent_start(model, prompt, known, namespace, settings)
    needed = [index for index, place in enumerate(prompt.document_places) if place.start >= at]
    documents.store.prefetch(documents.key(prompt.kept_ids[index]) for index in needed)
    if pieces:
        start = _Start(context_ids[:at], cut(concat(pieces), 0, at), is_exact=False)
    else:
        start = _Start.prefilled(model, context_ids[:at], namespace)
    found: list[Item | Ids] = []
    for index in needed:
        place = prompt.document_places[index]
        if at < place.start:
            found.append(context_ids[at : place.start])
        item, is_new = documents.find_or_encode(prompt.head_ids, prompt.kept_ids[index], prompt.documents[index])
        found.append(_beginning(item, len(place)))
        at, start = place.stop, start.paid(encoded=len(place) * is_new)
    start, parts = _parts(model, start, prompt.head_ids, found, namespace)
    return _merged(model, start, parts, prompt.tail_ids, chosen, ratio, namespace, reason, settings)


def with_kept_history(
    documents: DocumentCache,
    prompt: Prompt,
    context: MergedContext | None,
    settings: MergeSettings,
    *,
    accept_merged: bool = False,
) -> MergedContext | None:
    """Extend a context with messages that are at other positions in recent contexts; None if too few are found.

    When a history is trimmed, summarised or cleared in the middle, the remaining messages are moved to their new
    positions, and new tokens between them are computed. `auto` recomputes no moved token: the error is small, and
    recomputing takes half as long as a full prefill (`benchmarks/edited_history.py`). The other strategies recompute
    what they always do.

    Args:
        documents: has the engine and the namespace.
        prompt: the prompt.
        context: the context of its documents. None: the longest recent context that the prompt begins with.
        settings: how to merge.
        accept_merged: that recent context may be a merged one.
    """
    model, namespace, token_ids = cast("HFEngine", documents.engine), documents.namespace, prompt.token_ids
    if model.is_recurrent:
        return None  # tokens in the middle of a conversation have no maps of the recurrent states
    if context is None:
        recent = KnownPrefix().longest(model.prefixes, token_ids[:-1], namespace, merged=accept_merged)
    else:
        recent = KnownPrefix(len(context.token_ids), [layers_of(context.cache)], context.report.mode == "merged")
    at = recent.length
    if len(token_ids) - at < _WORTH_MOVING:
        return None
    runs = model.prefixes.runs(token_ids[:-_LEAST_QUESTION], at, namespace)
    moved = sum(run.length for run in runs)
    if moved < max(_WORTH_MOVING, (len(token_ids) - at) / 2):
        return None
    if not model.is_mergeable:  # the model reads the history again
        return None
    chosen, ratio, _ = _choose(model, token_ids, 0, settings)
    if chosen == "exact":
        return None
    if settings.strategy == "auto":
        chosen, ratio = "rotate", 0.0
    parts: list[Part] = []
    for run in runs:
        parts.append(_read_in_place(token_ids[at : run.start]))
        ids = torch.tensor(token_ids[run.start : run.end], dtype=torch.long)
        parts.append(Part(ids, concat(run.pieces), run.stood, is_exact=False, is_document=False))
        at = run.end
    start = _Start(token_ids[: recent.length], concat(recent.pieces), is_exact=not recent.is_merged)
    reason = f"{moved:,} tokens of the conversation were moved to their new positions"
    if context is not None:
        start = start.paid(context.report.recomputed_tokens, context.report.encoded_tokens)
        reason = "; ".join(filter(None, [context.report.reason, reason]))
    return _merged(model, start, parts, token_ids[at:], chosen, ratio, namespace, reason, settings)


_WORTH_MOVING = 256
"""A history is moved only if at least this many tokens, and half of those that the model would read, can be moved.
Otherwise the model reads them, which is exact."""

_LEAST_QUESTION = 32
"""How many tokens at the end of a prompt are always read. `query` chooses tokens by their attention."""


def is_stored_whole(documents: DocumentCache, prompt: Prompt) -> bool:
    """Whether the store has the whole context of a prompt: one document, encoded after the prompt's instruction.

    False also if the context is among the recent ones, or the store cannot be read: the engine then reads the prompt.
    """
    engine, context_ids = documents.engine, prompt.context_ids
    if not engine.merges or len(prompt.document_ids) != 1:
        return False
    if cast("HFEngine", engine).is_recurrent and context_ids != (*prompt.head_ids, *prompt.kept_ids[0]):
        return False  # the item's states follow its last token, and this prompt does not use all of its tokens
    if engine.known_prefix(context_ids, documents.namespace) == len(context_ids):
        return False
    try:
        manifest = documents.store.manifest(documents.key(prompt.kept_ids[0]))
    except StoreError as unreadable:
        documents.warn("encoding a document again", unreadable)
        return False
    return manifest is not None and manifest.is_exact and manifest.prefix_digest == ids_digest(prompt.head_ids)


def context_of_items(
    documents: DocumentCache, head_ids: Ids, items: Sequence[Item], tail_ids: Ids, settings: MergeSettings
) -> MergedContext:
    """Return instruction and items as one context for a question.

    Args:
        documents: has the engine and the namespace.
        head_ids: the tokens of the instruction.
        items: the items, in the order of the context.
        tail_ids: the tokens of the question.
        settings: how to merge.

    Raises:
        InvalidInputError: an item is not of the engine's type, or has no fingerprint.
        FingerprintMismatchError: another model made an item.
    """
    engine, namespace = documents.engine, documents.namespace
    for item in items:
        documents.check_item(item)
    context_ids = (*head_ids, *same_ids(items))
    known = engine.known_prefix(context_ids, namespace)
    chosen, ratio, reason = _choose(engine, context_ids, known, settings)
    if chosen == "exact":
        return _because(engine.exact_context(context_ids, tail_ids, namespace), reason)
    model = cast("HFEngine", engine)
    start, parts = _parts(model, _Start.prefilled(model, head_ids, namespace), head_ids, items, namespace)
    return _merged(model, start, parts, tail_ids, chosen, ratio, namespace, reason, settings)


def _choose(
    engine: Engine, context_ids: Ids, known: int, settings: MergeSettings
) -> tuple[MergeStrategy | Literal["exact"], float, str]:
    """Return the strategy, its recompute ratio, and the reason if the caller did not ask for this strategy."""
    strategy, ratio, max_kl = settings.strategy, settings.ratio, settings.max_kl
    if not engine.merges:
        asked = "" if strategy in ("exact", "auto") else f"{strategy!r} was asked for, but "
        return "exact", 1.0, f"{asked}a server reads a prompt in order and reuses the longest cached prefix"
    if strategy == "exact":
        return "exact", 1.0, ""
    if known == len(context_ids):
        return "exact", 1.0, "" if strategy == "auto" else f"the context is known, so {strategy!r} was not needed"
    model = cast("HFEngine", engine)
    if strategy != "auto":
        if model.is_recurrent:
            with model.exclusive() as live:
                check_merge(live, strategy)
        return strategy, ratio, ""
    try:
        model.check_mergeable()
    except UnsupportedModelError as refused:
        return "exact", 1.0, f"auto: {refused}"
    calibration = calibration_of(engine)
    if calibration is None and model.is_recurrent:
        reason = "not calibrated; kvcag.calibrate(engine, documents) measures whether recurrent layers merge well"
        return "exact", 1.0, f"auto: {reason}"
    if calibration is None:
        return "query", ratio, "auto: not calibrated; kvcag.calibrate(engine, documents) measures what merging costs"
    verdict = calibration.cheapest(max_kl)
    if verdict is None:
        return "exact", 1.0, f"auto: no strategy came within KL {max_kl:g} for less than a full prefill"
    measured = f"KL {verdict.kl:.3f} of {max_kl:g} allowed, at {verdict.cost:.0%} of a full prefill"
    return verdict.strategy, verdict.ratio, f"auto: {verdict.strategy} {verdict.ratio:g}, {measured}"


@dataclass(frozen=True, slots=True)
class _Start:
    """The beginning of a context, and the counts of its report so far.

    Attributes:
        token_ids: the tokens of the beginning.
        layers: their keys and values, `(1, kv_heads, seq_len, head_dim)` per layer; read only.
        is_exact: the keys and values are those that the model computes for these tokens.
        recomputed: cached tokens of the context that were computed again.
        encoded: tokens of the context that were not cached.
        in_context: tokens of later documents that were encoded after another document.
    """

    token_ids: Ids
    layers: list[LayerKV]
    is_exact: bool = True
    recomputed: int = 0
    encoded: int = 0
    in_context: int = 0

    @classmethod
    def prefilled(cls, engine: HFEngine, token_ids: Ids, namespace: str) -> _Start:
        """Prefill `token_ids`, which become a recent context."""
        known, pieces = engine.prefixes.match(token_ids, namespace)
        if known == len(token_ids) and len(pieces) == 1 and not engine.is_recurrent:
            return cls(token_ids, pieces[0])  # no copy, because `layers` are only read
        layers, reused = engine.prefill(token_ids, namespace=namespace) if token_ids else ([], 0)
        return cls(token_ids, layers, encoded=len(token_ids) - reused)

    def paid(self, recomputed: int = 0, encoded: int = 0) -> _Start:
        """Return the same beginning with higher counts."""
        return replace(self, recomputed=self.recomputed + recomputed, encoded=self.encoded + encoded)


def _recent_start(
    engine: HFEngine, prompt: Prompt, known: int, namespace: str, settings: MergeSettings
) -> tuple[int, list[Layers]]:
    """Return how many tokens at the beginning of a context are reused unchanged, and their layers if they were merged.

    The head is always among them, and no document is cut: of the `known` exact tokens, a partial document is left out.
    If the prompt continues a conversation over documents that were merged with the same settings, the merged tokens
    before the last group of documents are reused. Exact tokens have no layers here: the caller prefills them.
    """
    places = prompt.document_places

    def whole(length: int) -> int:
        cut_short = (place.start for place in places if place.start < length < place.stop)
        return next(cut_short, max(length, len(prompt.head_ids)))

    last_group = max((index for index, between in enumerate(prompt.between_ids, start=1) if between), default=0)
    if engine.is_recurrent:
        return whole(known), []  # a merged context has recurrent states only at its end
    if last_group and engine.merge_history.continues(
        namespace, prompt.token_ids, settings, behind=len(prompt.head_ids)
    ):
        before = prompt.context_ids[: places[last_group].start]
        matched, pieces = engine.prefixes.match(before, namespace, merged=True)
        if whole(matched) > whole(known):
            return whole(matched), pieces
    return whole(known), []


def _parts(
    engine: HFEngine, start: _Start, head_ids: Ids, found: Sequence[Item | Ids], namespace: str
) -> tuple[_Start, list[Part]]:
    """Return documents and the texts between them as parts after `start`.

    Also returns `start`, which includes the first document if that document had to be computed again.
    """
    digest = ids_digest(start.token_ids)
    if start.token_ids == head_ids and not isinstance(found[0], tuple) and found[0].prefix_digest != digest:
        # The first document was encoded after another instruction or document. Nearly all of the accuracy that this
        # costs is lost in the first document (benchmarks/instruction_key.py), so it is computed again after this
        # instruction, and becomes a recent context.
        start_ids = (*head_ids, *found[0].token_ids.tolist())
        layers, known = engine.prefill(start_ids, namespace=namespace)
        start = replace(start, token_ids=start_ids, layers=layers)
        start, found = start.paid(recomputed=len(start_ids) - max(known, len(head_ids))), found[1:]
    head = engine.prefill(head_ids, namespace=namespace)[0] if engine.is_recurrent and head_ids else []
    parts, device = [], engine.device
    for index, piece in enumerate(found):
        if isinstance(piece, tuple):
            parts.append(_read_in_place(piece))
            continue
        assert isinstance(piece, KVCacheItem)
        exact = index == 0 and start.is_exact and piece.is_exact and piece.prefix_digest == digest
        layers = _beside(start.layers, layers_of(piece.memory), device)
        if engine.is_recurrent and not _composes(layers, exact or piece.prefix_digest == ids_digest(head_ids), exact):
            parts.append(_read_in_place(tuple(piece.token_ids.tolist())))
            continue
        alone = ENCODED_BEHIND not in piece.metadata
        states = states_of(head)
        parts.append(Part(piece.token_ids, layers, piece.base_position, exact, is_alone=alone, states_before=states))
        start = replace(start, in_context=start.in_context + (0 if alone else len(piece.token_ids)))
    return start, parts


def _composes(layers: Layers, behind_the_head: bool, exact: bool) -> bool:
    """Whether a document's recurrent states can follow others: not if it was cut or encoded after another head."""
    return behind_the_head and layers.states is not None and (exact or layers.states.is_map)


def _read_in_place(token_ids: Ids) -> Part:
    return Part(torch.tensor(token_ids, dtype=torch.long), None, 0, is_exact=False, is_document=False)


def _merged(
    engine: HFEngine,
    start: _Start,
    parts: Sequence[Part],
    tail_ids: Ids,
    strategy: MergeStrategy | Literal["exact"],
    ratio: float,
    namespace: str,
    reason: str,
    settings: MergeSettings,
) -> MergedContext:
    """Move each part to its position after `start`, and recompute the tokens that the strategy chooses.

    If `start` is a merged context, `ratio` is the share of the tokens after it. The strategy `exact` is for one
    document that was encoded after this instruction, which needs no change.
    """
    context_ids = (*start.token_ids, *chain.from_iterable(part.token_ids.tolist() for part in parts))
    if not start.is_exact:
        ratio *= 1 - len(start.token_ids) / len(context_ids)
    drift = learned = None  # looked up before the model's lock is taken, because they have their own lock
    corrected = [part for part in parts if part.is_document and not part.is_exact]
    if strategy != "full" and corrected:
        learned = learned_drift_of(engine, namespace)
        recomputes_nothing = strategy == "rotate" or int(ratio * len(context_ids)) == 0
        if learned is None and recomputes_nothing and any(part.is_alone for part in corrected):
            drift = usual_drift_of(engine)
    begun = [Part(torch.tensor(start.token_ids, dtype=torch.long), start.layers, 0, is_exact=True)] * bool(start.layers)
    epoch = engine.epoch(namespace)
    tail = torch.tensor(tail_ids, dtype=torch.long)
    criterion: MergeStrategy = "rotate" if strategy == "exact" else strategy

    def put_together() -> Merged:
        with engine.exclusive() as model:
            return merge(
                model,
                [*begun, *parts],
                tail,
                strategy=criterion,
                ratio=ratio,
                usual_drift=lambda: drift,
                learned_drift=learned.drift if learned else None,
                passes=engine.merge_passes,
            )

    merged = engine.with_memory(put_together)
    if engine.prefixes.epoch(namespace) == epoch:
        engine.merge_history.put(namespace, context_ids, MergedBefore(merged.layout, [tuple(tail_ids)], settings))
        engine.prefixes.replace_merged(context_ids, merged.layers, namespace)
    if engine.prefixes.epoch(namespace) != epoch:  # `forget` was called in the meantime
        engine.merge_history.clear(namespace)
    recomputed = len(merged.recomputed) + start.recomputed
    encoded = start.encoded + sum(len(part.token_ids) for part in parts if part.layers is None)
    encoded = min(encoded, len(context_ids) - recomputed)
    report = MergeReport(
        mode="prefix" if start.is_exact and all(part.is_exact for part in parts) else "merged",
        strategy=strategy,
        context_tokens=len(context_ids),
        reused_tokens=len(context_ids) - recomputed - encoded,
        recomputed_tokens=recomputed,
        encoded_tokens=encoded,
        reason=reason,
        in_context_tokens=start.in_context,
        drift=learned.digest if learned else "",
    )
    return engine.context_of(merged.layers, merged.layout.token_ids, tail_ids, report, merged.read)


def _refined(
    engine: HFEngine, context_ids: Ids, tail_ids: Ids, ratio: float, namespace: str, settings: MergeSettings
) -> MergedContext | None:
    """Refine a context that was merged for another question; None if it is not among the recent contexts.

    Later questions reuse the refined context unchanged. It is encoded as a whole when the model is idle.
    """
    before = engine.merge_history.get(namespace, context_ids)
    if before is None or before.settings != settings:
        return None
    with holding(before.refining):
        matched, pieces = engine.prefixes.match(context_ids, namespace, merged=True)
        if matched < len(context_ids):
            return None
        layout, tail = before.layout, torch.tensor(tail_ids, dtype=torch.long)

        def for_this_question() -> Merged:
            with engine.exclusive() as model:
                return refine(model, pieces, layout, tail, ratio=ratio, passes=engine.merge_passes)

        refined = engine.with_memory(for_this_question)
        engine.prefixes.replace_merged(context_ids, refined.layers, namespace)
        before.layout = refined.layout
        before.tails.append(tail_ids)
    engine.encode_when_idle(context_ids, namespace)
    recomputed = len(refined.recomputed)
    reused = len(context_ids) - recomputed
    reason = "merged for an earlier question, refined for this one"
    report = MergeReport("merged", "query", len(context_ids), reused, recomputed, 0, reason)
    return engine.context_of(refined.layers, refined.layout.token_ids, tail_ids, report, refined.read)


def _beginning(item: Item, length: int) -> Item:
    """Return the first `length` tokens of an item. They do not depend on later tokens."""
    if length == len(item.token_ids):
        return item
    assert isinstance(item, KVCacheItem)
    layers = cut(layers_of(item.memory), 0, length)
    return item.model_copy(update={"token_ids": item.token_ids[:length], "memory": cache_of(layers)})


def _beside(head: Sequence[LayerKV], layers: Layers, device: torch.device) -> Layers:
    """Move an item's layers to the devices of `head`'s layers, or else to `device`, as a store may have them on CPU."""
    wanted = head.devices if isinstance(head, Layers) and head else {device}
    if layers.states is None and layers.devices == wanted and len(wanted) == 1:
        return layers
    places = [keys.device for keys, _ in head] or [device] * len(layers)
    states = states_of(layers)
    beside = ((keys.to(at), values.to(at)) for (keys, values), at in zip(layers, places, strict=True))
    return Layers(beside, states and states.mapped(lambda state: state.to(device)), length_of(layers))


def _is_spread(engine: HFEngine) -> bool:
    """Whether the model's layers are on several accelerators. A store does not record on which."""
    places = set(getattr(engine.model, "hf_device_map", {}).values())
    return len(places - {"cpu", "disk"}) > 1


def _because(context: MergedContext, reason: str) -> MergedContext:
    return replace(context, report=replace(context.report, reason=reason)) if reason else context


Ids: TypeAlias = tuple[int, ...]

_SERVED = "served"
"""A metadata key of a stored `VLLMKVCacheItem`, with the item's prompt and token ids. The item has no tensors."""
_guard = threading.Lock()


@dataclass(frozen=True, slots=True)
class DocumentCache:
    """Finds, encodes and stores the documents of one namespace. An item's id is its content key.

    Attributes:
        engine: the model that encodes.
        store: where items are stored.
        namespace: the namespace whose recent contexts the engine may reuse.
        since: the value of the store's `deletions` before texts were read from the store, so that a text that is
            deleted later is not put back. None: the texts do not come from the store.
        encoding: a lock per document that is being looked up or encoded, by id.
        notices: the warnings about the store that were given.
        instructions: ids of instructions that this process has found in the store.
    """

    engine: Engine
    store: KVStore
    namespace: str = ""
    since: Hashable = None
    encoding: WeakValueDictionary[str, threading.Lock] = field(default_factory=WeakValueDictionary)
    notices: WarnOnce = field(default_factory=WarnOnce)
    instructions: set[str] = field(default_factory=set)

    def key(self, token_ids: Iterable[int]) -> str:
        """Return the id of a document, its content key."""
        return content_key(self.engine.fingerprint.digest, token_ids)

    def contains(self, head_ids: Ids, token_ids: Ids, behind: Behind = None) -> bool:
        """Whether a document can be used without encoding it. False, with a warning, if the store fails."""
        try:
            key = self.key(token_ids)
            return self.store.contains(key) and self._fits(key, head_ids, token_ids, behind)
        except StoreError as error:
            self.warn("documents are encoded, and may not be stored", error)
            return False

    def containing(self, head_ids: Ids, documents: Mapping[str, Read]) -> set[str]:
        """Return the ids of those documents for which `contains` is true, with few requests to a remote store."""
        try:
            kept = self.store.containing(documents)
            return {key for key in kept if self._fits(key, head_ids, documents[key].token_ids, documents[key].behind)}
        except StoreError as error:
            self.warn("documents are encoded, and may not be stored", error)
            return set()

    def _fits(self, key: str, head_ids: Ids, token_ids: Ids, behind: Behind) -> bool:
        """Whether an item in the store was encoded as needed, and a server, if there is one, still has its caches."""
        if not self.engine.still_holds((*head_ids, *token_ids), self.namespace):
            return False
        manifest = None if behind is None else self.store.manifest(key)
        return behind is None or (manifest is not None and stands_behind(manifest) == _names(behind)[:1])

    def encode(
        self,
        head_ids: Ids,
        token_ids: Ids,
        text: str,
        metadata: Mapping[str, Any] | None = None,
        behind: Behind = None,
    ) -> Item:
        """Encode a document after `head_ids` and the documents `behind`, of which the end is used if they are long.

        The item is not stored.
        """
        self.check_context(behind)
        room = self.engine.context_length - len(head_ids) - len(token_ids)
        before = tuple(chain.from_iterable(document.token_ids for document in behind or ()))
        before = before[max(0, len(before) - room) :]
        item = self.engine.encode_item((*head_ids, *before), token_ids, namespace=self.namespace)
        item.records = KVCacheRecords(text_memories=[text], composed_text_memory=text)
        item.metadata = {
            "source_text": text,
            "extracted_at": datetime.now(timezone.utc).isoformat(),
            **with_names(metadata or {}, behind),
        }
        return item

    def check_context(self, context: object) -> None:
        """Refuse `context` if this engine can reuse a document only after the same tokens.

        Raises:
            UnsupportedModelError: `context` with a server, or with a model that has recurrent layers.
        """
        if context and (not self.engine.merges or cast("HFEngine", self.engine).is_recurrent):
            what = "a model with recurrent layers" if self.engine.merges else "a server"
            raise UnsupportedModelError(
                f"{what} can reuse a document only after the same tokens as when it was encoded, so context is of no "
                "use. Leave context out: documents are then encoded after the instruction only."
            )

    def check_item(self, item: object) -> None:
        """Refuse an item that the engine did not make.

        Raises:
            InvalidInputError: the item is not of the engine's type, or has no fingerprint.
            FingerprintMismatchError: another model made the item.
        """
        engine = self.engine
        if not isinstance(item, engine.item_type):
            raise InvalidInputError(
                f"{engine!r} takes a {engine.item_type.__name__}, not {type(item).__name__}: make one with extract()"
            )
        if item.fingerprint is None:
            raise InvalidInputError(f"item {item.id!r} does not say which model made it: make it with extract()")
        if not engine.fingerprint.matches(item.fingerprint):
            raise FingerprintMismatchError(f"item {item.id!r}", engine.fingerprint.differences(item.fingerprint))

    def find_or_encode(
        self,
        head_ids: Ids,
        token_ids: Ids,
        text: str,
        metadata: Mapping[str, Any] | None = None,
        behind: Behind = None,
    ) -> tuple[Item, bool]:
        """Return the document's item, and whether this call encoded it.

        Without `behind`, a stored item is used no matter what it was encoded after. With `behind`, an item that was
        encoded after something else is encoded again and replaced.

        If several threads need a document at once, the first encodes it. If the stored item is damaged, unreachable or
        of another model, the document is encoded again; if an item cannot be stored, it is used all the same. Either
        case gives one `CacheWarning`. An item that is deleted in the meantime is used and not stored.
        """
        key = self.key(token_ids)
        trouble: list[tuple[str, Exception]] = []
        replaced: Manifest | None = None
        with holding(self._lock_of(key)):
            try:
                item = self.get(key)
                if item is not None and self._fits(key, head_ids, token_ids, behind):
                    self.check_item(item)
                    return item, False
                replaced = None if behind is None else self.store.manifest(key)
            except (StoreError, FingerprintMismatchError, InvalidInputError) as damaged:
                trouble.append(("encoding a document again", damaged))
            if replaced is not None:  # keep the labels that `sync` wrote
                metadata = {**replaced.metadata, **(metadata or {})}
            with self.keeping(token_ids, text, with_names(metadata or {}, behind)):
                item = self.encode(head_ids, token_ids, text, metadata, behind)
                item.records = replaced.records if replaced is not None else item.records
                try:
                    self.put(item)
                except StoreError as full:
                    trouble.append(("a document was encoded but not stored", full))
        for what, error in trouble[:1]:
            self.warn(what, error)
        return item, True

    @contextmanager
    def instruction(self, token_ids: Ids) -> Iterator[None]:
        """Make a stored instruction a recent context on entry, and store the instruction on exit.

        Nothing is stored if the instruction is short, if the store quantises (the instruction would not be exact), if
        the engine is a server, or if the model's layers are on several accelerators, which a store does not record.
        """
        model = cast("HFEngine", self.engine)
        is_stored = len(token_ids) >= WORTH_STORING and model.merges and self.store.is_exact
        if not is_stored or not model.keeps(len(token_ids)) or _is_spread(model):
            yield
            return
        key = f"{INSTRUCTION}{self.key(token_ids)}"
        try:
            is_known = self._recall(model, key, token_ids)
        except (StoreError, FingerprintMismatchError, InvalidInputError) as damaged:
            is_known = False
            self.warn("encoding an instruction again", damaged)
        yield
        try:
            with holding(self._lock_of(key)):
                if not is_known and key not in self.instructions:
                    self._store_instruction(model, key, token_ids)
                    self.instructions.add(key)
        except StoreError as full:
            self.warn("an instruction was encoded but not stored", full)

    def _recall(self, model: HFEngine, key: str, token_ids: Ids) -> bool:
        """Load an instruction from the store unless it is a recent context. Returns whether the store has it."""
        epoch = model.epoch(self.namespace)
        if model.known_prefix(token_ids, self.namespace) == len(token_ids) and key in self.instructions:
            return True
        self.instructions.discard(key)
        item = self.store.get(key) if self.store.contains(key) else None
        if item is None or item.token_ids.tolist() != list(token_ids):
            return False
        self.check_item(item)
        if item.is_exact:
            layers = _beside([], layers_of(item.memory), model.device)
            model.prefixes.insert(token_ids, layers, self.namespace, epoch=epoch)
        self.instructions.add(key)
        return True

    def _store_instruction(self, model: HFEngine, key: str, token_ids: Ids) -> None:
        text = str(model.tokenizer.decode(list(token_ids), skip_special_tokens=False))
        records = KVCacheRecords(text_memories=[text], composed_text_memory=text)
        with self.store.keeping(EncodedItem(id=key, records=records)):
            layers, _ = model.prefill(token_ids, namespace=self.namespace)
            item = model.item_of(layers, (), token_ids)
            self.store.put(item.model_copy(update={"id": key, "records": records}))

    def keeping(
        self, token_ids: Ids, text: str, metadata: Mapping[str, Any] | None = None
    ) -> AbstractContextManager[None]:
        """Within the block, a document is encoded and put. If it is deleted meanwhile, `put` does not store it."""
        records = KVCacheRecords(text_memories=[text], composed_text_memory=text)
        metadata = {"source_text": text, **(metadata or {})}
        item = EncodedItem(id=self.key(token_ids), records=records, metadata=metadata)
        return self.store.keeping(item, self.since)

    def warn(self, what: str, error: Exception) -> None:
        """Warn that a store failed: once per damaged item, and once per store that is unreachable."""
        is_gone = isinstance(error, StoreUnavailableError)
        self.notices.once(f"{what}: {error}", CacheWarning, f"{self.store.place} is gone" if is_gone else str(error))

    def _lock_of(self, key: str) -> threading.Lock:
        with _guard:
            return self.encoding.setdefault(f"{os.getpid()} {key}", threading.Lock())  # after a fork, another lock

    def put(self, item: Item) -> None:
        """Store an item. The caller may continue to write to its `memory`: the store has its own cache object."""
        if isinstance(item, KVCacheItem):
            self.store.put(item.model_copy(update={"memory": share(item.memory)}))
            return
        served = {"prompt": item.memory, "token_ids": item.token_ids.tolist()}
        self.store.put(
            KVCacheItem(
                id=item.id,
                records=item.records,
                metadata={**item.metadata, _SERVED: served},
                fingerprint=item.fingerprint,
                base_position=item.base_position,
                prefix_digest=item.prefix_digest,
            )
        )

    def update(self, id: str, metadata: Mapping[str, Any]) -> None:
        """Add metadata to a stored item. Does nothing if the item is missing."""
        manifest = self.store.manifest(id)
        if manifest is None:
            return
        with self.store.keeping(manifest):
            stored = self.store.get(id)
            if stored is not None:
                self.store.put(stored.model_copy(update={"metadata": {**stored.metadata, **metadata}}))

    def get(self, id: str) -> Item | None:
        """Return the item, or None. Generating with its `memory` does not change the stored item."""
        item = self.stored(id)
        return item.model_copy(update={"memory": share(item.memory)}) if isinstance(item, KVCacheItem) else item

    def stored(self, id: str) -> Item | None:
        """Return the stored item itself, or None, for reading only: generating with its `memory` would change it."""
        stored = self.store.get(id)
        if stored is None or _SERVED not in stored.metadata:
            return stored
        metadata = dict(stored.metadata)
        served = metadata.pop(_SERVED)
        return VLLMKVCacheItem(
            id=stored.id,
            memory=served["prompt"],
            records=stored.records,
            metadata=metadata,
            token_ids=torch.tensor(served["token_ids"], dtype=torch.long),
            fingerprint=stored.fingerprint,
            base_position=stored.base_position,
            prefix_digest=stored.prefix_digest,
        )

    def warn_if_foreign(self) -> None:
        """Warn if the store's items were made by another model, since they are not used then.

        Looks at 8 items, and does not warn if one of them fits, because models may share a store.
        """
        own = self.engine.fingerprint
        try:
            readable = (item.manifest for item in self.store.listing() if item.manifest is not None)
            made_by = [found.fingerprint for found in islice(readable, 8) if found.fingerprint]
        except StoreError as gone:
            self.warn("documents are encoded, and may not be stored", gone)
            return
        if made_by and not any(own.matches(other) for other in made_by):
            warnings.warn(
                f"the store's items were made by another model ({'; '.join(own.differences(made_by[0]))}). They stay "
                "as they are and are not used. Give each model a store of its own, or load the model that made them.",
                CacheWarning,
                stacklevel=3,
            )


Behind: TypeAlias = "Sequence[Read] | None"
"""The documents between the instruction and a document while it is encoded. Empty: none. None: any are accepted."""


class Read(NamedTuple):
    """A document, and the documents after which it is to be encoded."""

    token_ids: Ids
    text: str
    metadata: Mapping[str, Any]
    behind: Behind = None


def _names(behind: Behind) -> list[str]:
    """Return the texts and the sources of the documents in `behind`."""
    return [name for one in behind or () for name in (one.text.strip(), *sorted(sources_of(one.metadata)))]


def with_names(metadata: Mapping[str, Any], behind: Behind) -> dict[str, Any]:
    """Add the names of the documents in `behind` to a document's metadata, so that `purge` finds it by them."""
    kept = {name: value for name, value in metadata.items() if name != ENCODED_BEHIND or behind is None}
    return {**kept, ENCODED_BEHIND: _names(behind)} if behind else kept


def same_ids(items: Sequence[Item]) -> Ids:
    """Return the concatenated token ids of items."""
    return tuple(chain.from_iterable(item.token_ids.tolist() for item in items))
