"""Encoding ahead of the questions, in pieces, and never in the way of an answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvcag.cache.layers import LayerKV, contiguous_copy, crop, cut, generation_cache, layers_of
from kvcag.engines.hf import HFEngine
from kvcag.engines.model_lock import Interrupted
from kvcag.errors import EmptyPromptError


def encode_in_background(
    engine: HFEngine,
    prefix_ids: Sequence[int],
    token_ids: Sequence[int],
    *,
    stop: threading.Event,
    namespace: str = "",
    piece_tokens: int = 64,
    quiet_s: float = 0.25,
    meanwhile: Callable[[], None] | None = None,
    wanted: Callable[[], bool] | None = None,
) -> tuple[list[LayerKV], int]:
    """`HFEngine.encode_after`, while nobody asks anything.

    A forward pass takes one piece. It waits until nobody has wanted the model for `quiet_s` seconds, and is broken off
    between two layers when somebody does; what earlier pieces encoded is kept meanwhile, and the piece is begun again.

    Args:
        engine: the model.
        prefix_ids: what stands before the tokens; kept among the recent contexts.
        token_ids: what is encoded.
        stop: gives up, between two layers.
        namespace: whose recent contexts these are.
        piece_tokens: tokens of one forward pass. A layer of it is what an answer may have to wait for.
        quiet_s: for how long nobody has to have wanted the model.
        meanwhile: called now and then while it waits for that.
        wanted: asked after each interruption whether to go on.

    Returns:
        Keys and values of `token_ids` alone, `(1, kv_heads, seq_len, head_dim)` a layer, the caller's own; and how
        often the work stepped aside.

    Raises:
        ContextLengthError: more tokens than the model's context.
        Interrupted: `stop` was set, or it is not wanted any more.
    """
    if not token_ids:
        raise EmptyPromptError("there are no tokens to encode")
    ids = (*prefix_ids, *token_ids)
    engine.check_fits(len(ids), 0)
    known, pieces = engine.prefixes.match(prefix_ids, namespace)
    cache = generation_cache(pieces, room=len(ids) - known, before_update=engine.lock.step_aside)
    done, interruptions = known, 0
    while done < len(ids):
        piece = ids[done : done + piece_tokens]
        try:
            with engine.lock.idle(quiet_s, stop, meanwhile):
                engine.forward(piece, cache)
            done += len(piece)
        except Interrupted:
            if stop.is_set() or (wanted is not None and not wanted()):
                raise
            interruptions += 1
            crop(cache, done)
    layers = layers_of(cache)
    if known < len(prefix_ids):
        engine.prefixes.insert(prefix_ids, cut(layers, 0, len(prefix_ids)), namespace)
    return contiguous_copy(cut(layers, len(prefix_ids))), interruptions
