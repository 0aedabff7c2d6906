"""Documents → items → one context: found or encoded, then exact, merged, or what `auto` chooses."""

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
from kvcag.cache.merge import Merged, MergedBefore, Part, check_merge, check_mergeable, merge, refine
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
from kvcag.engines.decode import FoundPrefix, ReusablePrefix
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
    """How the engine's recent contexts hold all that a prompt needs of its documents; None if they do not.

    They do where the context is known exactly, and where the prompt continues a conversation over a context that was
    merged with the same settings. Under `auto` they also do where the context was merged for this question, or refined
    for a second one: it is being encoded in the background then, and is exact soon.

    A prompt without documents needs nothing. It is `merged` where more of it is known from a conversation whose history
    was edited (`with_kept_history`) than exactly.
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
    """The context of a prompt with documents: reused, merged from cached documents, or encoded and kept.

    Args:
        documents: where its documents are kept.
        prompt: from `ChatTemplate.prompt`, of messages that hold documents.
        settings: how they are put together.
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
    """A context that also holds the messages behind it that stand elsewhere in recent contexts; None if they are few.

    When a history is trimmed, summarised or cleared in the middle, the messages that stay are moved to their new
    positions, and what is new between them is computed there. Under `auto` no moved token is recomputed: the error is
    small, and recomputing takes half as long as a full prefill (`benchmarks/edited_history.py`). The other strategies
    do as they say.

    Args:
        documents: whose engine and namespace.
        prompt: the prompt.
        context: the context of its documents. None: the recent context that it begins with.
        settings: how documents are put together.
        accept_merged: that recent context may be a merged one.
    """
    model, namespace, token_ids = cast("HFEngine", documents.engine), documents.namespace, prompt.token_ids
    if model.is_recurrent:
        return None  # what was read in the middle of a conversation has no maps
    if context is None:
        recent = ReusablePrefix(Layers()).longest(model.prefixes, token_ids[:-1], namespace, merged=accept_merged)
    else:
        recent = FoundPrefix(len(context.token_ids), [layers_of(context.cache)], context.report.mode == "merged")
    at = recent.length
    if len(token_ids) - at < _WORTH_MOVING:
        return None
    runs = model.prefixes.runs(token_ids[:-_LEAST_QUESTION], at, namespace)
    moved = sum(run.length for run in runs)
    if moved < max(_WORTH_MOVING, (len(token_ids) - at) / 2):
        return None
    try:
        with model.exclusive() as live:
            check_mergeable(live)
    except UnsupportedModelError:  # the history is read
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
        parts.append(Part(ids, concat(run.pieces), run.stood, is_exact=False, is_alone=False))
        at = run.end
    start = _Start(token_ids[: recent.length], concat(recent.pieces), is_exact=not recent.is_merged)
    reason = f"{moved:,} tokens of the conversation were moved to where they stand now"
    if context is not None:
        start = start.paid(context.report.recomputed_tokens, context.report.encoded_tokens)
        reason = "; ".join(filter(None, [context.report.reason, reason]))
    return _merged(model, start, parts, token_ids[at:], chosen, ratio, namespace, reason, settings)


_WORTH_MOVING = 256
"""Tokens of a history that are moved, at least, and half of those that would be read. Fewer are read, exactly."""

_LEAST_QUESTION = 32
"""Tokens at the end of a prompt that are always read: by them, `query` chooses."""


