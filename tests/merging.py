"""Contexts to merge, encoded with the model itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from kvcag.cache.layers import LayerKV, cache_argument, contiguous_copy, cut, layers_of
from kvcag.cache.merge import Part


def ids(length: int, seed: int = 0) -> torch.Tensor:
    """Random byte tokens, 1-D."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def encode(model: PreTrainedModel, token_ids: torch.Tensor, prefix: torch.Tensor | None = None) -> list[LayerKV]:
    """The keys and values of `token_ids` alone, encoded in an ordinary forward pass after `prefix`."""
    if len(token_ids) == 0:
        return []
    prefix = token_ids[:0] if prefix is None else prefix
    cache = DynamicCache()
    model(torch.cat([prefix, token_ids])[None].to(model.device), **cache_argument(model, cache), use_cache=True)
    return contiguous_copy(cut(layers_of(cache), len(prefix)))


@torch.no_grad()
def encode_at(model: PreTrainedModel, token_ids: torch.Tensor, position: int) -> list[LayerKV]:
    """Keys and values of tokens that stand at `position` with nothing before them."""
    cache = DynamicCache()
    positions = torch.arange(position, position + len(token_ids))[None]
    model(token_ids[None], position_ids=positions, **cache_argument(model, cache), use_cache=True)
    return layers_of(cache)


def parts_of(model: PreTrainedModel, head: torch.Tensor, documents: Sequence[torch.Tensor]) -> list[Part]:
    """A head, and documents that were each encoded directly after it."""
    encoded = [Part(head, encode(model, head), 0, True)]
    encoded += [
        Part(document, encode(model, document, head), len(head), is_exact=i == 0)
        for i, document in enumerate(documents)
    ]
    return encoded


def tokens_of(parts: Sequence[Part]) -> torch.Tensor:
    return torch.cat([part.token_ids for part in parts])


def error(layers: Sequence[LayerKV], expected: Sequence[LayerKV]) -> float:
    """The largest relative error of a layer's keys or values."""
    return max(
        float((a - b).norm() / b.norm())
        for one, other in zip(layers, expected, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def equal(layers: Sequence[LayerKV], expected: Sequence[LayerKV]) -> bool:
    """Whether every key and value is bitwise the same."""
    return len(layers) == len(expected) and all(
        torch.equal(a, b) for one, other in zip(layers, expected, strict=True) for a, b in zip(one, other, strict=True)
    )
