"""The scatter pass: recompute a few tokens of a merged context in place, and let the others learn from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvcag.cache.attention import EnoughError, attend
from kvcag.cache.layers import LayerKV, scatter_cache
from kvcag.cache.rope import PositionShift
from kvcag.cache.select import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def recompute(
    model: PreTrainedModel, layers: list[LayerKV], layout: Layout, positions: torch.Tensor, *, correct: bool = True
) -> None:
    """Recompute the keys and values of the tokens at `positions` (1-D int64, ascending), in place.

    One forward pass: each token attends to all that stands before it, recomputed or not, and a cache layer writes
    its new key and value where the old ones stood. With every open token at once, this is a prefill. `correct` gives
    the other open tokens the drift that the recomputed ones show (`kvcag.cache.recompute`).
    """
    watch = DriftCorrection(model, layout, positions).watch if correct else None
    cache = scatter_cache(layers, positions.to(model.device), watch)

    def stop_at_the_last(layer_idx: int, *_: object) -> None:
        if layer_idx == len(layers) - 1:  # its keys and values are in place, and its output is nobody's
            raise EnoughError

    attend(model, layout.token_ids[positions], positions, cache, stop_at_the_last)


_MEAN = 0.6
"""Share of the estimated mean drift that is given: the tokens it is estimated from are those that change most."""

_RIDGE = 0.4
"""Share of the estimated drift of a token beyond its document's mean. At 1 it is worse than nothing."""

_SHRINK = 4.0
"""A document's mean counts as if it had this many more tokens of the mean of all documents."""

_PENALTY = 1.0
"""Of the ridge regression, in units of its features' variance."""

_BLOCK = {"cpu": 1024, "cuda": 16384}
"""Tokens that are corrected at a time: their fp32 copies stay small beside the cache; a GPU wants few launches."""