def is_stored_whole(documents: DocumentCache, prompt: Prompt) -> bool:
    """Whether the store has the context of a prompt: its one document, encoded behind its instruction.

    A context that is among the recent ones, or a store that cannot be read, counts as no: the engine reads the prompt.
    """
    engine, context_ids = documents.engine, prompt.context_ids
    if not engine.merges or len(prompt.document_ids) != 1:
        return False
    if cast("HFEngine", engine).is_recurrent and context_ids != (*prompt.head_ids, *prompt.kept_ids[0]):
        return False  # its states are those after the last token that it was encoded with
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
    """Instruction and items as one context, for the question in `tail_ids`. Arguments as for `context_of_prompt`.

    Raises:
        InvalidInputError: an item that this engine did not make.
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
    """The strategy to use, its recompute ratio, and why, where it is not the one that was asked for."""
    strategy, ratio, max_kl = settings.strategy, settings.ratio, settings.max_kl
    if not engine.merges:
        asked = "" if strategy in ("exact", "auto") else f"{strategy!r} was asked for, but "
        return "exact", 1.0, f"{asked}a server reads a prompt in order and reuses what it knows of its beginning"
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
        with model.exclusive() as live:
            check_mergeable(live)
    except UnsupportedModelError as refused:
        return "exact", 1.0, f"auto: {refused}"
    calibration = calibration_of(engine)
    if calibration is None and model.is_recurrent:
        reason = "not calibrated; kvcag.calibrate(engine, documents) measures whether merging recurrent layers serves"
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
    """What a context begins with.

    Attributes:
        token_ids: its tokens.
        layers: their keys and values, to be read.
        is_exact: they are what the model computes for these tokens.
        recomputed: tokens of the context that were cached, and computed again, so far.
        encoded: tokens of the context that were not cached, so far.
        in_context: tokens of the documents behind it that were encoded behind another document.
    """

    token_ids: Ids
    layers: list[LayerKV]
    is_exact: bool = True
    recomputed: int = 0
    encoded: int = 0
    in_context: int = 0

    @classmethod
    def prefilled(cls, engine: HFEngine, token_ids: Ids, namespace: str) -> _Start:
        """Exact, and from now on among the recent contexts."""
        known, pieces = engine.prefixes.match(token_ids, namespace)
        if known == len(token_ids) and len(pieces) == 1 and not engine.is_recurrent:
            return cls(token_ids, pieces[0])  # it is only read
        layers, reused = engine.prefill(token_ids, namespace=namespace) if token_ids else ([], 0)
        return cls(token_ids, layers, encoded=len(token_ids) - reused)

    def paid(self, recomputed: int = 0, encoded: int = 0) -> _Start:
        """The same, for which more was paid."""
        return replace(self, recomputed=self.recomputed + recomputed, encoded=self.encoded + encoded)


def _recent_start(
    engine: HFEngine, prompt: Prompt, known: int, namespace: str, settings: MergeSettings
) -> tuple[int, list[Layers]]:
    """How much of a context, at least its head, is used as it is, and its keys and values where they were merged.

    Of `known` tokens, which are exact, documents that they hold in part are left out. Where a conversation goes on over
    documents that were merged with the same settings, what stands before its last group of documents is used as it is.
    """
    places = prompt.document_places

    def whole(length: int) -> int:
        cut_short = (place.start for place in places if place.start < length < place.stop)
        return next(cut_short, max(length, len(prompt.head_ids)))

    last_group = max((index for index, between in enumerate(prompt.between_ids, start=1) if between), default=0)
    if engine.is_recurrent:
        return whole(known), []  # what goes on in the middle of a merged context has no states
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
    """Documents, and texts between them, as parts behind `start`, which may then hold the first document, too."""
    digest = ids_digest(start.token_ids)
    if start.token_ids == head_ids and not isinstance(found[0], tuple) and found[0].prefix_digest != digest:
        # Encoded behind another instruction, or behind another document. Nearly all that this costs in accuracy is the
        # first document's exactness (benchmarks/instruction_key.py), so it is computed behind this instruction alone,
        # and is then a recent context.
        start_ids = (*head_ids, *found[0].token_ids.tolist())
        layers, known = engine.prefill(start_ids, namespace=namespace)
        start = replace(start, token_ids=start_ids, layers=layers)
        start, found = start.paid(recomputed=len(start_ids) - max(known, len(head_ids))), found[1:]
    head = engine.prefill(head_ids, namespace=namespace)[0] if engine.is_recurrent and head_ids else []
    parts = []
    for index, piece in enumerate(found):
        if isinstance(piece, tuple):
            parts.append(_read_in_place(piece))
            continue
        assert isinstance(piece, KVCacheItem)
        exact = index == 0 and start.is_exact and piece.is_exact and piece.prefix_digest == digest
        layers = _beside(start.layers, layers_of(piece.memory), engine.device)
        if engine.is_recurrent and not _composes(layers, exact or piece.prefix_digest == ids_digest(head_ids), exact):
            parts.append(_read_in_place(tuple(piece.token_ids.tolist())))
            continue
        alone = ENCODED_BEHIND not in piece.metadata
        parts.append(Part(piece.token_ids, layers, piece.base_position, exact, alone, states_of(head)))
        start = replace(start, in_context=start.in_context + (0 if alone else len(piece.token_ids)))
    return start, parts


def _composes(layers: Layers, behind_the_head: bool, exact: bool) -> bool:
    """Whether a document's states can be put behind others: not if it was cut, or encoded behind another head."""
    return behind_the_head and layers.states is not None and (exact or layers.states.is_map)


