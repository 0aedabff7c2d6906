"""The drift correction of a merge (`kvcag.cache.merge.DriftCorrection`) within a captured pass.

It computes the same sums and the same ridge regression in about a dozen kernels per layer. Eight are Triton kernels of
this module, which read and write the cache, centre features, and solve the regression by conjugate gradients. The
kernels read from the device what changes between questions: the number of chosen tokens, and the corrected tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from kvcag.cache.layers import sent
from kvcag.cache.merge import MEAN, PENALTY, RIDGE, SHRINK, Layout

PARTS = 64
"""The most parts of a merge, head included, that a captured pass supports."""

_STEPS = 48
"""The most steps of conjugate gradients. Fewer are enough, because features are scaled and the penalty is added."""


@dataclass(slots=True)
class Correction:
    """The inputs of the correction within a pass of `size` tokens, on the device.

    Attributes:
        given: int64 `(6 + PARTS + size,)`: the number of chosen tokens, which come first in the pass; the number of
            corrected tokens; three addresses: of the positions of the corrected tokens, int64; of the part of each
            token of the context, int64; and of memory for the features of the corrected tokens, `(kv_heads, corrected,
            features)` in the cache's dtype; where each part's chosen tokens begin, `PARTS + 1` numbers; and the part
            of each chosen token.
        frequencies: RoPE's frequencies in each layer, fp32 `(head_dim / 2,)`.
        interleaved: how components are paired (`kvcag.cache.attention.Rotation`).
    """

    given: torch.Tensor
    frequencies: list[torch.Tensor]
    interleaved: bool
    _held: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, size: int, frequencies: list[torch.Tensor], device: torch.device, *, interleaved: bool) -> Correction:
        """Make the inputs for passes of `size` tokens. No token is chosen yet."""
        return cls(
            torch.zeros(6 + PARTS + size, dtype=torch.long, device=device),
            frequencies,
            interleaved,
        )

    def take(self, layout: Layout, positions: torch.Tensor, features: int, dtype: torch.dtype) -> None:
        """Set the tokens that the next pass recomputes. It corrects the other open ones.

        Args:
            layout: the tokens of the context.
            positions: the positions to recompute, ascending, int64 `(chosen,)`.
            features: the most numbers of a token's keys and values in one layer, over all KV heads.
            dtype: the cache's dtype.
        """
        device, count = self.given.device, len(positions)
        rest, part_of, chosen = layout.open.numpy().copy(), layout.part_of.numpy(), positions.numpy()
        rest[chosen] = False
        where = np.flatnonzero(rest)
        lists = sent(torch.from_numpy(np.concatenate([where, part_of])), device)
        at, every = lists.split([len(where), len(part_of)])
        memory = torch.empty(len(where) * features, dtype=dtype, device=device)
        begin = np.searchsorted(part_of[chosen], np.arange(PARTS + 1))
        numbers = [count, len(where), at.data_ptr(), every.data_ptr(), memory.data_ptr()]
        given = torch.from_numpy(np.concatenate([numbers, begin, part_of[chosen]]))
        self.given[: len(given)].copy_(given.pin_memory(), non_blocking=True)
        self._held = (lists, memory)  # keeps the memory alive, since the kernels have only its addresses

    def correct(
        self, layer_idx: int, key: torch.Tensor, value: torch.Tensor, entry: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Estimate a layer's drift from the chosen tokens, and add it to the corrected tokens in the cache.

        Args:
            layer_idx: the layer's index.
            key: the new keys of the pass, `(1, kv_heads, size, head_dim)`; the cache still has the old ones.
            value: the new values, likewise.
            entry: the layer's row of `Inputs.table`, int64 `(8,)`.
            positions: the positions of the pass's tokens, int64 `(size,)`.
        """
        size, wide = key.shape[2], key.shape[3] + value.shape[3]
        both = torch.empty(key.shape[1], size, 2 * wide, device=key.device)  # features, then drift
        shape = {
            "HALF": key.shape[3] // 2,
            "VALUE": value.shape[3],
            "HALF_SIZE": max(16, triton.next_power_of_2(key.shape[3] // 2)),
            "VALUE_SIZE": max(16, triton.next_power_of_2(value.shape[3])),
            "INTERLEAVED": self.interleaved,
        }
        frequencies = self.frequencies[layer_idx]
        _features[(triton.cdiv(size, 16), key.shape[1])](
            key, value, entry, positions, self.given, frequencies, both, size,
            key.stride(1), key.stride(2), value.stride(1), value.stride(2), ROWS=16, **shape, num_warps=4,
        )  # fmt: skip
        sums, means = torch.empty(2, key.shape[1], PARTS, 2 * wide, device=key.device)
        tile = min(128, triton.next_power_of_2(wide))
        columns = triton.cdiv(2 * wide, tile)
        _sums[(PARTS, columns, key.shape[1])](
            both, self.given, sums, size, COLUMNS=2 * wide, TILE=tile, ROWS=32, PARTS=PARTS, num_warps=4
        )
        _means[(columns, key.shape[1])](
            sums, self.given, means, SHRINK, COLUMNS=2 * wide, TILE=tile, PARTS=PARTS, num_warps=4
        )
        exact, centred = key.dtype == torch.float32, torch.empty_like(both, dtype=key.dtype)
        _centre[(triton.cdiv(size, 4), key.shape[1])](
            both, self.given, means, centred, size, COLUMNS=2 * wide, SIZE=triton.next_power_of_2(2 * wide),
            PARTS=PARTS, ROWS=4, num_warps=4,
        )  # fmt: skip
        left = centred[..., :wide].mT  # the rounding of half precision averages out over the tokens
        products = left @ centred if exact else torch.bmm(left, centred, out_dtype=torch.float32)
        tile = 32 if exact else 64
        slope = solve(products, self.given, exact=exact)
        offset = torch.baddbmm(means[..., wide:], means[..., :wide], slope, beta=MEAN, alpha=-1)
        slope = slope.to(key.dtype)
        _collect[1024, key.shape[1]](key, entry, self.given, frequencies, ROWS=16, **shape, num_warps=4)
        for of_keys in (True, False):
            _give[128, key.shape[1]](
                key, entry, self.given, frequencies, slope, offset,
                KEYS=of_keys, ROWS=tile, TILE=tile, PARTS=PARTS, **shape, num_warps=4 if of_keys else 8, num_stages=3,
            )  # fmt: skip


def solve(products: torch.Tensor, given: torch.Tensor, *, exact: bool = True) -> torch.Tensor:
    """Solve the ridge regression of `kvcag.cache.merge` by conjugate gradients; return the slope, fp32 `(heads, n, n)`.

    PyTorch's Cholesky solver waits for the device and cannot be captured.

    Args:
        products: fp32 `(heads, n, 2 * n)`: products of the centred features with themselves and with the centred drift.
        given: the first entry is the number of tokens.
        exact: solve to four digits; else to three, which is the precision of keys in half precision.
    """
    heads, size = products.shape[:2]
    padded = max(16, triton.next_power_of_2(size))
    kept = not exact and 64 <= padded <= 256
    columns = 16 if kept or padded > 256 else 32
    slope, direction = (torch.empty(heads, size, size, device=products.device) for _ in range(2))
    _solve[(heads, triton.cdiv(size, columns))](
        products, given, direction, slope, size, 1e-10 if exact else 1e-7, PENALTY, RIDGE,
        SIZE=padded, COLUMNS=columns, TILE=padded // 4 if kept else min(padded, 64 if padded <= 256 else 32),
        STEPS=_STEPS, PRECISION="tf32x3" if exact else "tf32", KEPT=kept, num_warps=8, num_stages=2,
    )  # fmt: skip
    return slope


@triton.jit
def _places(HALF: tl.constexpr, HALF_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return the first and the second component of each pair of a key, and which pairs exist (the rest is padding)."""
    d = tl.arange(0, HALF_SIZE)
    if INTERLEAVED:
        return 2 * d, 2 * d + 1, d < HALF
    return d, d + HALF, d < HALF


@triton.jit
def _rotation(position, frequencies, HALF: tl.constexpr, HALF_SIZE: tl.constexpr):
    """Return cosine and sine of the rotation from position 0 to each row's position."""
    d = tl.arange(0, HALF_SIZE)
    angle = position.to(tl.float32)[:, None] * tl.load(frequencies + d, mask=d < HALF, other=0.0)[None, :]
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _features(
    key, value, entry, positions, given, frequencies, both, size,
    key_head, key_token, value_head, value_token,
    ROWS: tl.constexpr, HALF: tl.constexpr, VALUE: tl.constexpr, HALF_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Write each chosen token's cached key, rotated to position 0, and value, and the drift of both, to `both`."""
    head = tl.program_id(1)
    dtype = key.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chosen = row < tl.load(given)
    position = tl.load(positions + row, mask=row < size, other=0)
    position = tl.where(chosen, position, 0)
    first, second, there = _places(HALF, HALF_SIZE, INTERLEAVED)
    cos, sin = _rotation(position, frequencies, HALF, HALF_SIZE)
    seen = chosen[:, None] & there[None, :]
    stride = tl.load(entry + 2)
    old = tl.load(entry).to(tl.pointer_type(dtype)) + (head * stride + position)[:, None] * (2 * HALF)
    new = key + head * key_head + row[:, None] * key_token
    a = tl.load(old + first[None, :], mask=seen, other=0.0).to(tl.float32)
    b = tl.load(old + second[None, :], mask=seen, other=0.0).to(tl.float32)
    da = tl.load(new + first[None, :], mask=seen, other=0.0).to(tl.float32) - a
    db = tl.load(new + second[None, :], mask=seen, other=0.0).to(tl.float32) - b
    wide: tl.constexpr = 2 * HALF + VALUE
    to = both + (head * size + row)[:, None] * (2 * wide)
    written = (row < size)[:, None] & there[None, :]
    d = tl.arange(0, HALF_SIZE)[None, :]
    tl.store(to + d, a * cos + b * sin, mask=written)
    tl.store(to + HALF + d, b * cos - a * sin, mask=written)
    tl.store(to + wide + d, da * cos + db * sin, mask=written)
    tl.store(to + wide + HALF + d, db * cos - da * sin, mask=written)
    e = tl.arange(0, VALUE_SIZE)[None, :]
    seen = chosen[:, None] & (e < VALUE)
    old = tl.load(entry + 1).to(tl.pointer_type(dtype)) + (head * stride + position)[:, None] * VALUE
    v = tl.load(old + e, mask=seen, other=0.0).to(tl.float32)
    new = value + head * value_head + row[:, None] * value_token
    dv = tl.load(new + e, mask=seen, other=0.0).to(tl.float32) - v
    written = (row < size)[:, None] & (e < VALUE)
    tl.store(to + 2 * HALF + e, v, mask=written)
    tl.store(to + wide + 2 * HALF + e, dv, mask=written)


@triton.jit
def _sums(
    both, given, sums, size,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Compute the sum of features and drift over the chosen tokens of one part, for one head."""
    part, head = tl.program_id(0), tl.program_id(2)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    end = tl.load(given + 6 + part)
    total = tl.zeros([ROWS, TILE], tl.float32)
    for start in range(tl.load(given + 5 + part), end, ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < end)[:, None] & (j < COLUMNS)[None, :]
        total += tl.load(both + (head * size + row)[:, None] * COLUMNS + j[None, :], mask=there, other=0.0)
    tl.store(sums + (head * PARTS + part) * COLUMNS + j, tl.sum(total, 0), mask=j < COLUMNS)


@triton.jit
def _means(sums, given, means, shrink, COLUMNS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr):
    """Compute each part's mean, shrunk towards the mean of all parts, as `kvcag.cache.merge.averages` does."""
    part, head = tl.arange(0, PARTS), tl.program_id(1)
    j = tl.program_id(0) * TILE + tl.arange(0, TILE)
    count = tl.maximum(tl.load(given), 1).to(tl.float32)
    of_part = (tl.load(given + 6 + part) - tl.load(given + 5 + part)).to(tl.float32)
    at = (head * PARTS + part)[:, None] * COLUMNS + j[None, :]
    there = (j < COLUMNS)[None, :]
    sums_ = tl.load(sums + at, mask=there, other=0.0)
    mean = (sums_ + (shrink / count) * tl.sum(sums_, 0)[None, :]) / (of_part + shrink)[:, None]
    tl.store(means + at, mean, mask=there)


@triton.jit
def _centre(
    both, given, means, centred, size,
    COLUMNS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Subtract from each chosen token's features and drift the mean of its part. Of other tokens, write zeros."""
    head = tl.program_id(1)
    row, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    real = row < tl.load(given)
    there = real[:, None] & (j < COLUMNS)[None, :]
    part = tl.load(given + 6 + PARTS + row, mask=real, other=0)
    at = (head * size + row)[:, None] * COLUMNS + j[None, :]
    mean = tl.load(means + (head * PARTS + part)[:, None] * COLUMNS + j[None, :], mask=there, other=0.0)
    left = tl.load(both + at, mask=there, other=0.0) - mean
    tl.store(centred + at, left.to(centred.dtype.element_ty), mask=(row < size)[:, None] & (j < COLUMNS)[None, :])


@triton.jit
def _scales(products, count, n, i):
    """Return the root mean square of some features."""
    square = tl.load(products + i * (2 * n + 1), mask=i < n, other=1.0) / count
    return tl.maximum(tl.sqrt(square), 1e-6)


@triton.jit
def _scaled(products, count, penalty, n, i, j):
    """Return a tile of the regression's matrix: features scaled to mean square 1, and the penalty on the diagonal."""
    there = (i < n)[:, None] & (j < n)[None, :]
    tile = tl.load(products + i[:, None] * (2 * n) + j[None, :], mask=there, other=0.0)
    tile = tile / (_scales(products, count, n, i)[:, None] * _scales(products, count, n, j)[None, :])
    return tile / count + tl.where(i[:, None] == j[None, :], penalty, 0.0)


@triton.jit
def _solve(
    products, given, direction, slope, n, enough, penalty, ridge,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """Solve some columns of one head. `direction` is scratch memory, from which a program reads its columns in tiles.

    KEPT: the matrix stays in registers in fp16, which is as precise as TF32. Columns are scaled to length 1, so that
    their numbers are in the range of fp16.
    """
    products += tl.program_id(0).to(tl.int64) * (2 * n * n)
    count = tl.maximum(tl.load(given), 1).to(tl.float32)
    i, c = tl.arange(0, SIZE), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (i < n)[:, None] & (c < n)[None, :]
    at = tl.program_id(0).to(tl.int64) * n * n + i[:, None] * n + c[None, :]
    scale = _scales(products, count, n, i)
    left = tl.load(products + i[:, None] * (2 * n) + n + c[None, :], mask=there, other=0.0)
    left = left / (scale[:, None] * count)
    length = tl.sqrt(tl.sum(left * left, 0))
    length = tl.where(length > 0, length, 1.0)
    left = left / length[None, :]
    t = tl.arange(0, TILE)
    if KEPT:
        g0 = _scaled(products, count, penalty, n, i, t).to(tl.float16)
        g1 = _scaled(products, count, penalty, n, i, TILE + t).to(tl.float16)
        g2 = _scaled(products, count, penalty, n, i, 2 * TILE + t).to(tl.float16)
        g3 = _scaled(products, count, penalty, n, i, 3 * TILE + t).to(tl.float16)
    towards = left
    found = tl.zeros([SIZE, COLUMNS], tl.float32)
    size = tl.sum(left * left, 0)
    least = enough * size  # a column is solved when its squared residual is at most this
    number = 0
    own = direction + tl.program_id(0).to(tl.int64) * n * n + c[None, :]
    while (number < STEPS) & (tl.max(size - least, 0) > 0):
        number += 1
        tl.store(direction + at, towards, mask=there)
        tl.debug_barrier()
        along = tl.zeros([SIZE, COLUMNS], tl.float32)
        if KEPT:
            seen = (c < n)[None, :]
            p0 = tl.load(own + t[:, None] * n, mask=(t < n)[:, None] & seen, other=0.0)
            p1 = tl.load(own + (TILE + t)[:, None] * n, mask=(TILE + t < n)[:, None] & seen, other=0.0)
            p2 = tl.load(own + (2 * TILE + t)[:, None] * n, mask=(2 * TILE + t < n)[:, None] & seen, other=0.0)
            p3 = tl.load(own + (3 * TILE + t)[:, None] * n, mask=(3 * TILE + t < n)[:, None] & seen, other=0.0)
            along = tl.dot(g0, p0.to(tl.float16), along)
            along = tl.dot(g1, p1.to(tl.float16), along)
            along = tl.dot(g2, p2.to(tl.float16), along)
            along = tl.dot(g3, p3.to(tl.float16), along)
        else:
            for k in range(0, n, TILE):
                g = _scaled(products, count, penalty, n, i, k + t)
                p = tl.load(own + (k + t)[:, None] * n, mask=(k + t < n)[:, None] & (c < n)[None, :], other=0.0)
                along = tl.dot(g, p, along, input_precision=PRECISION)
        tl.debug_barrier()
        curvature = tl.sum(towards * along, 0)
        step = tl.where(curvature > 0, size / curvature, 0.0)
        found += step[None, :] * towards
        left -= step[None, :] * along
        now = tl.sum(left * left, 0)
        towards = left + tl.where(size > 0, now / size, 0.0)[None, :] * towards
        size = now
    tl.store(slope + at, found * length[None, :] * (ridge / scale)[:, None], mask=there)


@triton.jit
def _collect(
    like, entry, given, frequencies,
    ROWS: tl.constexpr, HALF: tl.constexpr, VALUE: tl.constexpr, HALF_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Write the features of the corrected tokens, key rotated to position 0 and value, to the memory in `given`."""
    head = tl.program_id(1)
    dtype = like.dtype.element_ty
    count = tl.load(given + 1)
    rest = tl.load(given + 2).to(tl.pointer_type(tl.int64))
    stride = tl.load(entry + 2)
    keys = tl.load(entry).to(tl.pointer_type(dtype)) + head * stride * (2 * HALF)
    values = tl.load(entry + 1).to(tl.pointer_type(dtype)) + head * stride * VALUE
    wide: tl.constexpr = 2 * HALF + VALUE
    memory = tl.load(given + 4).to(tl.pointer_type(dtype)) + head * count * wide
    first, second, there = _places(HALF, HALF_SIZE, INTERLEAVED)
    d, e = tl.arange(0, HALF_SIZE)[None, :], tl.arange(0, VALUE_SIZE)[None, :]
    for block in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        real = row < count
        position = tl.load(rest + row, mask=real, other=0)
        cos, sin = _rotation(position, frequencies, HALF, HALF_SIZE)
        seen, seen_value = real[:, None] & there[None, :], real[:, None] & (e < VALUE)
        a = tl.load(keys + position[:, None] * (2 * HALF) + first[None, :], mask=seen, other=0.0).to(tl.float32)
        b = tl.load(keys + position[:, None] * (2 * HALF) + second[None, :], mask=seen, other=0.0).to(tl.float32)
        v = tl.load(values + position[:, None] * VALUE + e, mask=seen_value, other=0.0)
        to = memory + row[:, None].to(tl.int64) * wide
        tl.store(to + d, (a * cos + b * sin).to(dtype), mask=seen)
        tl.store(to + HALF + d, (b * cos - a * sin).to(dtype), mask=seen)
        tl.store(to + 2 * HALF + e, v, mask=seen_value)


@triton.jit
def _give(
    like, entry, given, frequencies, slope, offset,
    KEYS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    HALF: tl.constexpr, VALUE: tl.constexpr, HALF_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Add `features @ slope + offset[part]` to the key, or to the value, of each corrected token."""
    head = tl.program_id(1)
    dtype = like.dtype.element_ty
    count = tl.load(given + 1)
    rest = tl.load(given + 2).to(tl.pointer_type(tl.int64))
    part_of = tl.load(given + 3).to(tl.pointer_type(tl.int64))
    stride = tl.load(entry + 2)
    wide: tl.constexpr = 2 * HALF + VALUE
    memory = tl.load(given + 4).to(tl.pointer_type(dtype)) + head * count * wide
    slope += head * wide * wide
    offset += head * PARTS * wide
    first, second, there = _places(HALF, HALF_SIZE, INTERLEAVED)
    d, e, t = tl.arange(0, HALF_SIZE), tl.arange(0, VALUE_SIZE), tl.arange(0, TILE)
    for block in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        real = row < count
        position = tl.load(rest + row, mask=real, other=0)
        own = offset + tl.load(part_of + position, mask=real, other=0)[:, None] * wide
        features = memory + row[:, None].to(tl.int64) * wide
        if KEYS:
            seen = real[:, None] & there[None, :]
            da = tl.load(own + d[None, :], mask=seen, other=0.0)
            db = tl.load(own + HALF + d[None, :], mask=seen, other=0.0)
            for k in range(0, wide, TILE):
                f = tl.load(features + k + t[None, :], mask=real[:, None] & (k + t < wide)[None, :], other=0.0)
                within = (k + t < wide)[:, None] & there[None, :]
                through = slope + (k + t)[:, None] * wide + d[None, :]
                da = tl.dot(f, tl.load(through, mask=within, other=0.0), da, input_precision="ieee")
                db = tl.dot(f, tl.load(through + HALF, mask=within, other=0.0), db, input_precision="ieee")
            cos, sin = _rotation(position, frequencies, HALF, HALF_SIZE)
            keys = tl.load(entry).to(tl.pointer_type(dtype)) + (head * stride + position)[:, None] * (2 * HALF)
            at_a, at_b = keys + first[None, :], keys + second[None, :]
            a = tl.load(at_a, mask=seen, other=0.0).to(tl.float32)
            b = tl.load(at_b, mask=seen, other=0.0).to(tl.float32)
            tl.store(at_a, (a + da * cos - db * sin).to(dtype), mask=seen)
            tl.store(at_b, (b + db * cos + da * sin).to(dtype), mask=seen)
        else:
            seen = real[:, None] & (e < VALUE)[None, :]
            dv = tl.load(own + 2 * HALF + e[None, :], mask=seen, other=0.0)
            for k in range(0, wide, TILE):
                f = tl.load(features + k + t[None, :], mask=real[:, None] & (k + t < wide)[None, :], other=0.0)
                within = (k + t < wide)[:, None] & (e < VALUE)[None, :]
                through = slope + (k + t)[:, None] * wide + 2 * HALF + e[None, :]
                dv = tl.dot(f, tl.load(through, mask=within, other=0.0), dv, input_precision="ieee")
            at = (
                tl.load(entry + 1).to(tl.pointer_type(dtype)) + (head * stride + position)[:, None] * VALUE + e[None, :]
            )
            tl.store(at, (tl.load(at, mask=seen, other=0.0).to(tl.float32) + dv).to(dtype), mask=seen)
