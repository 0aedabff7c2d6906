"""What the recomputed tokens of a context tell about the others.

A cached document does not know what stands before it now. The tokens that are recomputed show what that changes: part
of it is common to their document, part of it depends on the token. Both are estimated while the tokens are
recomputed, layer by layer, and given to the tokens that are not, so that the next layer's recomputed tokens already
attend to corrected neighbours. It needs no forward pass of its own (figures: docs/merging.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvcag.cache.hf import LayerKV
from kvcag.cache.rope import Move
from kvcag.cache.select import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MEAN = 0.6
"""Share of the estimated mean drift that is given: the tokens it is estimated from are those that change most."""

_RIDGE = 0.4
"""Share of the estimated drift of a token beyond its document's mean. At 1 it is worse than nothing."""

_SHRINK = 4.0
"""A document's mean counts as if it had this many more tokens of the mean of all documents."""

_PENALTY = 1.0
"""Of the ridge regression, in units of its features' variance."""

_BLOCK = 1024
"""Tokens that are corrected at a time, so that their fp32 copies stay small beside the cache."""


class DriftCorrection:
    """Corrects the tokens that are not recomputed. Its `watch` is called by the cache of the scatter pass."""

    def __init__(self, model: PreTrainedModel, layout: Layout, positions: torch.Tensor) -> None:
        chosen = torch.zeros_like(layout.open)
        chosen[positions] = True
        rest = (layout.open & ~chosen).nonzero()[:, 0]
        device = model.device
        self.part_of, self.parts = layout.part_of.to(device), int(layout.part_of[-1]) + 1
        self.chosen = _from_origin(model, positions.to(device))
        self.rest = [_from_origin(model, block.to(device)) for block in torch.split(rest, _BLOCK) if len(block)]

    def watch(self, layer_idx: int, held: LayerKV, new: LayerKV) -> None:
        """Estimate layer `layer_idx`'s drift from `new`, and correct the rest of `held` by it, in place."""
        if not self.rest:
            return
        cached = self._features(layer_idx, held, self.chosen)
        keys = new[0].float().clone()
        self.chosen.turn(layer_idx, keys, back=True)
        now = torch.cat([keys, new[1].float()], dim=-1)[0]
        drift = _Drift.fit(cached, now - cached, self._part(self.chosen, cached), self.parts)
        for move in self.rest:
            change = drift.of(self._features(layer_idx, held, move), self._part(move, cached))[None]
            head_dim = held[0].shape[-1]
            change_keys, change_values = change[..., :head_dim], change[..., head_dim:]
            move.turn(layer_idx, change_keys)
            at = move.end.to(change.device)
            held[0].index_add_(-2, at, change_keys.to(held[0].dtype))
            held[1].index_add_(-2, at, change_values.to(held[1].dtype))

    def _features(self, layer_idx: int, held: LayerKV, move: Move) -> torch.Tensor:
        """Key, as at position 0, and value of each token, side by side: `(kv_heads, tokens, features)`, fp32."""
        at = move.end.to(held[0].device)
        keys, values = (t[..., at, :].float() for t in held)
        move.turn(layer_idx, keys, back=True)
        return torch.cat([keys, values], dim=-1)[0]

    def _part(self, move: Move, like: torch.Tensor) -> torch.Tensor:
        """Which part each token belongs to."""
        return self.part_of[move.end].to(like.device)


def _from_origin(model: PreTrainedModel, at: torch.Tensor) -> Move:
    return Move(model, torch.zeros_like(at), at)


@dataclass(frozen=True, slots=True)
class _Drift:
    """A linear model of the drift of one layer, for each KV head: of the document, and of the token within it."""

    mean: torch.Tensor
    """`(kv_heads, parts, features)`: the drift of each document."""
    centre: torch.Tensor
    """`(kv_heads, parts, features)`: the features of each document."""
    scale: torch.Tensor
    """`(kv_heads, 1, features)`: how far features are from their document's."""
    slope: torch.Tensor
    """`(kv_heads, features, features)`: drift beyond the document's, from scaled features."""

    @classmethod
    def fit(cls, features: torch.Tensor, drift: torch.Tensor, part_of: torch.Tensor, parts: int) -> _Drift:
        """From recomputed tokens: `features` and `drift` are `(kv_heads, tokens, features)`."""
        mean, centre = _means(drift, part_of, parts), _means(features, part_of, parts)
        x = features - centre[:, part_of]
        scale = x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
        x = x / scale
        gram = x.mT @ x
        gram.diagonal(dim1=-2, dim2=-1).add_(_PENALTY * x.shape[1])
        slope = torch.cholesky_solve(x.mT @ (drift - mean[:, part_of]), torch.linalg.cholesky(gram))
        return cls(mean, centre, scale, slope)

    def of(self, features: torch.Tensor, part_of: torch.Tensor) -> torch.Tensor:
        """The drift to give to other tokens, `(kv_heads, tokens, features)`."""
        x = (features - self.centre[:, part_of]) / self.scale
        return _MEAN * self.mean[:, part_of] + _RIDGE * (x @ self.slope)


def _means(of: torch.Tensor, part_of: torch.Tensor, parts: int) -> torch.Tensor:
    """The mean of each part's tokens, `(kv_heads, parts, features)`, shrunk towards the mean of all."""
    counts = part_of.bincount(minlength=parts)
    sums = of.new_zeros(of.shape[0], parts, of.shape[2]).index_add_(1, part_of, of)
    return (sums + _SHRINK * of.mean(1, keepdim=True)) / (counts + _SHRINK)[:, None]
