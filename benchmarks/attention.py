"""Compares transformers' attention over a cache with kvcag's (kvcag/cache/attention.py), in one run.

    python benchmarks/attention.py [--repeat 5] [--out benchmarks/results/attention.json]

Two cases, in turns, medians of `--repeat`:

- a prompt of 2,130 tokens, of which the first 14, 60 or 1,000 are in the cache (0: all are read, without a mask). With
  transformers' attention, a short cached prefix made a prompt slower than no cache;
- a question of 60 tokens over 500 to 8,000 tokens.

Both write the same keys and values, except for rounding; the result contains the largest difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from geometry import documents_of, endless
from measuring import machine, seconds

from kvcag import HFEngine
from kvcag.cache.layers import LayerKV, cache_argument, cut, generation_cache, layers_of
from kvcag.demo.model import embedded_model

PROMPT, KNOWN = 2130, (0, 14, 60, 1000)
QUESTION, CONTEXTS = 60, (500, 2000, 4000, 8000)


def compare(engine: HFEngine, known: list[LayerKV], ids: list[int], repeat: int) -> dict[str, float]:
    """Seconds of a pass of `ids` over a cache of `known`."""
    chunk = torch.tensor([ids], device=engine.device)
    taken: dict[str, list[float]] = {"transformers": [], "kvcag": []}
    differs = 0.0
    for _ in range(repeat + 1):
        theirs, ours = (generation_cache([known] if known else [], room=len(ids)) for _ in range(2))
        with torch.no_grad():
            bare = partial(
                engine.model, chunk, **cache_argument(engine.model, theirs), use_cache=True, logits_to_keep=1
            )
            taken["transformers"].append(seconds(engine.device, bare))
        taken["kvcag"].append(seconds(engine.device, partial(engine.forward, ids, ours)))
        pairs = zip(layers_of(theirs), layers_of(ours), strict=True)
        differs = max(float((a - b).abs().max()) for one, other in pairs for a, b in zip(one, other, strict=True))
    return {name: statistics.median(times[1:]) for name, times in taken.items()} | {"differs": differs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention.json")
    given = parser.parse_args()
    engine = endless(HFEngine.from_pretrained(embedded_model(), dtype="float32", prefix_cache_bytes=0))
    ids = engine.template.encode(" ".join(documents_of(engine, max(CONTEXTS) + 100, 1)))
    layers, _ = engine.prefill(ids[: max(CONTEXTS)])
    result: dict[str, Any] = {"machine": machine(engine.device), "repeat": given.repeat, "prompts": [], "questions": []}
    for tokens in KNOWN:
        row = compare(engine, cut(layers, 0, tokens) if tokens else [], ids[tokens:PROMPT], given.repeat)
        result["prompts"].append({"known": tokens, "tokens": PROMPT} | row)
        print(result["prompts"][-1], flush=True)
    for tokens in CONTEXTS:
        row = compare(engine, cut(layers, 0, tokens), ids[tokens : tokens + QUESTION], given.repeat)
        result["questions"].append({"context": tokens, "tokens": QUESTION} | row)
        print(result["questions"][-1], flush=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
