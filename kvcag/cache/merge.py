"""Merges caches that were made separately: moves them to their positions, and recomputes a few tokens.

Three things bring a merged cache closer to that of a full prefill. A strategy chooses tokens to recompute (`select`).
The drift that these tokens show, compared with their cached keys and values, corrects the other tokens of their
documents (`DriftCorrection`). If no token is recomputed, or a drift was learned from the corpus, a drift that was
measured before is added (`UsualDrift`).
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, get_args

import numpy as np
import torch

from kvcag.cache.attention import (
    UNROTATED,
    Call,
    EnoughError,
    PositionShift,
    Rotation,
    attend,
    check_mergeable,
    predict,
    rotations,
    turns_of,
)
from kvcag.cache.layers import (
    LayerKV,
    Layers,
    Move,
    States,
    as_layers,
    cache_of,
    concat,
    cut,
    decoder_of,
    device_of,
    generation_cache,
    kernels_for,
    kinds_of,
    layers_of,
    length_of,
    moved,
    run,
    scatter_cache,
    sent,
    states_of,
    zeros_like,
)
from kvcag.cache.states import behind
from kvcag.core import MergeSettings, MergeStrategy, ReadTail
from kvcag.errors import InvalidInputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["Merged", "Part", "check_mergeable", "merge"]


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a context: the head, a document, or a text between documents.

    Attributes:
        token_ids: int64 `(seq_len,)`.
        layers: keys, rotated to the positions from `base_position` on, and values, `(1, kv_heads, seq_len, head_dim)`
            per layer. They are only read. None: the merge computes them, after the parts before this one.
        base_position: the position of the first key in `layers`.
        is_exact: the keys and values equal those of a full prefill at the part's new position, so that no token is
            recomputed: the head, and the first document if it was encoded after this head.
        is_document: the part was encoded without the parts before it. It gets a learned drift.
        is_alone: it was encoded without any other document before it. It gets the usual drift.
        states_before: the states of recurrent layers after which the part was encoded; None for none.
    """

    token_ids: torch.Tensor
    layers: Sequence[LayerKV] | None
    base_position: int
    is_exact: bool
    is_document: bool = True
    is_alone: bool = True
    states_before: States | None = None


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged cache.

    Attributes:
        layers: keys and values in new memory, `(1, kv_heads, sum of lengths, head_dim)` each.
        recomputed: the positions of the recomputed tokens, ascending, int64 `(recomputed,)`.
        layout: the tokens; `open` are those that are still approximate.
        read: the prefilled question, if the pass that recomputed tokens read it too.
    """

    layers: Layers
    recomputed: torch.Tensor
    layout: Layout
    read: ReadTail | None = None


class Passes(Protocol):
    """Faster passes of a merge for some device. They return None if they do not support the arguments."""

    def scores(self, layers: Layers, length: int, tail_ids: torch.Tensor) -> torch.Tensor | None:
        """Return how much a question uses each of the first `length` tokens, fp32 `(length,)`: see `query`.

        Args:
            layers: a merged context, with room for the question at its end, which is written to.
            length: the length of the context.
            tail_ids: the question, int64 `(tail_len,)`.
        """

    def recompute_and_read(
        self, layers: Layers, layout: Layout, positions: torch.Tensor, tail_ids: torch.Tensor
    ) -> ReadTail | None:
        """See `kvcag.cache.merge.recompute_and_read`."""


@torch.no_grad()
def merge(
    model: PreTrainedModel,
    parts: Sequence[Part],
    tail_ids: torch.Tensor,
    *,
    strategy: MergeStrategy = "query",
    ratio: float = 0.2,
    usual_drift: Callable[[], UsualDrift | None] | None = None,
    learned_drift: UsualDrift | None = None,
    passes: Passes | None = None,
) -> Merged:
    """Move each part to its position, and recompute the tokens that the strategy chooses.

    The caller must hold the model (`HFEngine.exclusive`).

    Args:
        model: the model that made every part.
        parts: the parts in the order of the context; the first is the head.
        tail_ids: the tokens after the parts, which are the question, int64 `(tail_len,)`. Only `query` depends on
            them; without them, it chooses as `deviation` does.
        strategy: which tokens are recomputed (`kvcag.core.MergeStrategy`).
        ratio: how many tokens are recomputed, as a share of all tokens of the parts, rounded down. 0 recomputes
            nothing; 1 recomputes every token that is not exact. `rotate` and `full` ignore the ratio.
        usual_drift: returns the usual drift. Called only if no token is recomputed; the drift is added to parts that
            are alone and not exact. Recomputed tokens show their own document's drift, which is better.
        learned_drift: replaces `usual_drift`. It is added to all documents that are not exact, before tokens are
            chosen, so that recomputed tokens show the drift that remains.
        passes: faster passes for the model's device.

    Raises:
        InvalidInputError: an unknown strategy, a ratio outside [0, 1], or a part with fewer or more keys than tokens.
        UnsupportedModelError: the model's caches cannot be merged (`check_mergeable`), and not all parts are exact.
    """
    _check(parts, strategy, ratio)
    if not all(part.is_exact for part in parts):  # exact parts are not moved, so any model can have them
        check_merge(model, strategy)
    length = sum(len(part.token_ids) for part in parts)
    room = 0 if kinds_of(model) or strategy == "rotate" or len(tail_ids) > _LONGEST_TAIL else len(tail_ids)
    layout = Layout(
        token_ids=torch.cat([part.token_ids for part in parts]),
        part_of=_each(parts, list(range(len(parts)))),
        open=_each(parts, [not part.is_exact for part in parts]),
    )
    every = learned_drift is not None
    gives = [part.is_document and not part.is_exact and (every or part.is_alone) for part in parts]
    drift = None
    if strategy != "full" and any(give and len(part.token_ids) for give, part in zip(gives, parts, strict=True)):
        drift = learned_drift
        if drift is None and usual_drift is not None and not _budget(layout, strategy, ratio):
            drift = usual_drift()
    placed, read = _place(model, parts, layout, room, drift, gives), None
    layers = cut(placed, 0, length)
    if kinds_of(model):
        chosen = _where(layout.open) if strategy == "full" else torch.arange(0)
        _run_through(model, layers, parts, again=strategy == "full")
    else:
        missing = _where(_each(parts, [part.layers is None for part in parts]))
        if len(missing):
            recompute(model, layers, layout, missing, correct=False)
        chosen, read = _answer(model, placed, layout, tail_ids, strategy, ratio, passes)
    still_open = layout.open.clone()
    still_open[chosen] = False
    return Merged(layers, chosen, replace(layout, open=still_open), read)


_LONGEST_TAIL = 512
"""The longest question that is read in the same pass as the recomputed tokens. A longer one is read by the engine."""


def _answer(
    model: PreTrainedModel,
    layers: Layers,
    layout: Layout,
    tail_ids: torch.Tensor,
    strategy: MergeStrategy,
    ratio: float,
    passes: Passes | None,
) -> tuple[torch.Tensor, ReadTail | None]:
    """Choose tokens and recompute them in place. If `layers` have room for the question, the same pass reads it."""
    length = len(layout.token_ids)
    has_room = length_of(layers) > length
    passes = passes if has_room else None
    chosen = select(model, layers, layout, tail_ids, strategy=strategy, ratio=ratio, passes=passes)
    if not len(chosen):
        return chosen, None
    if not has_room:
        recompute(model, cut(layers, 0, length), layout, chosen)
        return chosen, None
    read = passes.recompute_and_read(layers, layout, chosen, tail_ids) if passes else None
    return chosen, read or recompute_and_read(model, layers, layout, chosen, tail_ids)


def check_merge(model: PreTrainedModel, strategy: str) -> None:
    """Refuse a model whose caches cannot be merged with this strategy.

    Raises:
        UnsupportedModelError: see `check_mergeable`; or the model has recurrent layers and the strategy is not one of
            `STATE_STRATEGIES`.
    """
    check_mergeable(model)
    if kinds_of(model) and strategy not in STATE_STRATEGIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} has recurrent layers, which have no state for a token in the middle, so "
            f"{strategy!r} cannot recompute single tokens. Use {' or '.join(map(repr, STATE_STRATEGIES))}, or 'exact'."
        )


def _run_through(model: PreTrainedModel, layers: Layers, parts: Sequence[Part], *, again: bool) -> None:
    """Set the states of recurrent layers after all parts, by composing the states of the parts in order.

    Parts without keys and values are prefilled at their positions; with `again`, so are those that are not exact.
    """
    states, start = None, 0
    for number, part in enumerate(parts):
        end = start + len(part.token_ids)
        held = states_of(part.layers or ())
        if start == end:
            continue
        if part.layers is None or (again and not part.is_exact):
            states = _read(model, layers, states, part.token_ids, start)
        elif held is None or not (part.is_exact or held.is_map):
            raise InvalidInputError(
                f"part {number} has no {'maps' if held else 'states'} of the model's recurrent layers. Encode it with "
                "HFEngine.encode_after, or pass layers=None, so that the merge computes it."
            )
        else:
            states = held if part.is_exact else behind(held, states, part.states_before, end - start)
        start = end
    layers.states = states and replace(states.restored(), maps=())


def _read(model: PreTrainedModel, layers: Layers, states: States | None, ids: torch.Tensor, start: int) -> States:
    """Prefill tokens after the first `start` tokens of `layers`, write their keys and values, and return the states."""
    before = [Layers(cut(layers, 0, start), states, start)] if start else []
    cache = generation_cache(before, len(ids), kinds_of(model))
    for chunk in torch.split(ids, _READ):
        run(decoder_of(model), chunk, cache)
    read = layers_of(cache)
    for kv, new in zip(layers, cut(read, start), strict=True):
        for old, right in zip(kv, new, strict=True):
            old[..., start : start + len(ids), :] = right
    assert read.states is not None
    return read.states


_READ = 512
"""The most tokens of one pass, which limits the memory of its mask over all earlier tokens."""


@torch.no_grad()
def refine(
    model: PreTrainedModel,
    pieces: Sequence[Layers],
    layout: Layout,
    tail_ids: torch.Tensor,
    *,
    ratio: float,
    passes: Passes | None = None,
) -> Merged:
    """Copy a context that was merged for an earlier question, and recompute further tokens for another question.

    The caller must hold the model (`HFEngine.exclusive`).

    Args:
        model: the model that made the context.
        pieces: the merged context, in consecutive pieces.
        layout: its tokens; `open` are those that were not recomputed for any question yet.
        tail_ids: the question, int64 `(tail_len,)`.
        ratio: how many tokens to recompute, as a share of all.
        passes: faster passes for the model's device.
    """
    room = len(tail_ids) if len(tail_ids) <= _LONGEST_TAIL else 0
    layers = concat(pieces, room)
    chosen, read = _answer(model, layers, layout, tail_ids, "query", ratio, passes)
    still_open = layout.open.clone()
    still_open[chosen] = False
    return Merged(cut(layers, 0, len(layout.token_ids)), chosen, replace(layout, open=still_open), read)


@dataclass
class MergedBefore:
    """A merged context that is among an engine's recent contexts.

    Attributes:
        layout: its tokens; `open` are those that were not recomputed for any question.
        tails: the token ids after the context, one tuple per question.
        settings: the settings of its merge. A question with other settings does not use the context.
        refining: a lock, so that only one of several concurrent questions refines the context.
    """

    layout: Layout
    tails: list[tuple[int, ...]]
    settings: MergeSettings
    refining: threading.Lock = field(default_factory=threading.Lock)


class MergeHistory:
    """The recent merged contexts of an engine, least recently used first. Safe to use from several threads."""

    def __init__(self, remembered: int = 256) -> None:
        self._remembered = remembered
        self._contexts: OrderedDict[tuple[str, tuple[int, ...]], MergedBefore] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, namespace: str, context_ids: tuple[int, ...]) -> MergedBefore | None:
        """Return a merged context; None if it is not known."""
        with self._lock:
            found = self._contexts.get((namespace, context_ids))
            if found is not None:
                self._contexts.move_to_end((namespace, context_ids))
            return found

    def continues(
        self, namespace: str, token_ids: tuple[int, ...], settings: MergeSettings, *, behind: int = 0
    ) -> bool:
        """Whether a prompt begins with a context of more than `behind` tokens that was merged with these settings."""
        with self._lock:
            return any(
                behind < len(context_ids) < len(token_ids) and token_ids[: len(context_ids)] == context_ids
                for (whose, context_ids), merged in self._contexts.items()
                if whose == namespace and merged.settings == settings
            )

    def put(self, namespace: str, context_ids: tuple[int, ...], merged: MergedBefore) -> None:
        """Add a merged context. When full, drop the oldest one of the namespace with the most contexts."""
        with self._lock:
            self._contexts[namespace, context_ids] = merged
            if len(self._contexts) > self._remembered:
                counts = Counter(whose for whose, _ in self._contexts)
                most = max(counts.values())
                del self._contexts[next(key for key in self._contexts if counts[key[0]] == most)]

    def clear(self, namespace: str | None) -> None:
        """Drop a namespace's contexts; None means all namespaces."""
        with self._lock:
            for key in [key for key in self._contexts if namespace in (None, key[0])]:
                del self._contexts[key]


