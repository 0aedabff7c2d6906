"""Keys and values as int8 at rest: half the bytes of bfloat16.

The quantisation is symmetric, with one scale per token and head. The error of a value is at most half a step, 1/254 of
the largest value of its token and head. In decode on SmolLM2-135M (benchmarks/int8.py), the KL divergence is 3e-4 nats
per token in float32 arithmetic, and not above rounding noise in bfloat16 arithmetic. One scale per channel for the keys
(as in KIVI, 2024) was no better at eight bits.
"""

from __future__ import annotations

import torch

from kvcag.errors import InvalidInputError

_ROUND_UP = 1 + 2**-8
"""bfloat16 has eight bits of precision. Scales are enlarged by 1/256, so that rounding never makes a scale too small,
which would clip a value."""


def quantize_int8(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise keys or values to codes and scales.

    Args:
        states: `(batch, kv_heads, seq_len, head_dim)`, any floating dtype.

    Returns:
        Codes, int8, of the same shape, and scales, bfloat16, `(batch, kv_heads, seq_len, 1)`.

    Raises:
        InvalidInputError: a value is infinite or not a number.
    """
    wide = states.float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise InvalidInputError(
            "the cache has infinite values or NaN, which have no int8 code. Store it with quantize=None, and check "
            "the model's dtype: float16 overflows where bfloat16 does not."
        )
    scales = (largest / 127 * _ROUND_UP).to(torch.bfloat16)
    codes = torch.round(wide / scales.float().clamp(min=torch.finfo(torch.float32).tiny))
    return codes.to(torch.int8), scales


def dequantize_int8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert the result of `quantize_int8` back to keys or values.

    Args:
        codes: int8, `(batch, kv_heads, seq_len, head_dim)`.
        scales: bfloat16, `(batch, kv_heads, seq_len, 1)`.
        dtype: of the result.

    Returns:
        `(batch, kv_heads, seq_len, head_dim)`, in `dtype`.
    """
    return (codes.float() * scales.float()).to(dtype)
