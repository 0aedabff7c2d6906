"""Keys and values as int8: half the bytes of bfloat16 at rest, read back within half a step, 1/254 of a token's range.

Symmetric, one scale per token and head. Measured in decode on SmolLM2-135M (benchmarks/int8.py), it costs 3e-4 nats a
token where the arithmetic is float32; in bfloat16 arithmetic no more than drawing each last bit at random does. One
scale per channel for the keys (as in KIVI, 2024) was no better at eight bits.
"""

from __future__ import annotations

import torch

from kvcag.errors import InvalidInputError

_ROUND_UP = 1 + 2**-8
"""bfloat16 keeps eight bits of the scale: enlarged by one part in 256, it never rounds to less than it must be, and so
no value is clipped."""


def quantize_int8(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of keys or values.

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
            "the cache holds infinite values or NaN, which have no int8 code. Keep it with quantize=None, and look at "
            "the model's dtype: float16 overflows where bfloat16 does not."
        )
    scales = (largest / 127 * _ROUND_UP).to(torch.bfloat16)
    codes = torch.round(wide / scales.float().clamp(min=torch.finfo(torch.float32).tiny))
    return codes.to(torch.int8), scales


def dequantize_int8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values, `(batch, kv_heads, seq_len, head_dim)`, in `dtype`, from what `quantize_int8` gave."""
    return (codes.float() * scales.float()).to(dtype)
