"""The scatter pass: recompute a few tokens of a merged context in place, and let the others learn from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvcag.cache.attend import EnoughError, attend
from kvcag.cache.drift import DriftCorrection
from kvcag.cache.hf import LayerKV, scatter_cache
from kvcag.cache.select import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def recompute(
    model: PreTrainedModel, layers: list[LayerKV], layout: Layout, positions: torch.Tensor, *, correct: bool = True
) -> None:
    """Recompute the keys and values of the tokens at `positions` (1-D int64, ascending), in place.

    One forward pass: each token attends to all that stands before it, recomputed or not, and a cache layer writes
    its new key and value where the old ones stood. With every open token at once, this is a prefill. `correct` gives
    the other open tokens the drift that the recomputed ones show (`kvcag.cache.drift`).
    """
    watch = DriftCorrection(model, layout, positions).watch if correct else None
    cache = scatter_cache(layers, positions.to(model.device), watch)

    def stop_at_the_last(layer_idx: int, *_: object) -> None:
        if layer_idx == len(layers) - 1:  # its keys and values are in place, and its output is nobody's
            raise EnoughError

    attend(model, layout.token_ids[positions], positions, cache, stop_at_the_last)