def _each(parts: Sequence[Part], of_parts: Sequence[int | bool]) -> torch.Tensor:
    """Repeat the value of each part for each of its tokens: `(tokens,)`.

    This and other work on token lists uses NumPy, because PyTorch would wake its CPU threads, which delays work on a
    GPU by milliseconds.
    """
    return torch.from_numpy(np.repeat(np.array(of_parts), [len(part.token_ids) for part in parts]))


def _where(mask: torch.Tensor) -> torch.Tensor:
    """Return the indices of the true values, int64 `(count,)`."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _check(parts: Sequence[Part], strategy: str, ratio: float) -> None:
    if strategy not in get_args(MergeStrategy):
        raise InvalidInputError(f"unknown strategy {strategy!r}. Use one of {', '.join(get_args(MergeStrategy))}.")
    if not 0 <= ratio <= 1:
        raise InvalidInputError(f"ratio is {ratio}; it is the share of tokens to recompute, from 0 to 1.")
    if not any(len(part.token_ids) and part.layers is not None for part in parts):
        raise InvalidInputError("there are no tokens to merge. Pass at least one part with tokens and layers.")
    for index, part in enumerate(parts):
        lengths = {kv[0].shape[-2] for kv in part.layers or ()} or {length_of(part.layers or ())}
        if len(part.token_ids) and part.layers is not None and lengths != {len(part.token_ids)}:
            raise InvalidInputError(
                f"part {index} has {len(part.token_ids)} token ids, but keys for {sorted(lengths)} tokens. "
                "Pass one key per token."
            )


def _place(
    model: PreTrainedModel,
    parts: Sequence[Part],
    layout: Layout,
    room: int,
    drift: UsualDrift | None,
    gives: Sequence[bool],
) -> Layers:
    """Copy all parts, one after another, to new memory with room for `room` more tokens, and re-rotate their keys.

    `drift` is added to the parts for which `gives` is true.
    """
    gives = [drift is not None and give for give, part in zip(gives, parts, strict=True) if len(part.token_ids)]
    parts = [part for part in parts if len(part.token_ids)]
    like = next(part.layers for part in parts if part.layers is not None)
    held = [zeros_like(like, len(part.token_ids)) if part.layers is None else as_layers(part.layers) for part in parts]
    starts = accumulate((len(part.token_ids) for part in parts), initial=0)
    stood = [start if part.layers is None else part.base_position for start, part in zip(starts, parts, strict=False)]
    rotated = rotations(model)[: len(like)] if any(not part.is_exact for part in parts) else None
    turns = turns_of(rotated or [UNROTATED] * len(like))
    layers, change = None, None
    if len(like) and turns is not None and kernels_for(as_layers(like).rows) is not None:
        if drift is not None and drift.slopes is None:
            change = drift.stacked(like[0][0].device)
        layers = moved(held, room, Move(stood, turns, change, gives))
    if layers is None:
        layers = _turned(held, room, stood, parts, rotated, device_of(model))
        change = None
    if drift is not None and change is None:
        drift.add_to(rotated or [], cut(layers, 0, len(layout.part_of)), replace(layout, open=_each(parts, gives)))
    return layers


def _turned(
    held: Sequence[Layers],
    room: int,
    stood: Sequence[int],
    parts: Sequence[Part],
    rotated: list[Rotation] | None,
    device: torch.device,
) -> Layers:
    """Concatenate parts, and re-rotate their keys layer by layer."""
    layers = concat(held, room)
    at = np.concatenate([base + np.arange(len(part.token_ids)) for base, part in zip(stood, parts, strict=True)])
    elsewhere = np.flatnonzero(at != np.arange(len(at)))
    if len(elsewhere) and rotated:  # the head and the first document often keep their positions: no bit changes
        first = int(elsewhere[0])
        move = PositionShift(
            rotated,
            sent(torch.from_numpy(at[first:]), device),
            torch.arange(first, len(at), device=device),
        )
        for index, (keys, values) in enumerate(layers):
            move.turn(index, (keys[..., first : len(at), :], values[..., first : len(at), :]))
    return layers


STATE_STRATEGIES = ("rotate", "full")
"""The strategies for models with recurrent layers."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The tokens of a merged context; all tensors are 1-D, with one entry per token.

    Attributes:
        token_ids: int64.
        part_of: int64, ascending: the index of the token's part.
        open: bool: the token is approximate, and may be recomputed.
    """

    token_ids: torch.Tensor
    part_of: torch.Tensor
    open: torch.Tensor


def select(
    model: PreTrainedModel,
    layers: Sequence[LayerKV],
    layout: Layout,
    tail_ids: torch.Tensor,
    *,
    strategy: MergeStrategy,
    ratio: float,
    passes: Passes | None = None,
) -> torch.Tensor:
    """Choose the open tokens to recompute, at most `ratio` of all tokens.

    Args:
        model: the model that made the context.
        layers: the moved parts. They may have room for the question at their end, which is then written to.
        layout: the tokens.
        tail_ids: the question, int64 `(tail_len,)`.
        strategy: the criterion.
        ratio: the recompute ratio, in [0, 1].
        passes: faster passes for the model's device.

    Returns:
        Positions, ascending, int64 `(chosen,)`.
    """
    candidates, budget = _where(layout.open), _budget(layout, strategy, ratio)
    if budget in (0, len(candidates)):
        return candidates[:budget]
    scores = None
    if passes and strategy == "query" and len(tail_ids):
        scores = passes.scores(as_layers(layers), len(layout.token_ids), tail_ids)
    if scores is None:
        scores = _SCORES[strategy](model, layers, layout, tail_ids)
    best = scores[candidates.to(scores.device)].argsort(descending=True, stable=True)[:budget]
    return candidates[best.sort().values.cpu()]


def _budget(layout: Layout, strategy: MergeStrategy, ratio: float) -> int:
    """Return the number of tokens to recompute."""
    if strategy == "rotate":
        return 0
    candidates = int(np.count_nonzero(layout.open.numpy()))
    return candidates if strategy == "full" else min(int(ratio * len(layout.token_ids)), candidates)


def anchor(model: PreTrainedModel, layers: Sequence[LayerKV], layout: Layout, tail_ids: torch.Tensor) -> torch.Tensor:
    """Score tokens by their place in their document: the first tokens of each score highest, as in EPIC (ICML'25)."""
    starts = torch.searchsorted(layout.part_of, layout.part_of)
    return (starts - torch.arange(len(starts))).float()


def deviation(
    model: PreTrainedModel, layers: Sequence[LayerKV], layout: Layout, tail_ids: torch.Tensor
) -> torch.Tensor:
    """Score tokens by the error of their key and value in layer 1, as in CacheBlend (EuroSys'25).

    The pass over all open tokens ends after one layer of attention, when the keys of layer 1 are computed.
    """
    last = min(1, len(layers) - 1)
    positions = _where(layout.open)
    scores = torch.zeros(len(layout.token_ids))

    def compare(layer_idx: int, held: LayerKV, new: LayerKV) -> None:
        if layer_idx < last:
            return
        for old, right in zip(held, new, strict=True):
            at = positions.to(old.device)
            scores[positions] += (right.float() - old[..., at, :].float()).square().sum(dim=(0, 1, 3)).cpu()
        raise EnoughError

    # Keys and values of layer 0 do not depend on other tokens, so the pass writes the same values there again.
    cache = scatter_cache(cut(layers, 0, len(layout.token_ids)), positions, compare)
    attend(model, layout.token_ids[positions], positions, cache)
    return scores


def query(model: PreTrainedModel, layers: Sequence[LayerKV], layout: Layout, tail_ids: torch.Tensor) -> torch.Tensor:
    """Score tokens by the question's use of them: attention weight x norm of the value, summed over layers and heads.

    The idea is ProphetKV's (ICML'26), with another score. Weights are summed for one block of question tokens at a
    time, so that no attention map is in memory.
    """
    if len(tail_ids) == 0:
        return deviation(model, layers, layout, tail_ids)
    length = len(layout.token_ids)
    scores: dict[torch.device, torch.Tensor] = {}

    def read(layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        attention, output = _attention_sums(q, k, v, call)
        gain = (attention[:, :length] * v[0, :, :length].float().norm(dim=-1)).sum(0)
        scores[k.device] = scores.get(k.device, 0) + gain
        if layer_idx == len(layers) - 1:
            raise EnoughError
        return output

    if length_of(layers) == length:
        layers = concat([layers], len(tail_ids))
    positions = torch.arange(length, length + len(tail_ids))
    attend(model, tail_ids, positions, scatter_cache(layers, positions), read)
    return torch.stack([part.cpu() for part in scores.values()]).sum(0)


_WEIGHTS = {"cpu": 2**20, "cuda": 2**25}
"""The number of attention weights per block: 4 and 128 MiB in fp32, and about three times more while they are computed.
Small blocks leave a GPU idle: over 32,855 keys, a layer takes 21 ms with 2**22 weights, and 4 ms with 2**25."""


def _attention_sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the attention weights of each key over all queries and query heads that share the key.

    Returns the sums, fp32 `(kv_heads, keys)`, and the attention's output, `(1, queries, heads, head_dim)`, which takes
    only one more product. The queries belong to the last keys.
    """
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q.reshape(kv_heads, -1, q.shape[2], q.shape[3])
    outputs = []
    sums = torch.zeros(kv_heads, keys, device=q.device)
    rows = max(1, _WEIGHTS.get(q.device.type, 2**20) // (q.shape[1] * keys))
    for start in range(0, q.shape[2], rows):
        block = slice(start, min(start + rows, q.shape[2]))
        part = grouped[:, :, block].flatten(1, 2)
        weights = (part @ k[0].transpose(-1, -2)).float() * call.scaling
        if call.softcap is not None:
            weights = call.softcap * (weights / call.softcap).tanh()
        first, hidden = call.hidden(block, keys)
        weights.view(kv_heads, grouped.shape[1], -1, keys)[..., first:].masked_fill_(hidden, float("-inf"))
        weights = weights.softmax(-1)
        sums += weights.sum(1)
        outputs.append((weights.to(v.dtype) @ v[0]).reshape(kv_heads, grouped.shape[1], -1, v.shape[-1]))
    return sums, torch.cat(outputs, dim=2).flatten(0, 1).transpose(0, 1)[None]


_Score = Callable[["PreTrainedModel", Sequence[LayerKV], Layout, torch.Tensor], torch.Tensor]
_SCORES: dict[str, _Score] = {"anchor": anchor, "deviation": deviation, "query": query}


def recompute(
    model: PreTrainedModel, layers: list[LayerKV], layout: Layout, positions: torch.Tensor, *, correct: bool = True
) -> None:
    """Recompute the keys and values of some tokens in place, in one forward pass.

    Each token attends to all earlier tokens, recomputed or not, and the cache replaces its key and value. With all open
    tokens, the pass is a prefill.

    Args:
        model: the model that made the context.
        layers: keys and values of the context, which are written to.
        layout: the tokens.
        positions: the positions to recompute, ascending, int64 `(chosen,)`.
        correct: add the drift that the recomputed tokens show to the other open tokens (`DriftCorrection`).
    """
    watch = DriftCorrection(model, layout, positions).watch if correct else None
    cache = scatter_cache(layers, positions.to(device_of(model)), watch)

    def stop_at_the_last(layer_idx: int, *_: object) -> None:
        if layer_idx == len(layers) - 1:  # the last keys and values are written, and no output is needed
            raise EnoughError

    attend(model, layout.token_ids[positions], positions, cache, stop_at_the_last)


def recompute_and_read(
    model: PreTrainedModel, layers: Layers, layout: Layout, positions: torch.Tensor, tail_ids: torch.Tensor
) -> ReadTail:
    """`recompute`, and prefill the question after the context in the same pass.

    A layer recomputes and corrects the context's keys and values before it attends, so the question sees the same as
    in a later pass.

    Args:
        model: the model that made the context.
        layers: as for `recompute`, with room for the question at their end.
        layout: as for `recompute`.
        positions: as for `recompute`.
        tail_ids: the question, int64 `(tail_len,)`.
    """
    length, device = len(layout.token_ids), device_of(model)
    at = torch.cat([positions, torch.arange(length, length + len(tail_ids))])
    correction = DriftCorrection(model, layout, positions)

    def watch(layer_idx: int, held: LayerKV, new: LayerKV) -> None:
        correction.watch(layer_idx, held, (new[0][..., : len(positions), :], new[1][..., : len(positions), :]))

    cache = scatter_cache(layers, at.to(device), watch)
    logits = predict(model, torch.cat([layout.token_ids[positions], tail_ids]), at, cache)
    return ReadTail(cache_of(cut(layers, length, length + len(tail_ids))), logits)


MEAN = 0.6
"""The share of a document's estimated mean drift that is added. It is below 1 because the tokens that the mean is
estimated from are those that change most."""

RIDGE = 0.4
"""The share of a token's estimated deviation from the mean drift that is added. A share of 1 is worse than none."""

SHRINK = 4.0
"""Each document's mean is shrunk as if the document had this many more tokens, with the mean of all documents."""

PENALTY = 1.0
"""The penalty of the ridge regression, in units of the features' variance."""

_BLOCK = {"cpu": 1024, "cuda": 16384}
"""The number of tokens that are corrected at a time, which limits the memory of fp32 copies. Large blocks on a GPU need
fewer launches."""


class DriftCorrection:
    """Corrects the tokens that are not recomputed, by the drift of those that are.

    `watch` is the callback of the pass's cache (`scatter_cache`).
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, positions: torch.Tensor) -> None:
        chosen = torch.zeros_like(layout.open)
        chosen[positions] = True
        rotated, device = rotations(model), device_of(model)
        self.chosen = _Tokens.at(rotated, layout, positions.to(device))
        self.rest = []
        for block in _blocks(layout.open, chosen, layout.part_of, device):
            self.rest.append(_Tokens.at(rotated, layout, block.to(device), has_gaps=device.type != "cpu"))
        self.averages = averages(self.chosen.part_of, int(layout.part_of[-1]) + 1)

    def watch(self, layer_idx: int, held: LayerKV, new: LayerKV) -> None:
        """Estimate a layer's drift from `new`, its recomputed keys and values, and correct the rest of `held`."""
        if not self.rest:
            return
        device = held[0].device
        chosen = self.chosen.to(device)
        cached = chosen.features(layer_idx, (t[..., chosen.positions, :] for t in held))
        now = chosen.features(layer_idx, new)
        drift = _Drift.fit(cached, now - cached, chosen.part_of, self.averages.to(device))
        for block in self.rest:
            rest = block.to(device)
            features = rest.features(layer_idx, (t[..., rest.places, :] for t in held))
            rest.give(layer_idx, held, drift.of(features, rest.parts)[None])


def _blocks(
    is_open: torch.Tensor, chosen: torch.Tensor, part_of: torch.Tensor, device: torch.device
) -> Iterable[torch.Tensor]:
    """Yield the positions of open tokens that are not chosen, in blocks.

    On a CPU, each block belongs to one part. If the whole part is open, the block includes the chosen tokens: the pass
    overwrites them anyway, and a block without gaps is a view, which needs no copy.
    """
    size = _BLOCK.get(device.type, 1024)
    if device.type != "cpu":
        yield from (block for block in torch.split(_where(is_open & ~chosen), size) if len(block))
        return
    rest = is_open & ~chosen
    for part in sorted(set(part_of[rest].tolist())):
        of_part = part_of == part
        whole = _where(is_open & of_part)
        has_gaps = int(whole[-1]) - int(whole[0]) + 1 > len(whole)
        yield from torch.split(_where(rest & of_part) if has_gaps else whole, size)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Some tokens of a context: their positions and the index of each token's part, int64 `(tokens,)`."""

    positions: torch.Tensor
    part_of: torch.Tensor
    move: PositionShift
    """From position 0 to `positions`."""
    places: slice | torch.Tensor
    """`positions`, as a slice if they have no gaps."""
    parts: slice | torch.Tensor
    """`part_of`, as a slice if all tokens belong to one part."""

    @classmethod
    def at(
        cls, rotated: Sequence[Rotation], layout: Layout, positions: torch.Tensor, *, has_gaps: bool = True
    ) -> _Tokens:
        """Make tokens of a context. With `has_gaps`, do not look for slices, which would wait for a GPU."""
        part_of = layout.part_of.to(positions.device)[positions]
        move = PositionShift(rotated, torch.zeros_like(positions), positions)
        places, parts = (positions, part_of) if has_gaps else (_without_gaps(positions), _without_gaps(part_of))
        return cls(positions, part_of, move, places, parts)

    @classmethod
    def of_one_part(cls, rotated: Sequence[Rotation], positions: torch.Tensor, start: int = 0) -> _Tokens:
        """Make tokens of one part, at `start + positions`."""
        move = PositionShift(rotated, torch.zeros_like(positions), start + positions)
        part_of = torch.zeros_like(positions)
        return cls(positions, part_of, move, positions, part_of)

    def to(self, device: torch.device) -> _Tokens:
        if self.positions.device == device:
            return self
        places, parts = (at if isinstance(at, slice) else at.to(device) for at in (self.places, self.parts))
        return replace(
            self, positions=self.positions.to(device), part_of=self.part_of.to(device), places=places, parts=parts
        )

    def features(self, layer_idx: int, kv: Iterable[torch.Tensor]) -> torch.Tensor:
        """Join each token's key, rotated to position 0, and value: fp32 `(kv_heads, tokens, features)`."""
        keys, values = kv
        size = *keys.shape[:-1], keys.shape[-1] + values.shape[-1]
        side_by_side = keys.new_empty(size, dtype=torch.float32)
        self.move.turn(layer_idx, (keys, values), back=True, to=_apart(side_by_side, keys.shape[-1]))
        return side_by_side[0]

    def give(self, layer_idx: int, held: LayerKV, change: torch.Tensor) -> None:
        """Add `change`, `(1, kv_heads, tokens, features)`, to these tokens of `held`, in place. Overwrites `change`."""
        keys, values = _apart(change, held[0].shape[-1])
        self.move.turn(layer_idx, (keys, values))
        for held_, more in zip(held, (keys, values), strict=True):
            if isinstance(self.places, slice):
                held_[..., self.places, :] += more.to(held_.dtype)
            else:
                held_.index_add_(-2, self.places, more.to(held_.dtype))


@dataclass(frozen=True, slots=True)
class UsualDrift:
    """How a document's keys and values change, on average, when other documents stand before it.

    Attributes:
        layers: the offset to add in each layer, fp32 `(kv_heads, features)`; the features are those of a key, rotated
            to position 0, and of a value.
        slopes: for each layer, fp32 `(kv_heads, features, features)`: a token's features times the slope are added
            too. None: only the offset is added.
    """

    layers: list[torch.Tensor]
    slopes: list[torch.Tensor] | None = None
    _stacked: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def digest(self) -> str:
        """16 hex digits that identify the numbers."""
        tensors = [tensor.cpu() for tensor in (*self.layers, *(self.slopes or ()))]
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]

    @classmethod
    def between(
        cls,
        rotated: Sequence[Rotation],
        alone: Sequence[LayerKV],
        alone_at: torch.Tensor,
        together: Sequence[LayerKV],
        together_at: torch.Tensor,
    ) -> UsualDrift:
        """Return the mean change of tokens between two encodings: each document after the head, and all in a row.

        Args:
            rotated: the rotation of each layer of the model.
            alone: keys and values of the tokens, `(1, kv_heads, seq_len, head_dim)` per layer, with each document
                encoded after the head only.
            alone_at: their positions, int64 `(seq_len,)`.
            together: keys and values of the same tokens, with each document encoded after the previous ones.
            together_at: their positions, int64 `(seq_len,)`.
        """

        def means(layers: Sequence[LayerKV], at: torch.Tensor) -> list[torch.Tensor]:
            tokens = _Tokens.of_one_part(rotated, at)
            return [tokens.features(index, kv).mean(1) for index, kv in enumerate(layers)]

        before, after = means(alone, alone_at), means(together, together_at)
        return cls([now - was for was, now in zip(before, after, strict=True)])

    def add_to(self, rotated: Sequence[Rotation], layers: Sequence[LayerKV], layout: Layout) -> None:
        """Add the drift to every open token of `layers`, in place."""
        if len(layers) == 0:  # all layers of the model are recurrent
            return
        device = layers[0][0].device
        for positions in _blocks(layout.open, torch.zeros_like(layout.open), layout.part_of, device):
            self._give(layers, _Tokens.at(rotated, layout, positions.to(device), has_gaps=device.type != "cpu"))

    def give(self, rotated: Sequence[Rotation], layers: Sequence[LayerKV], start: int) -> None:
        """Add the drift to all tokens of `layers`, whose first token is at position `start`, in place."""
        positions = torch.arange(layers[0][0].shape[-2])
        self._give(layers, _Tokens.of_one_part(rotated, positions, start))

    def _give(self, layers: Sequence[LayerKV], block: _Tokens) -> None:
        for index, held in enumerate(layers):
            tokens, offset = block.to(held[0].device), self.layers[index].to(held[0].device)[:, None]
            if self.slopes:
                features = tokens.features(index, (t[..., tokens.places, :] for t in held))
                change = torch.baddbmm(offset, features, self.slopes[index].to(features.device))
            else:
                change = offset.repeat(1, len(tokens.positions), 1)
            tokens.give(index, held, change[None])

    def stacked(self, device: torch.device) -> torch.Tensor:
        """Return `layers` as one tensor on a device. It is made once per device."""
        if device not in self._stacked:
            self._stacked[device] = torch.stack([each.to(device) for each in self.layers])
        return self._stacked[device]


class DriftSums:
    """Learns a drift from the tokens of any number of contexts, of which it has only sums.

    The drift is a ridge regression of the change of a token's key and value on their values before. Half of the
    regression and of the mean is used: in full, they make later documents worse (docs/merging-experiments.md).
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: list[torch.Tensor] = []  # [features, 1] x [features, drift, 1] of each layer, by KV head

    def add(
        self,
        rotated: Sequence[Rotation],
        alone: Sequence[LayerKV],
        alone_at: torch.Tensor,
        together: Sequence[LayerKV],
        together_at: torch.Tensor,
    ) -> None:
        """Add tokens of one context. Arguments are those of `UsualDrift.between`."""
        was_at, are_at = (_Tokens.of_one_part(rotated, at) for at in (alone_at, together_at))
        self.tokens += len(alone_at)
        for index, (was_kv, is_kv) in enumerate(zip(alone, together, strict=True)):
            was, now = was_at.features(index, was_kv).cpu().double(), are_at.features(index, is_kv).cpu().double()
            one = torch.ones_like(was[..., :1])
            sums = torch.cat([was, one], -1).mT @ torch.cat([was, now - was, one], -1)
            self._sums[index : index + 1] = [self._sums[index] + sums if index < len(self._sums) else sums]

    def drift(self) -> UsualDrift:
        """Return the learned drift."""
        offsets, slopes = [], []
        for sums in self._sums:
            size, mean = sums.shape[1] - 1, sums[:, -1:] / self.tokens
            centre, drift = mean[..., :size], mean[..., size:-1]
            spread = sums[:, :size, :size] - self.tokens * centre.mT @ centre
            shared = sums[:, :size, size:-1] - self.tokens * centre.mT @ drift
            scale = (spread.diagonal(dim1=-2, dim2=-1) / self.tokens).clamp(min=1e-12).sqrt()[..., None]
            gram = spread / (scale * scale.mT)
            gram.diagonal(dim1=-2, dim2=-1).add_(PENALTY * self.tokens)
            slope = _LEARNED * torch.linalg.solve(gram, shared / scale) / scale
            slopes.append(slope.float().contiguous())
            offsets.append((_LEARNED * drift - centre @ slope)[:, 0].float().contiguous())
        return UsualDrift(offsets, slopes)


_LEARNED = 0.5
"""The share of a learned drift that is used, of its mean and of its regression."""


def _apart(side_by_side: torch.Tensor, key_dim: int) -> LayerKV:
    """Return views of the keys and the values of a tensor that has both in its last dimension."""
    return side_by_side[..., :key_dim], side_by_side[..., key_dim:]


@dataclass(frozen=True, slots=True)
class _Drift:
    """A linear model of the drift to add to a token, per KV head: `features @ slope + offset[part]`."""

    slope: torch.Tensor
    """`(kv_heads, features, features)`."""
    offset: torch.Tensor
    """`(kv_heads, parts, features)`."""

    @classmethod
    def fit(cls, features: torch.Tensor, drift: torch.Tensor, part_of: torch.Tensor, averages: torch.Tensor) -> _Drift:
        """Fit the model to recomputed tokens: each part's mean drift, and a ridge regression of the rest.

        Args:
            features: the tokens' cached keys and values, `(kv_heads, tokens, features)`.
            drift: the changes of these by recomputing, `(kv_heads, tokens, features)`.
            part_of: the index of each token's part, int64 `(tokens,)`.
            averages: the matrix from `averages`.
        """
        mean, centre = averages @ drift, averages @ features
        x = features - centre[:, part_of]
        scale = x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
        x = x / scale
        gram = x.mT @ x
        gram.diagonal(dim1=-2, dim2=-1).add_(PENALTY * x.shape[1])
        lower = torch.linalg.cholesky(gram)
        # Two solves of triangular systems: torch.cholesky_solve of a batch takes 121 CUDA kernels, these take 18.
        halfway = torch.linalg.solve_triangular(lower, x.mT @ (drift - mean[:, part_of]), upper=False)
        scaled = torch.linalg.solve_triangular(lower.mT, halfway, upper=True)
        slope = RIDGE * scaled / scale.mT
        return cls(slope, MEAN * mean - centre @ slope)

    def of(self, features: torch.Tensor, part_of: slice | torch.Tensor) -> torch.Tensor:
        """Return the drift to add to other tokens, `(kv_heads, tokens, features)`."""
        return torch.baddbmm(self.offset[:, part_of], features, self.slope)


def _without_gaps(numbers: torch.Tensor) -> slice | torch.Tensor:
    """Return ascending numbers as a slice if they have no gaps, or if all are equal; else unchanged."""
    if not len(numbers):
        return numbers
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if first == last or last - first + 1 == len(numbers) else numbers


def averages(part_of: torch.Tensor, parts: int) -> torch.Tensor:
    """Return a matrix, fp32 `(parts, tokens)`, that computes each part's mean, shrunk towards the overall mean."""
    member = (torch.arange(parts, device=part_of.device)[:, None] == part_of).float()
    return (member + SHRINK / len(part_of)) / (member.sum(1, keepdim=True) + SHRINK)
