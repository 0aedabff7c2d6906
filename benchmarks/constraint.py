"""Measures the time to compile a schema, and the time of a constraint per token, compared with the model's step.

    python benchmarks/constraint.py [--tokens 100] [--out benchmarks/results/constraint.json]

The script makes one run. It compares a constraint's time per token (the mask, and the check of the chosen token)
with the model's step in the same process.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import torch
from transformers import DynamicCache

from kvcag import HFEngine
from kvcag.cache.layers import cache_argument
from kvcag.demo.model import embedded_model
from kvcag.engines.constrain import ConstraintCompiler, ConstraintLike, Regex

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "kind": {"enum": ["boat", "pier", "kiosk"]},
        "price": {"type": "number", "minimum": 0, "maximum": 1000},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,12}$"}, "maxItems": 5},
        "owner": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/person"}]},
    },
    "required": ["name", "kind", "price", "tags", "owner"],
    "additionalProperties": False,
    "$defs": {
        "person": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "born": {"type": "string", "format": "date"}},
            "required": ["name", "born"],
            "additionalProperties": False,
        }
    },
}
CONSTRAINTS: dict[str, ConstraintLike] = {
    "schema": {"type": "array", "items": ITEM, "minItems": 2, "maxItems": 20, "$defs": ITEM["$defs"]},
    "text": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    "regex": Regex("([a-z]{1,12} ){4,400}end"),
}


class Timed:
    """Wall-clock and CPU time of blocks, in ms. On a busy machine, read the CPU time."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __enter__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def __exit__(self, *exception: object) -> None:
        self.wall.append((time.perf_counter() - self._started[0]) * 1e3)
        self.cpu.append((time.process_time() - self._started[1]) * 1e3)

    def plus(self, other: Timed) -> Timed:
        both = Timed()
        both.wall = [a + b for a, b in zip(self.wall, other.wall, strict=True)]
        both.cpu = [a + b for a, b in zip(self.cpu, other.cpu, strict=True)]
        return both

    def figures(self) -> dict[str, float]:
        return {
            "median_ms": median(self.wall),
            "cpu_median_ms": median(self.cpu),
            "cpu_mean_ms": mean(self.cpu),
            "cpu_p95_ms": quantiles(self.cpu, n=20)[-1],
        }


def compiling(engine: HFEngine, count: int = 40) -> dict[str, Any]:
    """Compile schemas that all differ, since equal ones are cached. The first also prepares the tokenizer."""
    first, later = Timed(), Timed()
    with first:
        vocabulary = engine.model.get_input_embeddings().num_embeddings
        compiler = ConstraintCompiler(engine.tokenizer, vocabulary, sorted(engine.eos_ids))
        compiler.compile({"const": "first"})
    for number in range(count):
        properties: dict[str, Any] = {**ITEM["properties"], f"extra_{number}": {"type": "integer"}}
        with later:
            compiler.compile({**ITEM, "properties": properties})
    return {"first_ms": first.wall[0], **later.figures()}


def per_token(engine: HFEngine, constraint: ConstraintLike, tokens: int) -> dict[str, Any]:
    """Time the mask and the check, and the model separately, along one sampled answer."""
    held = engine.constrain(constraint, tokens).start(tokens)
    generator = torch.Generator().manual_seed(0)
    masking, checking, model, cache = Timed(), Timed(), Timed(), DynamicCache()
    pending = torch.tensor([engine.build_prompt("Describe the harbour.").token_ids])
    for _ in range(tokens):
        with torch.no_grad(), model:
            out = engine.model(pending, **cache_argument(engine.model, cache), use_cache=True, logits_to_keep=1)
        with masking:
            scores = held(pending, out.logits[:, -1])
        drawn = int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
        with checking:
            token = held.take(drawn)
        pending = torch.tensor([[token]])
        if held.complete or token in engine.eos_ids:
            break
    constrained = masking.plus(checking)
    step = {"model_step_ms": median(model.wall[1:]), "model_step_cpu_ms": median(model.cpu[1:])}
    return {"tokens": len(model.wall), **constrained.figures(), **step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "constraint.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine = HFEngine.from_pretrained(embedded_model(), dtype="float32", device="cpu")
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "model": engine.model_name.rsplit("/", 1)[-1],
        "vocabulary": engine.model.get_input_embeddings().num_embeddings,
        "compile": compiling(engine),
        "per_token": {name: per_token(engine, it, args.tokens) for name, it in CONSTRAINTS.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
