"""Two engines over one tiny model on a GPU: with what `kvcag.engines.cuda` has, and without."""

from __future__ import annotations

from kvcag import HFEngine
from kvcag.testing import byte_tokenizer, tiny_model

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
"""Layer types of a tiny model."""


def engines(family: str = "llama", **config: object) -> tuple[HFEngine, HFEngine]:
    """One with graphs and one without. No token ends an answer."""
    model = tiny_model(family, **{"eos_token_id": None, **config}).to("cuda")
    return HFEngine(model, byte_tokenizer()), HFEngine(model, byte_tokenizer(), cuda_graphs=False)
