"""The scatter pass: recompute a few tokens of a merged context in place, and let the others learn from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvcag.cache.attend import attend
from kvcag.cache.hf import LayerKV, scatter_cache
from kvcag.cache.rope import Turns, rotations
from kvcag.cache.select import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DRIFT = 0.75
"""Share of a document's mean drift that its other keys are given. 0.5 to 1.0 are alike (docs/merging.md)."""


def recompute(
    model: PreTrainedModel,
    layers: list[LayerKV],
    layout: Layout,
    positions: torch.Tensor,
    *,
    drift: float = DRIFT,
) -> None:
    """Recompute the keys and values of the tokens at `positions` (1-D int64, ascending), in place.

    One forward pass: each token attends to all that stands before it, recomputed or not, and a cache layer writes
    its new key and value where the old ones stood. With every open token at once, this is a prefill.

    The recomputed tokens show how the keys of their document drift once other documents stand before it, so the
    mean of (new - old), rotated back to position 0, by layer and KV head, times `drift`, is added to the document's
    other keys.
    """
    correction = _Drift(model, layout, positions, drift)
    attend(model, layout.token_ids[positions], positions, scatter_cache(layers, positions, correction.watch))
    correction.apply(layers)


class _Drift:
    """Measures the drift of each part's keys while they are recomputed, and gives it to the keys that are not."""

    def __init__(self, model: PreTrainedModel, layout: Layout, positions: torch.Tensor, weight: float) -> None:
        self.weight = weight
        self.layout, self.positions = layout, positions
        counts = layout.part_of[positions].bincount(minlength=int(layout.part_of[-1]) + 1)
        chosen = torch.zeros_like(layout.open)
        chosen[positions] = True
        self.others = (layout.open & ~chosen & (counts[layout.part_of] > 0)).nonzero()[:, 0]
        self.counts = counts
        self.back, self.forth = Turns(rotations(model)), Turns(rotations(model))
        self.drifts: list[torch.Tensor] = []

    def watch(self, layer_idx: int, held: LayerKV, new: LayerKV) -> None:
        if not len(self.others):
            return
        device = held[0].device
        at = self.positions.to(device)
        change = new[0].float() - held[0][..., at, :].float()
        rotation = self.back.rotations[layer_idx]
        if rotation.module is not None:
            rotation.turn(change, self.back.between(layer_idx, at, torch.zeros_like(at)), change)
        parts = self.layout.part_of.to(device)[at]
        total = change.new_zeros((*change.shape[:2], len(self.counts), change.shape[-1]))
        total.index_add_(2, parts, change)
        self.drifts.append(total / self.counts.to(device).clamp(min=1)[:, None])

    def apply(self, layers: Sequence[LayerKV]) -> None:
        if not len(self.others):
            return
        for layer_idx, ((keys, _), drift) in enumerate(zip(layers, self.drifts, strict=True)):
            at = self.others.to(keys.device)
            move = drift[..., self.layout.part_of.to(keys.device)[at], :] * self.weight
            rotation = self.forth.rotations[layer_idx]
            if rotation.module is not None:
                rotation.turn(move, self.forth.between(layer_idx, torch.zeros_like(at), at), move)
            keys.index_add_(-2, at, move.to(keys.dtype))
