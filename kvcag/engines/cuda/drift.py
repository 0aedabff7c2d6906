"""A merge's drift correction (`kvcag.cache.merge.DriftCorrection`) within a captured pass.

The same sums and the same ridge regression, in some fifteen kernels a layer: two of ours read and write the cache, one
solves the regression by conjugate gradients, and the products between them are PyTorch's. What changes between
questions (how many tokens were chosen, which are corrected) is read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from kvcag.cache.merge import MEAN, PENALTY, RIDGE, Layout, averages

PARTS = 64
"""Documents of a merge, with its head, of which a captured pass can take the means."""

_STEPS = 48
"""Of conjugate gradients, at most. The regression is scaled and has its penalty on its diagonal: fewer are enough."""


@dataclass(slots=True)
class Correction:
    """The inputs of the correction within a pass of `size` tokens, on the device.

    Attributes:
        given: `(5,)` int64: how many tokens of the pass were chosen; how many are corrected; the addresses of their
            positions, int64, of the part of each token of the context, int64, and of memory for their features,
            `(kv_heads, corrected, features)` in the cache's dtype.
        count: `(1,)` fp32: how many were chosen.
        averages: `(PARTS, size)` fp32, see `kvcag.cache.merge.averages`; zero for tokens of the pass that were not
            chosen.
        part_of: `(size,)` int64, of each token of the pass.
        chosen: `(size, 1)` fp32, 1 for those that were chosen.
        frequencies: for each layer `(head_dim / 2,)` fp32.
        interleaved: how components are paired (`kvcag.cache.attention.Rotation`).
    """

    given: torch.Tensor
    count: torch.Tensor
    averages: torch.Tensor
    part_of: torch.Tensor
    chosen: torch.Tensor
    frequencies: list[torch.Tensor]
    interleaved: bool
    _held: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, size: int, frequencies: list[torch.Tensor], device: torch.device, *, interleaved: bool) -> Correction:
        """For passes of `size` tokens, of which none is chosen yet."""
        return cls(
            torch.zeros(5, dtype=torch.long, device=device),
            torch.ones(1, device=device),
            torch.zeros(PARTS, size, device=device),
            torch.zeros(size, dtype=torch.long, device=device),
            torch.zeros(size, 1, device=device),
            frequencies,
            interleaved,
        )

    def take(self, layout: Layout, positions: torch.Tensor, features: int, dtype: torch.dtype) -> None:
        """Let the next pass recompute the tokens at `positions` (1-D int64), and correct the other open ones.

        Args:
            layout: the tokens of the context.
            positions: of those that the pass recomputes.
            features: of a token's keys and values in one layer, all KV heads together, at most.
            dtype: of the cache.
        """
        device, count = self.given.device, len(positions)
        rest, part_of, chosen = layout.open.numpy().copy(), layout.part_of.numpy(), positions.numpy()
        rest[chosen] = False
        where, parts = np.flatnonzero(rest), int(part_of[-1]) + 1
        lists = torch.from_numpy(np.concatenate([where, part_of, part_of[chosen]]))
        lists = lists.pin_memory().to(device, non_blocking=True)
        at, every, of_chosen = lists.split([len(where), len(part_of), count])
        memory = torch.empty(len(where) * features, dtype=dtype, device=device)
        given = [count, len(where), at.data_ptr(), every.data_ptr(), memory.data_ptr()]
        self.given.copy_(torch.tensor(given).pin_memory(), non_blocking=True)
        self.count.fill_(count)
        self.averages.zero_()
        self.averages[:parts, :count] = averages(of_chosen, parts)
        self.part_of.zero_()
        self.part_of[:count] = of_chosen
        self.chosen.zero_()
        self.chosen[:count] = 1
        self._held = (lists, memory)  # the kernels know their addresses alone

    def correct(
        self, layer_idx: int, key: torch.Tensor, value: torch.Tensor, entry: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Estimate a layer's drift from the chosen tokens, and give it to those that are corrected, in the cache.

        Args:
            layer_idx: the layer.
            key: new keys of the pass, `(1, kv_heads, size, head_dim)`; the cache still has the old ones.
            value: so are the values.
            entry: where the cache is: the layer's row of `Inputs.table`, `(8,)` int64.
            positions: `(size,)` int64, of the tokens of the pass.
        """
        size, wide = key.shape[2], key.shape[3] + value.shape[3]
        both = torch.empty(key.shape[1], size, 2 * wide, device=key.device)  # features and drift, side by side
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
        means = self.averages @ both
        centred = (both - means[:, self.part_of]) * self.chosen
        x, left = centred[..., :wide], centred[..., wide:]
        scale = (x.square().sum(1, keepdim=True) / self.count).sqrt_().clamp_(min=1e-6)
        x = x / scale
        gram = x.mT @ x
        gram.diagonal(dim1=-2, dim2=-1).add_(PENALTY * self.count)
        # Half-precision keys are no better than to three digits; neither need the products of the solution be.
        slope = solve(gram, x.mT @ left, exact=key.dtype == torch.float32).mul_(RIDGE / scale.mT)
        offset = torch.baddbmm(means[..., wide:], means[..., :wide], slope, beta=MEAN, alpha=-1)
        slope, on_all = slope.to(key.dtype), (64, key.shape[1])
        _collect[on_all](key, entry, self.given, frequencies, ROWS=32, **shape, num_warps=4)
        tile = 32 if key.dtype == torch.float32 else 64
        for of_keys in (True, False):
            _give[on_all](
                key, entry, self.given, frequencies, slope, offset,
                KEYS=of_keys, ROWS=tile, TILE=tile, PARTS=PARTS, **shape, num_warps=4, num_stages=3,
            )  # fmt: skip