def _read_in_place(token_ids: Ids) -> Part:
    return Part(torch.tensor(token_ids, dtype=torch.long), None, 0, is_exact=False, is_alone=False)


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
    """Move each part to its position behind `start`, and recompute what the strategy chooses.

    Where `start` was merged before, `ratio` is the share of the tokens behind it. `exact` is for a document that stands
    behind its instruction already.
    """
    context_ids = (*start.token_ids, *chain.from_iterable(part.token_ids.tolist() for part in parts))
    if not start.is_exact:
        ratio *= 1 - len(start.token_ids) / len(context_ids)
    drift = learned = None  # before the model is taken: they are found under a lock of their own
    if strategy != "full" and any(part.is_alone and not part.is_exact for part in parts):
        learned = learned_drift_of(engine, namespace)
        if learned is None and (strategy == "rotate" or int(ratio * len(context_ids)) == 0):
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
    if engine.prefixes.epoch(namespace) != epoch:  # forgotten meanwhile
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
    return engine.context_of(merged.layers, context_ids, tail_ids, report, merged.read)


def _refined(
    engine: HFEngine, context_ids: Ids, tail_ids: Ids, ratio: float, namespace: str, settings: MergeSettings
) -> MergedContext | None:
    """A context that was merged for one question, refined for another; None where it is not among the recent ones.

    From the next question on it is reused as it is, and it is encoded as a whole when the model is idle.
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
    return engine.context_of(refined.layers, context_ids, tail_ids, report, refined.read)


def _beginning(item: Item, length: int) -> Item:
    """An item's first tokens, which do not depend on those behind them."""
    if length == len(item.token_ids):
        return item
    assert isinstance(item, KVCacheItem)
    layers = cut(layers_of(item.memory), 0, length)
    return item.model_copy(update={"token_ids": item.token_ids[:length], "memory": cache_of(layers)})


def _beside(head: Sequence[LayerKV], layers: Layers, device: torch.device) -> Layers:
    """An item's layers where the instruction's are, or on `device`: stores may hold them in the host's memory."""
    wanted = head.devices if isinstance(head, Layers) and head else {device}
    if layers.states is None and layers.devices == wanted and len(wanted) == 1:
        return layers
    places = [keys.device for keys, _ in head] or [device] * len(layers)
    states = states_of(layers)
    beside = ((keys.to(at), values.to(at)) for (keys, values), at in zip(layers, places, strict=True))
    return Layers(beside, states and states.mapped(lambda state: state.to(device)), length_of(layers))


def _is_spread(engine: HFEngine) -> bool:
    """Whether the model's layers are on several accelerators: where, a store does not know."""
    places = set(getattr(engine.model, "hf_device_map", {}).values())
    return len(places - {"cpu", "disk"}) > 1


def _because(context: MergedContext, reason: str) -> MergedContext:
    return replace(context, report=replace(context.report, reason=reason)) if reason else context


Ids: TypeAlias = tuple[int, ...]

_SERVED = "served"
"""In the metadata of a stored `VLLMKVCacheItem`: its prompt and its tokens. A store keeps it without tensors."""
_guard = threading.Lock()


