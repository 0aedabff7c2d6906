"""Put caches that were made one by one beside each other, as if their tokens had been read in this order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from kvcag.cache.layers import LayerKV, concat
from kvcag.cache.recompute import UsualDrift, recompute
from kvcag.cache.rope import PositionShift, check_mergeable
from kvcag.cache.select import STRATEGIES, Layout, Strategy, select
from kvcag.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Merged", "Part", "Strategy", "check_mergeable", "merge"]


@dataclass(frozen=True, slots=True)
class Part:
    """One cached piece of the context.

    Attributes:
        token_ids: 1-D int64.
        layers: keys, rotated to `base_position`, `base_position + 1`, …, and values. Never written to.
        base_position: the position of its first key as stored.
        is_exact: its keys and values are right where it stands now: the head, and the first document if it was encoded
            after that head. Nothing is spent on it.
    """

    token_ids: torch.Tensor
    layers: Sequence[LayerKV]
    base_position: int
    is_exact: bool


@dataclass(frozen=True, slots=True)
class Merged:
    """The merged cache.

    Attributes:
        layers: fresh memory, `(1, kv_heads, sum of lengths, head_dim)` each.
        recomputed: 1-D int64, the positions whose keys and values were recomputed, ascending.
        layout: the tokens; `open` are those that are an approximation.
    """

    layers: list[LayerKV]
    recomputed: torch.Tensor
    layout: Layout


@torch.no_grad()
def merge(
    model: PreTrainedModel,
    parts: Sequence[Part],
    tail_ids: torch.Tensor,
    *,
    strategy: Strategy = "query",
    ratio: float = 0.2,
    usual_drift: Callable[[], UsualDrift | None] | None = None,
) -> Merged:
    """Move each part to its place, and recompute the tokens that the strategy picks.

    The caller keeps everyone else from the model for the time of the call.

    Args:
        model: the model that made every part.
        parts: in the order in which they are to be read; the first is the head.
        tail_ids: 1-D int64, what is read after the parts: the question. Strategy `query` looks at it; where it is
            empty there is no question to choose by, and `query` chooses as `deviation` does.
        strategy: which tokens are recomputed (`kvcag.cache.select`).
        ratio: how many of them, as a share of all tokens of the parts, rounded down: 0 recomputes nothing, 1
            everything that is not exact. `rotate` and `full` do not look at it.
        usual_drift: asked for where nothing is recomputed, and given to all that is not exact. Recomputed tokens show
            their own documents' drift, which is better.

    Raises:
        InvalidInputError: an unknown strategy, a ratio outside [0, 1], or a part whose tokens and keys disagree.
        UnsupportedModelError: the model's caches cannot be merged (`check_mergeable`).
    """
    _check(parts, strategy, ratio)
    check_mergeable(model)
    layers = _place(model, parts)
    layout = Layout(
        token_ids=torch.cat([part.token_ids for part in parts]),
        part_of=torch.cat([torch.full((len(part.token_ids),), i) for i, part in enumerate(parts)]),
        open=torch.cat([torch.full((len(part.token_ids),), not part.is_exact) for part in parts]),
    )
    chosen = select(model, layers, layout, tail_ids, strategy=strategy, ratio=ratio)
    if len(chosen):
        recompute(model, layers, layout, chosen)
    elif usual_drift is not None and layout.open.any():
        drift = usual_drift()
        if drift is not None:
            drift.add_to(model, layers, layout)
    still_open = layout.open.clone()
    still_open[chosen] = False
    return Merged(layers, chosen, replace(layout, open=still_open))


@torch.no_grad()
def refine(
    model: PreTrainedModel, layers: list[LayerKV], layout: Layout, tail_ids: torch.Tensor, *, ratio: float
) -> torch.Tensor:
    """Recompute, in place, what another question needs of a context that was merged for an earlier one.

    The caller keeps everyone else from the model for the time of the call.

    Args:
        model: the model that made the context.
        layers: the merged context, written to.
        layout: its tokens; `open` are those that no question has had recomputed yet.
        tail_ids: 1-D int64, the question.
        ratio: how many tokens to recompute, as a share of all.

    Returns:
        The recomputed positions, 1-D int64, ascending.
    """
    chosen = select(model, layers, layout, tail_ids, strategy="query", ratio=ratio)
    if len(chosen):
        recompute(model, layers, layout, chosen)
    return chosen


@dataclass
class MergedBefore:
    """What is known of a merged context that is among an engine's recent contexts.

    Attributes:
        layout: its tokens; `open` are those that no question has had recomputed.
        tails: the token ids that followed it, one tuple for each question.
        settings: the strategy, ratio and bound that it was asked for with: who asks for others gets another context.
        refining: of questions that are asked at once, one refines the context.
    """

    layout: Layout
    tails: list[tuple[int, ...]]
    settings: tuple[str, float, float]
    refining: threading.Lock = field(default_factory=threading.Lock)


class MergeHistory:
    """The merged contexts of an engine. Forgets those not used for longest. Safe to use from several threads."""

    def __init__(self, remembered: int = 256) -> None:
        self._remembered = remembered
        self._contexts: OrderedDict[tuple[str, tuple[int, ...]], MergedBefore] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, namespace: str, context_ids: tuple[int, ...]) -> MergedBefore | None:
        """What is known of a context, if it was merged before."""
        with self._lock:
            found = self._contexts.get((namespace, context_ids))
            if found is not None:
                self._contexts.move_to_end((namespace, context_ids))
            return found

    def put(self, namespace: str, context_ids: tuple[int, ...], merged: MergedBefore) -> None:
        """Remember a context that was merged."""
        with self._lock:
            self._contexts[namespace, context_ids] = merged
            if len(self._contexts) > self._remembered:
                self._contexts.popitem(last=False)

    def clear(self, namespace: str) -> None:
        """Forget a namespace's contexts."""
        with self._lock:
            for key in [key for key in self._contexts if key[0] == namespace]:
                del self._contexts[key]


def _check(parts: Sequence[Part], strategy: str, ratio: float) -> None:
    if strategy not in STRATEGIES:
        raise InvalidInputError(f"unknown strategy {strategy!r}. Use one of {', '.join(STRATEGIES)}.")
    if not 0 <= ratio <= 1:
        raise InvalidInputError(f"ratio is {ratio}; it is the share of tokens to recompute, from 0 to 1.")
    if not any(len(part.token_ids) for part in parts):
        raise InvalidInputError("there are no tokens to merge. Pass at least one part that has some.")
    for index, part in enumerate(parts):
        lengths = {kv[0].shape[-2] for kv in part.layers}
        if len(part.token_ids) and lengths != {len(part.token_ids)}:
            raise InvalidInputError(
                f"part {index} has {len(part.token_ids)} token ids and keys for {sorted(lengths)}: they must agree"
            )


def _place(model: PreTrainedModel, parts: Sequence[Part]) -> list[LayerKV]:
    """All parts one after another in fresh memory, their keys turned once from where they stood to where they stand."""
    parts = [part for part in parts if len(part.token_ids)]
    layers = concat([part.layers for part in parts])
    stood = torch.cat([part.base_position + torch.arange(len(part.token_ids)) for part in parts])
    moved = (stood != torch.arange(len(stood))).nonzero()[:1, 0]
    if len(moved):  # what comes first is often the head and its document: not a bit of them changes
        first = int(moved)
        move = PositionShift(
            model, stood[first:].to(model.device), torch.arange(first, len(stood), device=model.device)
        )
        for index, (keys, _) in enumerate(layers):
            move.turn(index, keys[..., first:, :])
    return layers
