"""Published ways to choose the tokens to recompute, over the same cached documents as kvcag's strategies.

EPIC (ICML'25), CacheBlend (EuroSys'25) and ProphetKV (ICML'26) choose and recompute as in their papers, without
drift correction. The documents are encoded after the instruction, as for kvcag. This helps these methods: the papers
encode documents alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.attention import Call, EnoughError, attend
from kvcag.cache.layers import LayerKV, Layers, concat, layers_of, scatter_cache
from kvcag.cache.merge import Layout, Part, anchor, merge, recompute
from kvcag.chat_template import as_messages
from kvcag.core import MergedContext, MergeReport


def cacheblend(model: PreTrainedModel, layers: Layers, layout: Layout, tail_ids: torch.Tensor) -> torch.Tensor:
    """How far keys and values of layer 1 are off. The pass that finds it leaves layers 0 and 1 right for all tokens."""
    positions = layout.open.nonzero()[:, 0]
    scores = torch.zeros(len(layout.token_ids))

    def compare(layer_idx: int, held: LayerKV, new: LayerKV) -> None:
        if layer_idx == 1:
            for old, right in zip(held, new, strict=True):
                scores[positions] += (right - old[..., positions, :]).square().sum(dim=(0, 1, 3))
                old[..., positions, :] = right
            raise EnoughError

    attend(model, layout.token_ids[positions], positions, scatter_cache(layers, positions, compare))
    return scores


def prophetkv(model: PreTrainedModel, layers: Layers, layout: Layout, tail_ids: torch.Tensor) -> torch.Tensor:
    """The attention that the question gives to a token, over all layers and heads."""
    length, queries = len(layout.token_ids), len(tail_ids)
    scores = torch.zeros(length)

    def read(layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> None:
        grouped = q.reshape(k.shape[1], -1, q.shape[-1])
        weights = (grouped @ k[0].mT).float() * call.scaling
        hidden = ~call.mask(slice(0, queries), k.shape[2]).repeat(grouped.shape[1] // queries, 1)
        scores.add_(weights.masked_fill_(hidden, float("-inf")).softmax(-1).sum((0, 1))[:length])
        if layer_idx == len(layers) - 1:
            raise EnoughError

    positions = torch.arange(length, length + queries)
    attend(model, tail_ids, positions, scatter_cache(concat([layers], queries), positions), read)
    return scores


PUBLISHED: dict[str, Callable[..., torch.Tensor]] = {"cacheblend": cacheblend, "epic": anchor, "prophetkv": prophetkv}


def merged(memory: KVCacheMemory, ids: list[str], question: str, name: str, ratio: float) -> MergedContext:
    """A context as `KVCacheMemory.merge` makes it, by a published choice. On the CPU."""
    engine = memory.engine
    assert isinstance(engine, HFEngine)
    prompt = engine.template.split_system(memory.instruction, as_messages(question))
    head, _ = engine.prefill(prompt.head_ids)
    parts = [Part(torch.tensor(prompt.head_ids), head, 0, is_exact=True)]
    for index, item in enumerate(memory.get_by_ids(ids)):
        parts.append(Part(item.token_ids, layers_of(item.memory), item.base_position, index == 0))
    tail_ids = torch.tensor(prompt.tail_ids)
    with engine.exclusive() as model:
        moved = merge(model, parts, tail_ids, strategy="rotate")
        layout = moved.layout
        scores = PUBLISHED[name](model, moved.layers, layout, tail_ids)
        candidates = layout.open.nonzero()[:, 0]
        best = scores[candidates].argsort(descending=True, stable=True)[: int(ratio * len(layout.open))]
        chosen = candidates[best].sort().values
        recompute(model, moved.layers, layout, chosen, correct=False)
    length = len(layout.open)
    report = MergeReport("merged", name, length, length - len(chosen), len(chosen), 0)
    return engine.context_of(moved.layers, layout.token_ids.tolist(), prompt.tail_ids, report)
