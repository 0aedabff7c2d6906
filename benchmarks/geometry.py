"""Makes the models of the benchmarks (the small model, or a geometry with random weights), and texts of a length."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvcag import HFEngine
from kvcag.demo.corpus import python_topics
from kvcag.testing import EchoEngine

GEOMETRIES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
    },
}
HEAD = "Answer the question using only the passages below."


def random_engine(geometry: str, device: torch.device, dtype: torch.dtype) -> HFEngine:
    """A Qwen3 with random weights, and a tokenizer with a token a byte and ChatML's chat template."""
    config = AutoConfig.for_model("qwen3", **GEOMETRIES[geometry], max_position_embeddings=40960)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return endless(HFEngine(model, EchoEngine().tokenizer, prefix_cache_bytes=0))


def endless(engine: HFEngine) -> HFEngine:
    """The same engine; no token ends an answer, for us and for `model.generate`, so that all answers are as long."""
    engine.model.generation_config.eos_token_id = None
    engine.__dict__["eos_ids"] = frozenset()
    return engine


def documents_of(engine: HFEngine, tokens: int, count: int) -> list[str]:
    """Texts of about `tokens` tokens together, from Python's own reference, the same ones again where it ends."""
    text = "\n\n".join(topic.text for topic in python_topics())
    ids = engine.template.encode(text)
    ids = (ids * (1 + tokens // len(ids)))[:tokens]
    size = tokens // count
    return [str(engine.tokenizer.decode(ids[i * size : (i + 1) * size])).strip() + "\n\n" for i in range(count)]
