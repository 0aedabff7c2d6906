"""Which tokens of a merged context are worth recomputing: one function a strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from kvcag.cache.attention import Call, EnoughError, attend
from kvcag.cache.layers import LayerKV, peek_cache, scatter_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Strategy = Literal["rotate", "anchor", "deviation", "query", "full"]
"""`rotate`: none. `anchor`: the first ones of each document. `deviation`: those whose keys and values change most.
`query`: those that the question attends to most. `full`: all."""

STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True, slots=True)
class Layout:
    """What stands where in a merged context; all 1-D, one entry a token.

    Attributes:
        token_ids: int64.
        part_of: int64, ascending, the index of the part that a token belongs to.
        open: bool, whether the token may be recomputed; the others are exact already.
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
    strategy: Strategy,
    ratio: float,
) -> torch.Tensor:
    """The positions to recompute, ascending, 1-D int64: at most `ratio` of all tokens, and only open ones."""
    candidates = layout.open.nonzero()[:, 0]
    budget = min(int(ratio * len(layout.token_ids)), len(candidates))
    if strategy == "full" or (ratio == 1 and strategy != "rotate"):
        return candidates
    if strategy == "rotate" or budget == 0:
        return candidates[:0]
    if budget == len(candidates):
        return candidates
    scores = _SCORES[strategy](model, layers, layout, tail_ids).cpu()
    best = scores[candidates].argsort(descending=True, stable=True)[:budget]
    return candidates[best].sort().values


def anchor(model: PreTrainedModel, layers: Sequence[LayerKV], layout: Layout, tail_ids: torch.Tensor) -> torch.Tensor:
    """The earlier a token stands in its document, the higher: the first k tokens of each, as in EPIC (ICML'25)."""
    starts = torch.searchsorted(layout.part_of, layout.part_of)
    return (starts - torch.arange(len(starts))).float()


def deviation(
    model: PreTrainedModel, layers: Sequence[LayerKV], layout: Layout, tail_ids: torch.Tensor
) -> torch.Tensor:
    """How far a token's key and value in layer 1 are from what they should be, as in CacheBlend (EuroSys'25).

    One layer of attention over all open tokens, and no more: the pass is stopped when layer 1 has its keys.
    """
    last = min(1, len(layers) - 1)
    positions = layout.open.nonzero()[:, 0]
    scores = torch.zeros(len(layout.token_ids))

    def compare(layer_idx: int, held: LayerKV, new: LayerKV) -> None:
        if layer_idx < last:
            return
        for old, right in zip(held, new, strict=True):
            at = positions.to(old.device)
            scores[positions] += (right.float() - old[..., at, :].float()).square().sum(dim=(0, 1, 3)).cpu()
        raise EnoughError

    # Layer 0 sees no other token, so what the pass writes there is what stood there already.
    cache = scatter_cache(layers, positions, compare)
    attend(model, layout.token_ids[positions], positions, cache)
    return scores


def query(model: PreTrainedModel, layers: Sequence[LayerKV], layout: Layout, tail_ids: torch.Tensor) -> torch.Tensor:
    """How much the question takes from a token: attention weight x norm of the value, over layers, heads, question.

    The idea of ProphetKV (ICML'26) with a score of our own. Weights are summed as they are made, a block of question
    tokens at a time, so that no attention map is kept.
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

    positions = torch.arange(length, length + len(tail_ids))
    attend(model, tail_ids, positions, peek_cache(layers), read)
    return torch.stack([part.cpu() for part in scores.values()]).sum(0)


_WEIGHTS = {"cpu": 2**20, "cuda": 2**25}
"""Attention weights held at a time: 4 and 128 MiB in fp32, and about as much again three times while they are made.
Products of a few rows at a time keep a GPU waiting: over 32,855 keys 21 ms a layer with 2**22, 4 with this."""


def _attention_sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention that each key gets from all queries and the heads that share it, `(kv_heads, keys)`, fp32.

    And the attention's output, which takes one product more: `(1, queries, heads, head_dim)`. The queries are the last
    of the keys.
    """
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q.reshape(kv_heads, -1, q.shape[2], q.shape[3])
    outputs = []
    first = keys - q.shape[2] if call.window is None else 0  # every query sees what stands before the first of them
    sums = torch.zeros(kv_heads, keys, device=q.device)
    rows = max(1, _WEIGHTS.get(q.device.type, 2**20) // (q.shape[1] * keys))
    for start in range(0, q.shape[2], rows):
        block = slice(start, min(start + rows, q.shape[2]))
        part = grouped[:, :, block].flatten(1, 2)
        weights = (part @ k[0].transpose(-1, -2)).float() * call.scaling
        if call.softcap is not None:
            weights = call.softcap * (weights / call.softcap).tanh()
        hidden = ~call.mask(block, keys)[:, first:].repeat(grouped.shape[1], 1)
        weights[..., first:].masked_fill_(hidden, float("-inf"))
        weights = weights.softmax(-1)
        sums += weights.sum(1)
        outputs.append((weights.to(v.dtype) @ v[0]).reshape(kv_heads, grouped.shape[1], -1, v.shape[-1]))
    return sums, torch.cat(outputs, dim=2).flatten(0, 1).transpose(0, 1)[None]


_Score = Callable[["PreTrainedModel", Sequence[LayerKV], Layout, torch.Tensor], torch.Tensor]
_SCORES: dict[str, _Score] = {"anchor": anchor, "deviation": deviation, "query": query}
