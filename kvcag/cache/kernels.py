"""Keys copied, moved and given their drift on an NVIDIA GPU, in one kernel for all layers.

Needs Triton: imported on CUDA alone. Each kernel reads the addresses of the layers' tensors from a table, so that one
launch serves all of them. Launches are what such work costs: with a few of PyTorch's kernels for each of 36 layers it
took 5 ms for 2,000 tokens on an H100.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


def reads(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels can work on these, `(1, kv_heads, seq_len, head_dim)`: of one form, rows without gaps."""
    first = tensors[0]
    return first.is_cuda and all(
        t.device == first.device
        and t.dtype == first.dtype
        and t.shape == first.shape
        and t.shape[0] == 1
        and t.stride()[-2:] == (t.shape[-1], 1)
        for t in tensors
    )


def fill(whole: torch.Tensor, parts: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Copy the tensors of each part, one part after another, into `whole`, with one kernel; False where it cannot.

    PyTorch's own copy of several tensors is a kernel for each of them where there are gaps between heads.

    Args:
        whole: `(tensors, 1, kv_heads, capacity, head_dim)`, contiguous.
        parts: each with a tensor for every one of `whole`, `(1, kv_heads, seq_len, head_dim)`.
    """
    item, (heads, _, dim) = whole.element_size(), whole.shape[2:]
    form = (whole.shape[1], heads, dim), whole.dtype, whole.device
    if dim * item % 8 or not all(map(reads, parts)):
        return False
    if any(((t[0].shape[0], t[0].shape[1], t[0].shape[3]), t[0].dtype, t[0].device) != form for t in parts):
        return False
    rows, start, longest = [], 0, 0
    for tensors in parts:
        words = tensors[0].shape[-2] * dim * item // 8
        first, step = whole.data_ptr() + start * dim * item, whole.stride(0) * item
        rows += [[t.data_ptr(), t.stride(1) * item, first + i * step, words] for i, t in enumerate(tensors)]
        start, longest = start + tensors[0].shape[-2], max(longest, words)
    table = _sent(rows, whole.device)
    _fill[(triton.cdiv(longest, 1024), heads, len(rows))](table, whole.stride(2) * item, SIZE=1024, num_warps=4)
    return True


def turn(
    tensors: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, *, start: int, interleaved: bool
) -> None:
    """Turn pairs of components in fp32 and in place, as `kvcag.cache.attention.Rotation.turn` does.

    Args:
        tensors: one a layer, `(1, kv_heads, seq_len, head_dim)`; `reads` them.
        cos: `(seq_len, rotary_dim / 2)` fp32; so is `sin`.
        sin: see there.
        start: the first component that is turned.
        interleaved: components are paired (0, 1), …; else (0, rotary_dim / 2), ….
    """
    _, heads, tokens, dim = tensors[0].shape
    half = cos.shape[-1]
    _turn[(triton.cdiv(tokens, 32), heads, len(tensors))](
        _table(tensors), cos.contiguous(), sin.contiguous(), tensors[0], tokens, start,
        DIM=dim, HALF=half, SIZE=triton.next_power_of_2(half), ROWS=32, INTERLEAVED=interleaved, num_warps=4,
    )  # fmt: skip


def add(tensors: Sequence[torch.Tensor], positions: torch.Tensor, change: torch.Tensor) -> None:
    """Add to the tokens at `positions` what is the same for each of them, in place.

    Args:
        tensors: one a layer, `(1, kv_heads, seq_len, head_dim)`; `reads` them.
        positions: 1-D int64.
        change: `(layers, kv_heads, head_dim)` fp32.
    """
    _, heads, _, dim = tensors[0].shape
    _add[(triton.cdiv(len(positions), 32), heads, len(tensors))](
        _table(tensors), positions, change.contiguous(), change, change, tensors[0], len(positions),
        DIM=dim, SIZE=triton.next_power_of_2(dim), HALF=1, ROWS=32, TURNED=False, INTERLEAVED=False, num_warps=4,
    )  # fmt: skip


def add_turned(
    tensors: Sequence[torch.Tensor],
    positions: torch.Tensor,
    change: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool,
) -> None:
    """`add`, of a change that is turned to each token's position first; all components of a head are turned.

    Args:
        tensors: see `add`; so are `positions` and `change`.
        positions: see there.
        change: see there.
        cos: `(len(positions), head_dim / 2)` fp32, from position 0; so is `sin`.
        sin: see there.
        interleaved: see `turn`.
    """
    _, heads, _, dim = tensors[0].shape
    _add[(triton.cdiv(len(positions), 32), heads, len(tensors))](
        _table(tensors), positions, change.contiguous(), cos.contiguous(), sin.contiguous(), tensors[0], len(positions),
        DIM=dim, SIZE=triton.next_power_of_2(dim // 2), HALF=dim // 2, ROWS=32, TURNED=True, INTERLEAVED=interleaved,
        num_warps=4,
    )  # fmt: skip


def _table(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Address and stride between heads of each."""
    return _sent([[t.data_ptr(), t.stride(1)] for t in tensors], tensors[0].device)


def _sent(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    """Whole numbers on their way to the device."""
    here = torch.tensor(rows, dtype=torch.long)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


@triton.jit
def _fill(table, stride, SIZE: tl.constexpr):
    """One tensor's row: its address, its bytes between two heads, where it goes, and words of eight bytes a head."""
    head, row = tl.program_id(1), table + 4 * tl.program_id(2)
    source = (tl.load(row) + head * tl.load(row + 1)).to(tl.pointer_type(tl.int64))
    target = (tl.load(row + 2) + head.to(tl.int64) * stride).to(tl.pointer_type(tl.int64))
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = at < tl.load(row + 3)
    tl.store(target + at, tl.load(source + at, mask=there), mask=there)


@triton.jit
def _turn(
    table, cos, sin, like, tokens, start,
    DIM: tl.constexpr, HALF: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    head, layer = tl.program_id(1), tl.program_id(2)
    base = tl.load(table + 2 * layer).to(tl.pointer_type(like.dtype.element_ty))
    base += head * tl.load(table + 2 * layer + 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, SIZE)
    there = (row < tokens)[:, None] & (d < HALF)[None, :]
    if INTERLEAVED:
        a = row[:, None] * DIM + start + 2 * d[None, :]
        b = a + 1
    else:
        a = row[:, None] * DIM + start + d[None, :]
        b = a + HALF
    x = tl.load(base + a, mask=there).to(tl.float32)
    y = tl.load(base + b, mask=there).to(tl.float32)
    c = tl.load(cos + row[:, None] * HALF + d[None, :], mask=there)
    s = tl.load(sin + row[:, None] * HALF + d[None, :], mask=there)
    tl.store(base + a, (x * c - y * s).to(like.dtype.element_ty), mask=there)
    tl.store(base + b, (y * c + x * s).to(like.dtype.element_ty), mask=there)


@triton.jit
def _add(
    table, positions, change, cos, sin, like, tokens,
    DIM: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    TURNED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    head, layer, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    base = tl.load(table + 2 * layer).to(tl.pointer_type(like.dtype.element_ty))
    base += head * tl.load(table + 2 * layer + 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < tokens
    to = tl.load(positions + row, mask=real, other=0)[:, None] * DIM
    change += (layer * heads + head) * DIM
    d = tl.arange(0, SIZE)
    if TURNED:
        there = real[:, None] & (d < HALF)[None, :]
        if INTERLEAVED:
            first, second = 2 * d, 2 * d + 1
        else:
            first, second = d, d + HALF
        x = tl.load(change + first, mask=d < HALF)[None, :]
        y = tl.load(change + second, mask=d < HALF)[None, :]
        c = tl.load(cos + row[:, None] * HALF + d[None, :], mask=there)
        s = tl.load(sin + row[:, None] * HALF + d[None, :], mask=there)
        a, b = base + to + first[None, :], base + to + second[None, :]
        tl.store(a, (tl.load(a, mask=there).to(tl.float32) + x * c - y * s).to(like.dtype.element_ty), mask=there)
        tl.store(b, (tl.load(b, mask=there).to(tl.float32) + y * c + x * s).to(like.dtype.element_ty), mask=there)
    else:
        there = real[:, None] & (d < DIM)[None, :]
        at = base + to + d[None, :]
        x = tl.load(change + d, mask=d < DIM)[None, :]
        tl.store(at, (tl.load(at, mask=there).to(tl.float32) + x).to(like.dtype.element_ty), mask=there)
