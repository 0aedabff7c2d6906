"""Attention over caches whose addresses, lengths and positions are read on the device.

A CUDA graph replays the same kernels with the same arguments. So that one graph serves every generation, at any
length, the kernels here take no pointer to a cache and no length. They read both from two tensors (`Inputs`):

- `table`, `(sequences, layers, 8)` int64, of `GenerationCache.addresses`: where a layer's keys and values are, and
  those that it reads in another cache, which it was lent. Sequences that were lent the same stand one behind another.
- `positions`, `(sequences, tokens)` int64, ascending: where each new token stands. A query at position `p` sees the
  keys 0 … p. Position -1 marks a place without a token: it writes nothing, and its output is undefined.

How attention is divided among the GPU's processors (Flash-Decoding): each program takes one block of queries of one KV
head and one share of the keys, and leaves a partial output and the logarithm of its sum of weights; a second kernel
joins the shares. The query heads that share a KV head are rows of the same block, so each key is read once for all of
them. So are several sequences' tokens: a block reads what they were lent together once (Hydragen, Juravsky et al.
2024), and each one's own keys for its rows alone. Scores and sums are fp32.
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
"""Under which `attention` is registered with transformers."""

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a pass on the device; see the module's description.

    Attributes:
        table: `(sequences, layers, 8)` int64.
        positions: `(sequences, tokens)` int64.
        scores: `(1,)` int64, the address of `(kv_heads, first position)` fp32, to which each layer adds how much the
            tokens of the pass use the keys before them (`kvcag.cache.merge.query`); None where that is not asked for.
    """

    table: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor | None = None


inputs: ContextVar[Inputs] = ContextVar("kvcag_cuda_inputs")
"""Of the pass that runs, or is captured, now."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one call is divided.

    Attributes:
        rows: queries of one program, heads that share a KV head counted each.
        keys: keys that a program reads at a time.
        splits: programs that share the keys of one block of queries.
        warps: of 32 threads, that run one program.
        stages: tiles of keys that are on their way at a time.
    """

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int, kv_heads: int, head_dim: int, dtype: torch.dtype, processors: int) -> Tiles:
        """For `rows` queries of each KV head, those of all sequences together."""
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
    """Attention of new tokens over the caches in `table`, which hold their keys and values already.

    Args:
        query: `(sequences, heads, tokens, head_dim)`, fp32, fp16 or bf16; the last dimension contiguous.
        table: one layer's entries, `(sequences, 8)` int64.
        positions: `(sequences, tokens)` int64, ascending.
        kv_heads: how many there are; `heads` is a multiple.
        scaling: what scores are multiplied with.
        window: how many tokens a query sees, itself included; None for all.
        softcap: bound of the scores, as in Gemma 2.
        sinks: `(heads,)`: the logit of an additional key without a value, as in gpt-oss.
        tiles: how to divide the work; chosen by shape if not given.
        weights: `(kv_heads, sequences * tokens * group)` fp32, to which the binary logarithm of each query's sum of
            weights is written.

    Returns:
        `(sequences, tokens, heads, head_dim)`.
    """
    sequences, heads, tokens, head_dim = query.shape
    group = heads // kv_heads
    tiles = tiles or Tiles.of(sequences * tokens * group, kv_heads, head_dim, query.dtype, _processors(query.device))
    padded = max(16, triton.next_power_of_2(head_dim))
    out = torch.empty(sequences, tokens, heads, head_dim, dtype=query.dtype, device=query.device)
    rows = sequences * heads * tokens
    partial, sums = out, positions  # not written where nothing is split
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
    """Add to each key's score the attention that it gets from all queries, times the norm of its value.

    Args:
        query: `(1, heads, tokens, head_dim)`, as for `attend`.
        entry: the layer's entry of the table, `(8,)` int64; nothing is lent.
        positions: `(tokens,)` int64. Those that repeat the position before them are not counted.
        kv_heads: how many there are.
        weights: what `attend` wrote.
        scores: the address in `Inputs.scores`; the keys before the first position have one.
        scaling: as for `attend`; so are `window` and `softcap`.
        window: see there.
        softcap: see there.
    """
    _, heads, tokens, head_dim = query.shape
    padded = max(16, triton.next_power_of_2(head_dim))
    _score[(64, kv_heads)](
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
        KEYS=64 if padded <= 128 else 32,
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        num_warps=4,
        num_stages=3,
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
    """The function that transformers calls. `key` and `value` are those of the new tokens, which the cache has, too."""
    if value.shape[-1] != query.shape[-1]:
        raise UnsupportedModelError("keys and values have heads of different sizes")
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
    """Take the keys n … n + KEYS in. `best`: the largest score so far; `total`: of weights; `acc`: of values.

    A row sees those before `limit`. Key `i` stands at position `i`, from `fold` on at `i + lift`.
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
    """Take a share of the keys begin … last in, those before `common` without masks: every row sees them."""
    begin = begin // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(tl.maximum(last - begin, 0), KEYS), SPLITS) * KEYS
    low = begin + split * share
    high = tl.minimum(low + share, last)
    middle = low
    if q.shape[0] >= 64 and not WINDOWED:  # with few rows, reading takes longer than masks
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
    """One block of queries of one KV head, over one share of the keys. `every`: tokens of all sequences."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last ones take longest: with them first, none is late
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
        if ((lent != before) | (start != began)) & (length > 0):  # the first of those that were lent this
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
        # How many own keys stand before a position: those before what is lent, and those behind it.
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
    """The output of one query of one head: the mean of its shares, by their sums of weights."""
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
    """One token's key and value of one head."""
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
    """Some blocks of keys of one KV head."""
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
