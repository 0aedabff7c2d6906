"""Run by vLLM's Python, without a GPU: FlashAttention's own writer beside `FlashAttentionLayout`.

vLLM makes the views of its blocks, in each order in memory that it has, and splits them into keys and values. The one
kernel, which needs a GPU, is written out in PyTorch.
"""

from __future__ import annotations

import sys
from math import prod
from types import SimpleNamespace
from unittest.mock import patch

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flash_attn
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheTensor,
    compute_layer_kv_cache_shape_bytes,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvcag.engines.vllm.blocks import FlashAttentionLayout

LAYERS, BLOCKS, HEADS, SIZE, DIM = 3, 9, 2, 16, 8
IDS = [7, 2, 5]
TOKENS = len(IDS) * SIZE


def kernel(keys: torch.Tensor, values: torch.Tensor, *rest: object) -> None:
    """`reshape_and_cache_flash`: token i goes to slot i of `(blocks, block_size, kv_heads, head_dim)`."""
    key_cache, value_cache, slots = rest[:3]
    block, offset = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[block, offset], value_cache[block, offset] = keys, values


def views(order: KVCacheLayout, dtype: torch.dtype) -> list[torch.Tensor]:
    spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=HEADS, head_size=DIM, dtype=dtype)
    size = LAYERS * prod(compute_layer_kv_cache_shape_bytes(spec, BLOCKS))
    layer_stride, block_stride, *_ = compute_layout_strides(spec, BLOCKS, LAYERS, order)
    place = KVCacheTensor(size, [str(i) for i in range(LAYERS)], layer_stride, block_stride)
    return create_kv_cache_views(torch.zeros(size, dtype=torch.int8), spec, BLOCKS, order, place)


def check(order: KVCacheLayout, dtype: torch.dtype) -> None:
    theirs, ours, layout = views(order, dtype), views(order, dtype), FlashAttentionLayout()
    kv = torch.randn(LAYERS, 2, TOKENS, HEADS, DIM).to(dtype)
    slots = torch.tensor([id * SIZE + at for id in IDS for at in range(SIZE)])
    implementation = SimpleNamespace(head_size=DIM, attn_type=AttentionType.DECODER, kv_cache_dtype="auto")
    for index, (keys, values) in enumerate(kv):
        flash_attn.FlashAttentionImpl.do_kv_cache_update(
            implementation, SimpleNamespace(_k_scale=1.0, _v_scale=1.0), keys, values, theirs[index], slots
        )
        wanted = (keys.transpose(0, 1)[None], values.transpose(0, 1)[None])
        for got, each in zip(layout.read(theirs[index], torch.tensor(IDS)), wanted, strict=True):
            assert torch.equal(got, each), f"{order.name}, {dtype}: read"
        layout.write(ours[index], torch.tensor(IDS), wanted)
    for index in range(LAYERS):
        assert torch.equal(ours[index], theirs[index]), f"{order.name}, {dtype}: written"
        assert ours[index].count_nonzero() == kv[index].count_nonzero()


with patch.object(flash_attn, "reshape_and_cache_flash", kernel, create=True):
    for order in KVCacheLayout:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            check(order, dtype)
sys.stdout.write(f"{len(KVCacheLayout)} orders agree\n")