class DriftCorrection:
    """Corrects the tokens that are not recomputed. Its `watch` is called by the cache of the scatter pass."""

    def __init__(self, model: PreTrainedModel, layout: Layout, positions: torch.Tensor) -> None:
        chosen = torch.zeros_like(layout.open)
        chosen[positions] = True
        self.chosen = _Tokens.at(model, layout, positions.to(model.device))
        rest = torch.split((layout.open & ~chosen).nonzero()[:, 0], _BLOCK.get(model.device.type, 1024))
        self.rest = [_Tokens.at(model, layout, block.to(model.device)) for block in rest if len(block)]
        self.averages = _averages(self.chosen.part_of, int(layout.part_of[-1]) + 1)

    def watch(self, layer_idx: int, held: LayerKV, new: LayerKV) -> None:
        """Estimate layer `layer_idx`'s drift from `new`, and correct the rest of `held` by it, in place."""
        if not self.rest:
            return
        device = held[0].device
        chosen = self.chosen.to(device)
        cached = chosen.features(layer_idx, (t[..., chosen.positions, :] for t in held))
        now = chosen.features(layer_idx, new)
        drift = _Drift.fit(cached, now - cached, chosen.part_of, self.averages.to(device))
        for block in self.rest:
            rest = block.to(device)
            features = rest.features(layer_idx, (t[..., rest.positions, :] for t in held))
            rest.give(layer_idx, held, drift.of(features, rest.part_of)[None])


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Some tokens of the context: 1-D int64, where they stand and which part they belong to."""

    positions: torch.Tensor
    part_of: torch.Tensor
    move: PositionShift
    """From position 0 to where they stand."""

    @classmethod
    def at(cls, model: PreTrainedModel, layout: Layout, positions: torch.Tensor) -> _Tokens:
        part_of = layout.part_of.to(positions.device)[positions]
        return cls(positions, part_of, PositionShift(model, torch.zeros_like(positions), positions))

    def to(self, device: torch.device) -> _Tokens:
        return replace(self, positions=self.positions.to(device), part_of=self.part_of.to(device))

    def features(self, layer_idx: int, kv: Iterable[torch.Tensor]) -> torch.Tensor:
        """Key, as at position 0, and value of each token, side by side: `(kv_heads, tokens, features)`, fp32."""
        keys, values = kv
        side_by_side = torch.cat([keys, values], dim=-1).float()
        self.move.turn(layer_idx, side_by_side[..., : keys.shape[-1]], back=True)
        return side_by_side[0]

    def give(self, layer_idx: int, held: LayerKV, change: torch.Tensor) -> None:
        """Add `(1, kv_heads, tokens, features)` to these tokens of `held`, in place; `change` is used up."""
        head_dim = held[0].shape[-1]
        keys, values = change[..., :head_dim], change[..., head_dim:]
        self.move.turn(layer_idx, keys)
        held[0].index_add_(-2, self.positions, keys.to(held[0].dtype))
        held[1].index_add_(-2, self.positions, values.to(held[1].dtype))


@dataclass(frozen=True, slots=True)
class UsualDrift:
    """How keys and values change, on average, when documents stand before their own.

    Attributes:
        layers: `(kv_heads, key and value features)` a layer, fp32; keys as at position 0.
    """

    layers: list[torch.Tensor]

    @classmethod
    def between(
        cls,
        model: PreTrainedModel,
        alone: Sequence[LayerKV],
        alone_at: torch.Tensor,
        together: Sequence[LayerKV],
        together_at: torch.Tensor,
    ) -> UsualDrift:
        """The mean over tokens that were encoded behind a head alone, and behind other documents too.

        Args:
            model: what encoded them.
            alone: keys and values of the tokens, each document behind the head.
            alone_at: 1-D int64, the positions at which they were encoded there.
            together: those of the same tokens, documents one behind another.
            together_at: 1-D int64, their positions there.
        """

        def means(layers: Sequence[LayerKV], at: torch.Tensor) -> list[torch.Tensor]:
            tokens = _Tokens(at, torch.zeros_like(at), PositionShift(model, torch.zeros_like(at), at))
            return [tokens.features(index, kv).mean(1) for index, kv in enumerate(layers)]

        before, after = means(alone, alone_at), means(together, together_at)
        return cls([now - was for was, now in zip(before, after, strict=True)])

    def add_to(self, model: PreTrainedModel, layers: Sequence[LayerKV], layout: Layout) -> None:
        """Give it to every open token of `layers`, in place."""
        for run in _runs(layout.open):
            positions = torch.arange(run.start, run.stop, device=model.device)
            move = PositionShift(model, torch.zeros_like(positions), positions)
            for index, (keys, values) in enumerate(layers):
                drift = self.layers[index].to(keys.device)[None, :, None]
                turned = drift[..., : keys.shape[-1]].repeat(1, 1, len(positions), 1)
                move.turn(index, turned)
                keys[..., run, :] += turned
                values[..., run, :] += drift[..., keys.shape[-1] :]


def _runs(which: torch.Tensor) -> list[slice]:
    """Where a 1-D bool tensor is true, one slice a run."""
    edges = torch.nn.functional.pad(which.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True, slots=True)
class _Drift:
    """A linear model of the drift to give to a token, by KV head: `features @ slope + offset` of its part."""

    slope: torch.Tensor
    """`(kv_heads, features, features)`."""
    offset: torch.Tensor
    """`(kv_heads, parts, features)`."""

    @classmethod
    def fit(cls, features: torch.Tensor, drift: torch.Tensor, part_of: torch.Tensor, averages: torch.Tensor) -> _Drift:
        """From recomputed tokens: `features` and `drift` are `(kv_heads, tokens, features)`.

        A part's mean drift, and a ridge regression of what is left on how a token differs from its part's mean.
        """
        mean, centre = averages @ drift, averages @ features
        x = features - centre[:, part_of]
        scale = x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
        x = x / scale
        gram = x.mT @ x
        gram.diagonal(dim1=-2, dim2=-1).add_(_PENALTY * x.shape[1])
        lower = torch.linalg.cholesky(gram)
        # Solved by hand: torch.cholesky_solve of a batch is 121 kernels on CUDA, these two are 18.
        halfway = torch.linalg.solve_triangular(lower, x.mT @ (drift - mean[:, part_of]), upper=False)
        scaled = torch.linalg.solve_triangular(lower.mT, halfway, upper=True)
        slope = _RIDGE * scaled / scale.mT
        return cls(slope, _MEAN * mean - centre @ slope)

    def of(self, features: torch.Tensor, part_of: torch.Tensor) -> torch.Tensor:
        """The drift to give to other tokens, `(kv_heads, tokens, features)`."""
        return torch.baddbmm(self.offset[:, part_of], features, self.slope)


def _averages(part_of: torch.Tensor, parts: int) -> torch.Tensor:
    """What gives each part's mean over tokens, shrunk towards the mean of all: `(parts, tokens)`, fp32."""
    member = (torch.arange(parts, device=part_of.device)[:, None] == part_of).float()
    return (member + _SHRINK / len(part_of)) / (member.sum(1, keepdim=True) + _SHRINK)