def solve(gram: torch.Tensor, right: torch.Tensor, *, exact: bool = True) -> torch.Tensor:
    """`gram⁻¹ @ right` of positive definite matrices, `(heads, n, n)` fp32, by conjugate gradients.

    PyTorch's Cholesky solver waits for the device and cannot be captured. `exact`: to four digits, or to three.
    """
    heads, size = gram.shape[:2]
    padded = max(16, triton.next_power_of_2(size))
    columns = 16 if padded > 256 else 32
    solution, direction = torch.empty_like(right), torch.empty_like(right)
    _solve[(heads, triton.cdiv(size, columns))](
        gram, right, direction, solution, size, 1e-10 if exact else 1e-7,
        SIZE=padded, COLUMNS=columns, TILE=min(padded, 64 if padded <= 256 else 32), STEPS=_STEPS,
        PRECISION="tf32x3" if exact else "tf32", num_warps=8, num_stages=2,
    )  # fmt: skip
    return solution


@triton.jit
def _places(HALF: tl.constexpr, HALF_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Which components of a key are turned together, and which places are there at all."""
    d = tl.arange(0, HALF_SIZE)
    if INTERLEAVED:
        return 2 * d, 2 * d + 1, d < HALF
    return d, d + HALF, d < HALF


@triton.jit
def _rotation(position, frequencies, HALF: tl.constexpr, HALF_SIZE: tl.constexpr):
    """Cosine and sine of each row's position."""
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
    """Key, turned back to position 0, and value of each chosen token as cached, and by what the new ones differ."""
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
def _collect(
    like, entry, given, frequencies,
    ROWS: tl.constexpr, HALF: tl.constexpr, VALUE: tl.constexpr, HALF_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The features of the tokens that are corrected: key, turned back to position 0, and value."""
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
    """Add `features @ slope + offset` of its part to the key, or to the value, of each token that is corrected."""
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


@triton.jit
def _solve(
    gram, right, direction, solution, n, enough,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of one head. `direction` is memory through which a program reads its own columns in tiles."""
    head = tl.program_id(0).to(tl.int64) * n * n
    i, c = tl.arange(0, SIZE), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (i < n)[:, None] & (c < n)[None, :]
    at = head + i[:, None] * n + c[None, :]
    left = tl.load(right + at, mask=there, other=0.0)
    towards = left
    found = tl.zeros([SIZE, COLUMNS], tl.float32)
    size = tl.sum(left * left, 0)
    least = enough * size  # squared, of what is left of each column
    number = 0
    while (number < STEPS) & (tl.max(size - least, 0) > 0):
        number += 1
        tl.store(direction + at, towards, mask=there)
        tl.debug_barrier()
        along = tl.zeros([SIZE, COLUMNS], tl.float32)
        for k in range(0, n, TILE):
            j = k + tl.arange(0, TILE)
            above = (j < n)[:, None]
            g = tl.load(gram + head + i[:, None] * n + j[None, :], mask=(i < n)[:, None] & (j < n)[None, :], other=0.0)
            p = tl.load(direction + head + j[:, None] * n + c[None, :], mask=above & (c < n)[None, :], other=0.0)
            along = tl.dot(g, p, along, input_precision=PRECISION)
        tl.debug_barrier()
        curvature = tl.sum(towards * along, 0)
        step = tl.where(curvature > 0, size / curvature, 0.0)
        found += step[None, :] * towards
        left -= step[None, :] * along
        now = tl.sum(left * left, 0)
        towards = left + tl.where(size > 0, now / size, 0.0)[None, :] * towards
        size = now
    tl.store(solution + at, found, mask=there)
