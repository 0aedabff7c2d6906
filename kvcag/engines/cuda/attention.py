"""Attention over caches whose addresses, lengths and positions are read on the device.

A CUDA graph replays the same kernels with the same arguments. So that one graph works for every generation, at any
length, the kernels here take neither a pointer to a cache nor a length. They read both from two tensors (`Inputs`):

- `table`, int64 `(sequences, layers, 8)`, of `GenerationCache.addresses`: the addresses of a layer's keys and values,
  and of those that another cache lent to it. Sequences with the same lent part are adjacent.
- `positions`, int64 `(sequences, tokens)`, ascending: the position of each new token. A query at position `p` sees the
  keys 0 … p. Position -1 marks a place without a token: nothing is written for it, and its output is undefined.

Attention is divided among the GPU's processors as in Flash-Decoding: each program takes one block of queries of one KV
head and one share of the keys, and writes a partial output and the logarithm of its sum of weights; a second kernel
joins the shares. The query heads that share a KV head are rows of the same block, so each key is read once for all of
them. The tokens of several sequences are rows of a block too: a block reads a shared lent part once for all of them
(Hydragen, Juravsky et al. 2024), and a sequence's own keys for its own rows. Scores and sums are fp32.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from transformers import AttentionInterface

from kvcag.errors import UnsupportedModelError

NAME = "kvcag_cuda"
"""The name under which `attention` is registered with transformers."""

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a pass on the device; see the module's description.

    Attributes:
        table: int64 `(sequences, layers, 8)`.
        positions: int64 `(sequences, tokens)`.
        scores: int64 `(1,)`, the address of fp32 `(kv_heads, first position)`, to which each layer adds how much the
            tokens of the pass use the keys before them (`kvcag.cache.merge.query`); None: no scores are computed.
    """

    table: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor | None = None


