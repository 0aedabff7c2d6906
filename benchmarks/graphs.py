"""A forward pass without kernel launches, to measure what a faster engine can gain.

It uses a static cache, a CUDA graph, and the heads that share a KV head as its queries. kvcag does not run this code:
it shows which parts cause the distance to the lower bound. A graph is captured for one number of new tokens over one
length of context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel, StaticCache

from kvcag.cache.layers import LayerKV, cache_argument

_NAME = "benchmark-grouped"


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attend with the query heads that share a KV head as that head's queries: keys are never repeated."""
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def static_pass(model: PreTrainedModel, layers: Sequence[LayerKV], new: int) -> Callable[[], torch.Tensor]:
    """A pass of `new` tokens over `layers` in a `StaticCache`. Each call writes the same places again."""
    length, device = layers[0][0].shape[-2], model.device
    cache = StaticCache(config=model.config, max_cache_len=length + new)
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    positions = torch.arange(length, length + new, device=device)
    mask = (torch.arange(length + new, device=device) <= positions[:, None])[None, None]
    token_ids = torch.ones(1, new, dtype=torch.long, device=device)

    @torch.no_grad()
    def run() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)  # type: ignore[union-attr]
        out = model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions[None],
            **cache_argument(model, cache),
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].argmax(-1)

    return run


def captured(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same pass as a CUDA graph: one launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return chosen

    return replay


def _grouped(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: `query` `(1, heads, new, head_dim)` to `(1, new, heads, head_dim)`."""
    kv_heads, new = key.shape[1], query.shape[2]
    q = query.reshape(1, kv_heads, -1, query.shape[-1])
    mask = attention_mask.repeat(1, 1, q.shape[2] // new, 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if new == 1:  # two small products read keys and values once; a fused kernel has one block a KV head
        weights = (q @ key.transpose(-1, -2)).float().mul_(scaling).masked_fill_(~mask, float("-inf"))
        out = weights.softmax(-1).to(value.dtype) @ value
    else:
        out = scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(1, -1, new, value.shape[-1]).transpose(1, 2), None


AttentionInterface.register(_NAME, _grouped)