@dataclass(frozen=True, slots=True)
class DocumentCache:
    """Finds, encodes and keeps the documents of one namespace. An item's id is its content key.

    Attributes:
        engine: the model that encodes.
        store: where items live.
        namespace: whose recent contexts the engine may reuse.
        since: what the store's `deletions` were before texts were read from it: what was deleted since is not put back.
            None: the texts come from elsewhere.
        encoding: a lock for each document that is being looked up or encoded, by its id.
        notices: what was said about the store.
        instructions: ids of those of which this process has seen that the store has them.
    """

    engine: Engine
    store: KVStore
    namespace: str = ""
    since: Hashable = None
    encoding: WeakValueDictionary[str, threading.Lock] = field(default_factory=WeakValueDictionary)
    notices: WarnOnce = field(default_factory=WarnOnce)
    instructions: set[str] = field(default_factory=set)

    def key(self, token_ids: Iterable[int]) -> str:
        """The id under which a document is kept."""
        return content_key(self.engine.fingerprint.digest, token_ids)

    def contains(self, head_ids: Ids, token_ids: Ids, behind: Behind = None) -> bool:
        """Whether a document can be used without encoding it. A store that fails counts as no, with a warning."""
        try:
            return self._holds(head_ids, token_ids, behind)
        except StoreError as error:
            self.warn("documents are encoded, and may not be kept", error)
            return False

    def containing(self, head_ids: Ids, documents: Mapping[str, Read]) -> set[str]:
        """Those of several documents, by id, of which `contains` is true: by a few requests to a remote store."""
        try:
            kept = self.store.containing(documents)
            return {key for key in kept if self._fits(key, head_ids, documents[key].token_ids, documents[key].behind)}
        except StoreError as error:
            self.warn("documents are encoded, and may not be kept", error)
            return set()

    def _holds(self, head_ids: Ids, token_ids: Ids, behind: Behind = None) -> bool:
        key = self.key(token_ids)
        return self.store.contains(key) and self._fits(key, head_ids, token_ids, behind)

    def _fits(self, key: str, head_ids: Ids, token_ids: Ids, behind: Behind) -> bool:
        """Whether an item that the store has can be used without encoding it."""
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
        """Encode a document behind `head_ids` and the documents `behind`, the end of them if they are long.

        It is not kept.
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
        """Refuse `context` if documents of this engine that stand behind other ones are of no use elsewhere.

        Raises:
            UnsupportedModelError: as said.
        """
        if context and (not self.engine.merges or cast("HFEngine", self.engine).is_recurrent):
            what = "a model with recurrent layers" if self.engine.merges else "a server"
            raise UnsupportedModelError(
                f"{what} reads a document again wherever other tokens stand before it than when it was encoded. "
                "Leave context out: documents are then encoded behind the instruction alone."
            )

    def check_item(self, item: object) -> None:
        """Refuse an item that the engine did not make.

        Raises:
            InvalidInputError: it is not an item of the engine's type, or it does not say which model made it.
            FingerprintMismatchError: another model made it.
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
        """The document's item, and whether this call encoded and kept it.

        An item serves whatever it was encoded behind, unless `behind` is given: then one that was encoded behind
        something else is encoded again, in its place.

        Of several threads that need a document at once, the first encodes it. An item that is damaged, foreign or out
        of reach is encoded again, and one that cannot be stored is used all the same, with one `CacheWarning` about it.
        One that is deleted meanwhile is used and not kept.
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
            if replaced is not None:  # a corpus may have labelled it
                metadata = {**replaced.metadata, **(metadata or {})}
            with self.keeping(token_ids, text, with_names(metadata or {}, behind)):
                item = self.encode(head_ids, token_ids, text, metadata, behind)
                item.records = replaced.records if replaced is not None else item.records
                try:
                    self.put(item)
                except StoreError as full:
                    trouble.append(("a document was encoded and not kept", full))
        for what, error in trouble[:1]:
            self.warn(what, error)
        return item, True

    @contextmanager
    def instruction(self, token_ids: Ids) -> Iterator[None]:
        """Within it, an instruction that the store has is among the recent contexts. At its end the store has it.

        Short ones are not stored, nor are any in a store that quantises, where they would not be exact. A server keeps
        its own, and where a model's layers stand on several accelerators, a store cannot say.
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
            self.warn("reading an instruction again", damaged)
        yield
        try:
            with holding(self._lock_of(key)):
                if not is_known and key not in self.instructions:
                    self._store_instruction(model, key, token_ids)
                    self.instructions.add(key)
        except StoreError as full:
            self.warn("an instruction was read and not kept", full)

    def _recall(self, model: HFEngine, key: str, token_ids: Ids) -> bool:
        """Take an instruction from the store if it is not among the recent contexts. Returns whether it is there."""
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
        """Within it, a document is encoded and put. If it is deleted meanwhile, it does not come back."""
        records = KVCacheRecords(text_memories=[text], composed_text_memory=text)
        metadata = {"source_text": text, **(metadata or {})}
        item = EncodedItem(id=self.key(token_ids), records=records, metadata=metadata)
        return self.store.keeping(item, self.since)

    def warn(self, what: str, error: Exception) -> None:
        """Say that a store failed, once about each damaged item, and once about a store that is gone."""
        is_gone = isinstance(error, StoreUnavailableError)
        self.notices.once(f"{what}: {error}", CacheWarning, f"{self.store.place} is gone" if is_gone else str(error))

    def _lock_of(self, key: str) -> threading.Lock:
        with _guard:
            return self.encoding.setdefault(f"{os.getpid()} {key}", threading.Lock())  # not the lock before a fork

    def put(self, item: Item) -> None:
        """Keep an item. Its owner may go on writing to it."""
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
        """Change an item's metadata, if the item is there."""
        manifest = self.store.manifest(id)
        if manifest is None:
            return
        with self.store.keeping(manifest):
            stored = self.store.get(id)
            if stored is not None:
                self.store.put(stored.model_copy(update={"metadata": {**stored.metadata, **metadata}}))

    def get(self, id: str) -> Item | None:
        """The item, or None. Generating with its `memory` leaves the stored item as it is."""
        item = self.stored(id)
        return item.model_copy(update={"memory": share(item.memory)}) if isinstance(item, KVCacheItem) else item

    def stored(self, id: str) -> Item | None:
        """The item, or None, to be read: what is generated into its `memory` would be in the store."""
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
        """Warn if another model made what the store holds: it stays as it is and is not used.

        Looks at a few items, and is silent where one of them fits: models may share a store.
        """
        own = self.engine.fingerprint
        try:
            readable = (item.manifest for item in self.store.listing() if item.manifest is not None)
            made_by = [found.fingerprint for found in islice(readable, 8) if found.fingerprint]
        except StoreError as gone:
            self.warn("documents are encoded, and may not be kept", gone)
            return
        if made_by and not any(own.matches(other) for other in made_by):
            warnings.warn(
                f"the store's items were made by another model ({'; '.join(own.differences(made_by[0]))}). They stay "
                "as they are and are not used. Give each model a store of its own, or load the model that made them.",
                CacheWarning,
                stacklevel=3,
            )


Behind: TypeAlias = "Sequence[Read] | None"
"""What a document is encoded behind, after the instruction. Empty: nothing. None: it does not matter."""


class Read(NamedTuple):
    """A document, and what it is to be encoded behind."""

    token_ids: Ids
    text: str
    metadata: Mapping[str, Any]
    behind: Behind = None


def _names(behind: Behind) -> list[str]:
    """The text and the sources of what a document is encoded behind."""
    return [name for one in behind or () for name in (one.text.strip(), *sorted(sources_of(one.metadata)))]


def with_names(metadata: Mapping[str, Any], behind: Behind) -> dict[str, Any]:
    """Metadata of a document that is encoded behind other ones: `purge` reaches it by them."""
    kept = {name: value for name, value in metadata.items() if name != ENCODED_BEHIND or behind is None}
    return {**kept, ENCODED_BEHIND: _names(behind)} if behind else kept


def same_ids(items: Sequence[Item]) -> Ids:
    """The items' tokens, one after another."""
    return tuple(chain.from_iterable(item.token_ids.tolist() for item in items))