inputs: ContextVar[Inputs] = ContextVar("kvcag_cuda_inputs")
"""The inputs of the pass that runs, or is captured, now."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one call is divided into programs.

    Attributes:
        rows: the rows of one program; each query head of a token is a row.
        keys: the number of keys that a program reads at a time.
        splits: the number of programs that share the keys of one block of queries.
        warps: the number of warps (32 threads each) of one program.
        stages: the number of tiles of keys that are loaded ahead.
    """

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, processors: int) -> Tiles:
        """Choose tiles for `rows` rows per KV head, over all sequences."""
        wide = head_dim > 128
        if dtype == torch.float32:
            size, keys, warps, stages = (16 if rows <= 16 else 32), (16 if wide else 32), 4, 2
        elif rows <= 16:
            size, keys, warps, stages = 16, (32 if wide else 64), 4, 3
        elif rows <= 128 or wide:
            size, keys, warps, stages = (32 if rows <= 32 else 64), (32 if wide else 64), 4, 3
        else:
            size, keys, warps, stages = 128, 64, 8, 3
        programs, splits = kv_heads * triton.cdiv(rows, size), 1
        while programs * splits * 2 <= processors and splits < 64:
            splits *= 2
        return cls(size, keys, splits, warps, stages)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def attend(
    query: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    kv_heads: int,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    tiles: Tiles | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with new tokens over the caches in `table`, which already have the tokens' keys and values.

    Args:
        query: `(sequences, heads, tokens, head_dim)`, fp32, fp16 or bf16; the last dimension contiguous.
        table: one layer's entries, int64 `(sequences, 8)`.
        positions: int64 `(sequences, tokens)`, ascending.
        kv_heads: the number of KV heads, which divides `heads`.
        scaling: the factor of the scores.
        window: how many tokens a query sees, including its own; None: all.
        softcap: the bound of the scores, as in Gemma 2; None: unbounded.
        sinks: the logit of an additional key without a value per head, `(heads,)`, as in gpt-oss.
        tiles: how to divide the work; None: chosen by shape.
        weights: fp32 `(kv_heads, sequences * tokens * group)`, with `group = heads / kv_heads`, to which the binary
            logarithm of each query's sum of weights is written.

    Returns:
        `(sequences, tokens, heads, head_dim)`.
    """
    sequences, heads, tokens, head_dim = query.shape
    group = heads // kv_heads
    tiles = tiles or Tiles.of(sequences * tokens * group, kv_heads, head_dim, query.dtype, _processors(query.device))
    padded = max(16, triton.next_power_of_2(head_dim))
    out = torch.empty(sequences, tokens, heads, head_dim, dtype=query.dtype, device=query.device)
    rows = sequences * heads * tokens
    partial, sums = out, positions  # placeholders, not written without splits
    if tiles.splits > 1:
        partial = torch.empty(tiles.splits, rows, head_dim, dtype=torch.float32, device=query.device)
        sums = torch.empty(tiles.splits, rows, dtype=torch.float32, device=query.device)
    _attend[(triton.cdiv(sequences * tokens * group, tiles.rows), kv_heads, tiles.splits)](
        query,
        table,
        positions,
        positions if sinks is None else sinks,
        partial,
        sums,
        positions if weights is None else weights,
        scaling,
        softcap or 0.0,
        window or 0,
        tokens,
        sequences * tokens,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        table.stride(0),
        GROUP=group,
        DIM=head_dim,
        PADDED=padded,
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        SPLITS=tiles.splits,
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        SUNK=sinks is not None,
        WEIGHED=weights is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if tiles.splits > 1:
        _join[(rows,)](
            partial,
            sums,
            out,
            positions if weights is None else weights,
            sequences * tokens,
            kv_heads,
            GROUP=group,
            DIM=head_dim,
            PADDED=padded,
            SPLITS=tiles.splits,
            WEIGHED=weights is not None,
            num_warps=1 if tiles.splits < 16 else 4,
        )
    return out


def score(
    query: torch.Tensor,
    entry: torch.Tensor,
    positions: torch.Tensor,
    kv_heads: int,
    weights: torch.Tensor,
    scores: torch.Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Add the attention that each key gets from all queries, times the norm of its value, to the key's score.

    Args:
        query: `(1, heads, tokens, head_dim)`, as for `attend`.
        entry: the layer's entry of the table, int64 `(8,)`, without a lent part.
        positions: int64 `(tokens,)`. Tokens that repeat the previous position are padding and do not count.
        kv_heads: the number of KV heads.
        weights: the result of `attend`.
        scores: `Inputs.scores`, the address of the scores of the keys before the first position.
        scaling: as for `attend`.
        window: as for `attend`.
        softcap: as for `attend`.
    """
    _, heads, tokens, head_dim = query.shape
    padded = max(16, triton.next_power_of_2(head_dim))
    keys = 32 if padded > 128 else 64 if query.dtype == torch.float32 else 128
    _score[(132, kv_heads)](
        query,
        entry,
        positions,
        weights,
        scores,
        scaling,
        softcap or 0.0,
        window or 0,
        tokens,
        query.stride(1),
        query.stride(2),
        GROUP=heads // kv_heads,
        DIM=head_dim,
        PADDED=padded,
        ROWS=64 if padded <= 128 else 32,
        KEYS=keys,
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        num_warps=4,
        num_stages=2,
    )


def append(key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> None:
    """Write keys and values of new tokens, `(sequences, kv_heads, tokens, head_dim)`, into the caches in `table`."""
    sequences, kv_heads, tokens, head_dim = key.shape
    _append[(sequences * tokens, kv_heads)](
        key,
        value,
        table,
        positions,
        tokens,
        *key.stride()[:3],
        *value.stride()[:3],
        table.stride(0),
        DIM=head_dim,
        PADDED=triton.next_power_of_2(head_dim),
        num_warps=1,
    )


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' `AttentionInterface` requires.

    `key` and `value` are those of the new tokens; the cache has them already. Returns
    `(sequences, tokens, heads, head_dim)`.
    """
    if value.shape[-1] != query.shape[-1]:
        raise UnsupportedModelError("its keys and values have different sizes")
    given = inputs.get()
    query = query if query.stride(-1) == 1 else query.contiguous()
    entries = given.table[:, int(module.layer_idx)]  # type: ignore[arg-type]
    kv_heads, heads, tokens = key.shape[1], *query.shape[1:3]
    how: dict[str, Any] = {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": sliding_window,
        "softcap": softcap,
    }
    if given.scores is None:
        return attend(query, entries, given.positions, kv_heads, sinks=s_aux, **how), None
    weights = torch.empty(kv_heads, tokens * heads // kv_heads, dtype=torch.float32, device=query.device)
    out = attend(query, entries, given.positions, kv_heads, sinks=s_aux, weights=weights, **how)
    score(query, entries[0], given.positions[0], kv_heads, weights, given.scores, **how)
    return out, None


AttentionInterface.register(NAME, attention)


@triton.jit
def _read(
    best, total, acc, q, keys, values, n, end, limit, fold, lift, position, scaling, softcap, window,
    DIM: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Attend to the keys n … n + KEYS, and update `best`, the largest score, and the sums of weights and of values.

    A row sees the keys before `limit`. Key `i` is at position `i`, or at `i + lift` from `fold` on.
    """
    d = tl.arange(0, PADDED)
    j = n + tl.arange(0, KEYS)
    there = j < end
    if MASKED or DIM < PADDED:
        k = tl.load(keys + j[None, :] * DIM + d[:, None], mask=there[None, :] & (d[:, None] < DIM), other=0.0)
        v = tl.load(values + j[:, None] * DIM + d[None, :], mask=there[:, None] & (d[None, :] < DIM), other=0.0)
    else:
        k = tl.load(keys + j[None, :] * DIM + d[:, None])
        v = tl.load(values + j[:, None] * DIM + d[None, :])
    score = tl.dot(q, k, input_precision="ieee")
    if CAPPED:
        score = score * scaling
        score = softcap * LOG2E * (1.0 - 2.0 / (tl.math.exp2(score * (2.0 * LOG2E / softcap)) + 1.0))
    else:
        score = score * (scaling * LOG2E)
    if MASKED:
        at = tl.where(j >= fold, j + lift, j)
        seen = there[None, :] & (j[None, :] < limit[:, None]) & (at[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (at[None, :] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
    now = tl.maximum(best, tl.max(score, 1))
    base = tl.where(now == float("-inf"), 0.0, now)
    weight = tl.math.exp2(score - base[:, None])
    shrunk = tl.math.exp2(best - base)
    total = total * shrunk + tl.sum(weight, 1)
    acc = acc * shrunk[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return now, total, acc


@triton.jit
def _read_share(
    best, total, acc, q, keys, values, begin, common, last, split, limit, fold, lift,
    position, scaling, softcap, window,
    DIM: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Attend to a share of the keys begin … last. Those before `common` need no mask, because every row sees them."""
    begin = begin // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(tl.maximum(last - begin, 0), KEYS), SPLITS) * KEYS
    low = begin + split * share
    high = tl.minimum(low + share, last)
    middle = low
    if q.shape[0] >= 64 and not WINDOWED:  # with few rows, masks cost nothing beside reading keys
        middle = low + tl.maximum(tl.minimum(high, common) - low, 0) // KEYS * KEYS
        for n in range(low, middle, KEYS):
            best, total, acc = _read(
                best, total, acc, q, keys, values, n, high, limit, fold, lift, position, scaling, softcap, window,
                DIM, PADDED, KEYS, False, WINDOWED, CAPPED,
            )  # fmt: skip
    for n in range(middle, high, KEYS):
        best, total, acc = _read(
            best, total, acc, q, keys, values, n, high, limit, fold, lift, position, scaling, softcap, window,
            DIM, PADDED, KEYS, True, WINDOWED, CAPPED,
        )  # fmt: skip
    return best, total, acc


@triton.jit
def _attend(
    query, table, positions, sinks, partial, sums, weights, scaling, softcap, window, tokens, every,
    stride_sequence, stride_head, stride_token, stride_table,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SUNK: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """Attend with one block of queries of one KV head over one share of the keys. `every`: tokens of all sequences."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last blocks take longest, so they start first
    kv_head, split = tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    dtype = query.dtype.element_ty

    row = block * ROWS + tl.arange(0, ROWS)
    at, head = row // GROUP, kv_head * GROUP + row % GROUP
    real = at < every
    sequence = at // tokens
    d = tl.arange(0, PADDED)
    where = sequence * stride_sequence + head * stride_head + (at % tokens) * stride_token
    q = tl.load(query + where[:, None] + d[None, :], mask=real[:, None] & (d[None, :] < DIM), other=0.0)
    position = tl.load(positions + at, mask=real, other=-1).to(tl.int32)
    real = real & (position >= 0)

    far: tl.constexpr = 0x7FFFFFFF
    lowest = tl.min(tl.where(real, position, far), 0)
    first, final = (
        (block * ROWS) // GROUP // tokens,
        tl.minimum((block * ROWS + ROWS - 1) // GROUP, every - 1) // tokens,
    )

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    if SUNK:
        if split == 0:
            best = tl.load(sinks + head, mask=head < kv_heads * GROUP, other=0.0).to(tl.float32) * LOG2E
            total = tl.full([ROWS], 1.0, tl.float32)

    lender = tl.load(table + sequence * stride_table + 3, mask=real, other=0)
    borrowed = tl.load(table + sequence * stride_table + 7, mask=real, other=0).to(tl.int32)
    begins = tl.load(table + sequence * stride_table + 6, mask=real, other=-1).to(tl.int32)
    before, began = tl.min(lender * 0, 0), -1
    for s in range(first, final + 1):
        entry = table + s * stride_table
        start, length = tl.load(entry + 6).to(tl.int32), tl.load(entry + 7).to(tl.int32)
        lent = tl.load(entry + 3)
        if ((lent != before) | (start != began)) & (length > 0):  # the first sequence with this lent part
            mine = real & (lender == lent) & (begins == start)
            limit = tl.where(mine, borrowed, 0)
            offset = kv_head * tl.load(entry + 5) * DIM
            keys = tl.multiple_of(lent.to(tl.pointer_type(dtype)), 16) + offset
            values = tl.multiple_of(tl.load(entry + 4).to(tl.pointer_type(dtype)), 16) + offset
            begin = 0
            if WINDOWED:
                least = tl.min(tl.where(mine, position, far), 0)
                begin = tl.maximum(least - window + 1 - start, 0)
            common = tl.minimum(tl.min(tl.where(real, limit, far), 0), lowest + 1 - start)
            best, total, acc = _read_share(
                best, total, acc, q, keys, values, begin, common, tl.max(limit, 0), (split + s) % SPLITS,
                limit, 0, start, position, scaling, softcap, window,
                DIM, PADDED, KEYS, SPLITS, WINDOWED, CAPPED,
            )  # fmt: skip
        before, began = lent, start

        mine = real & (sequence == s)
        limit = tl.where(mine, far, 0)
        offset = kv_head * tl.load(entry + 2) * DIM
        keys = tl.multiple_of(tl.load(entry).to(tl.pointer_type(dtype)), 16) + offset
        values = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(dtype)), 16) + offset
        # The number of own keys before a position: those before the lent part, and those after it.
        last = tl.max(tl.where(mine, position, -1), 0) + 1
        last = tl.minimum(last, start) + tl.maximum(last - start - length, 0)
        common = tl.minimum(lowest + 1, start) + tl.maximum(lowest + 1 - start - length, 0)
        common = tl.minimum(tl.min(tl.where(real, limit, far), 0), common)
        begin = 0
        if WINDOWED:
            least = tl.maximum(tl.min(tl.where(mine, position, far), 0) - window + 1, 0)
            begin = tl.minimum(least, start) + tl.maximum(least - start - length, 0)
        best, total, acc = _read_share(
            best, total, acc, q, keys, values, begin, common, last, (split + s) % SPLITS,
            limit, start, length, position, scaling, softcap, window,
            DIM, PADDED, KEYS, SPLITS, WINDOWED, CAPPED,
        )  # fmt: skip

    some = tl.where(total == 0.0, 1.0, total)
    acc = acc / some[:, None]
    real = at < every
    wanted = real[:, None] & (d[None, :] < DIM)
    if SPLITS == 1:
        to = at * (kv_heads * GROUP) + head
        tl.store(partial + to[:, None] * DIM + d[None, :], acc.to(partial.dtype.element_ty), mask=wanted)
        if WEIGHED:
            tl.store(weights + kv_head * (every * GROUP) + row, best + tl.math.log2(some), mask=real)
    else:
        to = (split * kv_heads + kv_head) * (every * GROUP) + row
        tl.store(partial + to[:, None].to(tl.int64) * DIM + d[None, :], acc, mask=wanted)
        tl.store(sums + to, tl.where(total == 0.0, float("-inf"), best + tl.math.log2(some)), mask=real)


@triton.jit
def _join(
    partial, sums, out, weights, every, kv_heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """Join the shares of one query of one head: their mean, weighted by their sums of weights."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    split, d = tl.arange(0, SPLITS), tl.arange(0, PADDED)
    total = tl.load(sums + split * rows + row)
    most = tl.max(total, 0)
    weight = tl.math.exp2(total - tl.where(most == float("-inf"), 0.0, most))
    if WEIGHED:
        tl.store(weights + row, most + tl.math.log2(tl.sum(weight, 0)))
    weight = weight / tl.maximum(tl.sum(weight, 0), 1e-30)
    at = (split * rows + row).to(tl.int64)[:, None] * DIM + d[None, :]
    shares = tl.load(partial + at, mask=(weight[:, None] > 0) & (d[None, :] < DIM), other=0.0)
    joined = tl.sum(shares * weight[:, None], 0)
    kv_head, token = row // (GROUP * every), row // GROUP % every
    to = token * (kv_heads * GROUP) + kv_head * GROUP + row % GROUP
    tl.store(out + to * DIM + d, joined.to(out.dtype.element_ty), mask=d < DIM)


@triton.jit
def _append(
    key, value, table, positions, tokens,
    key_sequence, key_head, key_token, value_sequence, value_head, value_token, stride_table,
    DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Write one token's key and value of one head."""
    sequence, token, head = tl.program_id(0) // tokens, tl.program_id(0) % tokens, tl.program_id(1)
    d = tl.arange(0, PADDED)
    entry = table + sequence * stride_table
    position = tl.load(positions + sequence * tokens + token)
    there = (d < DIM) & (position >= 0)
    position = tl.where(position >= tl.load(entry + 6), position - tl.load(entry + 7), position)
    to = (head * tl.load(entry + 2) + position) * DIM
    dtype = key.dtype.element_ty
    keys = tl.load(entry).to(tl.pointer_type(dtype)) + to
    values = tl.load(entry + 1).to(tl.pointer_type(dtype)) + to
    k = tl.load(key + sequence * key_sequence + head * key_head + token * key_token + d, mask=d < DIM)
    v = tl.load(value + sequence * value_sequence + head * value_head + token * value_token + d, mask=d < DIM)
    tl.store(keys + d, k, mask=there)
    tl.store(values + d, v, mask=there)


@triton.jit
def _score(
    query, entry, positions, weights, scores, scaling, softcap, window, tokens, stride_head, stride_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Score some blocks of keys of one KV head."""
    kv_head = tl.program_id(1)
    dtype = query.dtype.element_ty
    length = tl.load(positions).to(tl.int32)
    scores = tl.load(scores).to(tl.pointer_type(tl.float32)) + kv_head.to(tl.int64) * length
    offset = kv_head * tl.load(entry + 2) * DIM
    keys = tl.multiple_of(tl.load(entry).to(tl.pointer_type(dtype)), 16) + offset
    values = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(dtype)), 16) + offset
    d = tl.arange(0, PADDED)
    for block in range(tl.program_id(0), tl.cdiv(length, KEYS), tl.num_programs(0)):
        j = block * KEYS + tl.arange(0, KEYS)
        there = (j < length)[None, :] & (d < DIM)[:, None]
        k = tl.load(keys + j[None, :] * DIM + d[:, None], mask=there, other=0.0)
        total = tl.zeros([KEYS], tl.float32)
        for start in range(0, tokens * GROUP, ROWS):
            row = start + tl.arange(0, ROWS)
            at = row // GROUP
            real = at < tokens
            position = tl.load(positions + at, mask=real, other=-1).to(tl.int32)
            real = real & (position != tl.load(positions + at - 1, mask=real & (at > 0), other=-1).to(tl.int32))
            where = (kv_head * GROUP + row % GROUP) * stride_head + at * stride_token
            q = tl.load(query + where[:, None] + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)
            found = tl.dot(q, k, input_precision="ieee") * scaling
            if CAPPED:
                found = softcap * (1.0 - 2.0 / (tl.math.exp2(found * (2.0 * LOG2E / softcap)) + 1.0))
            base = tl.load(weights + kv_head * (tokens * GROUP) + row, mask=real, other=0.0)
            weight = tl.math.exp2(found * LOG2E - base[:, None])
            seen = real[:, None] & (j < length)[None, :]
            if WINDOWED:
                seen = seen & (j[None, :] > position[:, None] - window)
            total += tl.sum(tl.where(seen, weight, 0.0), 0)
        v = tl.load(values + j[:, None] * DIM + d[None, :], mask=(j < length)[:, None] & (d < DIM)[None, :], other=0.0)
        norm = tl.sqrt(tl.sum(v.to(tl.float32) * v.to(tl.float32), 1))
        known = tl.load(scores + j, mask=j < length, other=0.0)
        tl.store(scores + j, known + total * norm, mask=j < length)
