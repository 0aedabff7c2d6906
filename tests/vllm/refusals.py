"""Run by vLLM's Python with a model and a store: what `KVCAGConnector` says at start to each setting that it refuses.

The configurations are vLLM's own. Writes JSON: the setting, and the error's class and message; null where none came.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec, SlidingWindowSpec

from kvcag.errors import KVCAGError
from kvcag.vllm_connector import KVCAGConnector

MODEL, STORE = sys.argv[1:]
SPEC = FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=64, dtype=torch.float32)
LAYERS = [f"model.layers.{index}.self_attn.attn" for index in range(30)]


def config(transfer: dict[str, Any] | None = None, **settings: Any) -> VllmConfig:
    given = {
        "kv_connector": "KVCAGConnector",
        "kv_connector_module_path": "kvcag.vllm_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"store": STORE},
    } | (transfer or {})
    base = {"model": MODEL, "dtype": "float32", "max_model_len": 2048, "block_size": 32, "async_scheduling": False}
    return EngineArgs(**(base | settings), kv_transfer_config=given).create_engine_config()


def made(of: VllmConfig, *specs: Any) -> KVCAGConnector:
    groups = [KVCacheGroupSpec(LAYERS, spec) for spec in specs or (SPEC,)]
    return KVCAGConnector(of, KVConnectorRole.WORKER, KVCacheConfig(64, [], groups))


def with_blocks(backend: type[AttentionBackend], size: int) -> None:
    connector = made(good)
    layers = good.compilation_config.static_forward_context
    layers.update(dict.fromkeys(LAYERS, SimpleNamespace(attn_backend=backend)))
    connector.register_kv_caches({name: torch.zeros(4, 3, size, 128) for name in LAYERS})


def as_on_gpus(**settings: int | bool) -> VllmConfig:
    """Settings that vLLM takes back on a machine without a GPU."""
    changed = config()
    for part in (changed.parallel_config, changed.scheduler_config):
        for name in settings.keys() & vars(part).keys():
            setattr(part, name, settings[name])
    return changed


good = config()
ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 4}
window = SlidingWindowSpec(block_size=32, num_kv_heads=3, head_size=64, dtype=torch.float32, sliding_window=512)
recurrent = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))
SETTINGS: dict[str, Callable[[], object]] = {
    "nothing": lambda: made(good),
    "no store": lambda: made(config({"kv_connector_extra_config": {}})),
    "a store that cannot be opened": lambda: made(config({"kv_connector_extra_config": {"store": __file__}})),
    "failed loads fail": lambda: made(config({"kv_load_failure_policy": "fail"})),
    "asynchronous scheduling": lambda: made(as_on_gpus(async_scheduling=True)),
    "several GPUs": lambda: made(as_on_gpus(world_size=2)),
    "a draft model": lambda: made(config(speculative_config=ngram)),
    "a sliding window": lambda: made(good, window),
    "a window within full attention": lambda: made(good, replace(SPEC, sliding_window=512)),
    "windows beside full attention": lambda: made(good, SPEC, window),
    "recurrent layers": lambda: made(good, SPEC, recurrent),
    "values of another size": lambda: made(good, replace(SPEC, head_size_v=32)),
    "a quantised cache": lambda: made(good, replace(SPEC, dtype=torch.float8_e4m3fn)),
    "FlashAttention": lambda: with_blocks(FlashAttentionBackend, 32),
    "another attention backend": lambda: with_blocks(TritonAttentionBackend, 32),
    "blocks that attention splits": lambda: with_blocks(FlashAttentionBackend, 16),
}
said: dict[str, list[str] | None] = {}
for setting, start in SETTINGS.items():
    try:
        start()
        said[setting] = None
    except KVCAGError as error:
        said[setting] = [type(error).__name__, str(error)]
sys.stdout.write(json.dumps(said) + "\n")
