"""Measure on a GPU, with the embedded model, whether captured passes answer as the model's own passes do.

    python benchmarks/gpu_smollm2.py --out benchmarks/results/gpu-smollm2.json

There are fifty prompts: five about each of ten documents of Python's reference, each with the two documents after it.

- fp32: on how many prompts both engines give the same greedy tokens, for exact and merged contexts, for constrained and
  stopped answers, and for questions that are asked together.
- fp32: how far the logits over `strategy="full"` are from those of one pass, for one question about each document.
- bf16: the relative error of the logits between both engines, for each token of an answer, and the share of tokens on
  which they agree if the likeliest token leads by more than 0.1.
- The seconds of the first question after loading, in a process without compiled kernels, and in a second process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import machine

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import generation_cache, layers_of
from kvcag.core import MergedContext
from kvcag.demo.corpus import python_topics
from kvcag.engines.constrain import Regex

HEAD = "Use these passages only."
ASKED = [
    "What is {} for?",
    "How is {} written?",
    "What can go wrong with {}?",
    "Give an example of {}.",
    "Who uses {}?",
]
TOKENS = 16


def engines(path: str, dtype: torch.dtype) -> dict[str, HFEngine]:
    captured = HFEngine.from_pretrained(path, dtype, "cuda")
    return {"captured": captured, "plain": HFEngine(captured.model, captured.tokenizer, cuda_graphs=False)}


def prompts() -> list[tuple[list[str], str]]:
    """Three documents, and a question about the first."""
    topics = python_topics()[:12]
    texts = [topic.text[:1200] for topic in topics]
    return [(texts[i : i + 3], asked.format(topics[i].title)) for i in range(10) for asked in ASKED]


def tokens_of(memory: KVCacheMemory, ids: list[str], question: str, **how: Any) -> list[int]:
    chunks = memory.stream(question, ids, max_new_tokens=TOKENS, **how)
    return [token for chunk in chunks for token in chunk.token_ids]


def same_answers(both: dict[str, HFEngine]) -> dict[str, str]:
    """For each kind of answer, on how many prompts all tokens are the same."""
    kinds: dict[str, dict[str, Any]] = {
        "exact": {"strategy": "exact"},
        "rotate": {"strategy": "rotate"},
        "query 20%": {"strategy": "query", "ratio": 0.2},
        "constrained": {"strategy": "exact", "constraint": Regex("[A-Z][a-z ]{10,40}\\.")},
        "stopped": {"strategy": "exact", "stop": ["e"]},
    }
    found: dict[str, dict[str, list[Any]]] = {name: {} for name in [*kinds, "batched"]}
    for name, engine in both.items():
        memory = KVCacheMemory(engine, instruction=HEAD)
        for documents, question in prompts():
            ids = [memory.add(document)[0] for document in documents]
            for kind, how in kinds.items():
                found[kind].setdefault(name, []).append(tokens_of(memory, ids, question, **how))
        for documents, _ in prompts()[:: len(ASKED)]:
            ids = [memory.add(document)[0] for document in documents]
            questions = [question for others, question in prompts() if others == documents]
            answers = memory.ask_all(questions, ids, strategy="exact", max_new_tokens=TOKENS)
            found["batched"].setdefault(name, []).extend(str(answer) for answer in answers)
    return {
        kind: f"{sum(a == b for a, b in zip(each['captured'], each['plain'], strict=True))}/{len(each['plain'])}"
        for kind, each in found.items()
    }


@torch.no_grad()
def own_pass(engine: HFEngine, context: MergedContext) -> torch.Tensor:
    """The logits of one pass over context and question."""
    ids = torch.cat([context.token_ids, context.tail_ids])[None].to("cuda")
    return engine.model(ids, use_cache=False, logits_to_keep=1).logits[0].float()


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    return float((got.float() - right).norm() / right.norm())


def full_error(engine: HFEngine) -> float:
    """The largest relative error of the logits over a context that was recomputed as a whole."""
    memory, worst = KVCacheMemory(engine, instruction=HEAD), 0.0
    for documents, question in prompts()[:: len(ASKED)]:
        context = memory.merge([memory.add(document)[0] for document in documents], question, strategy="full")
        if context.read is not None:
            logits = context.read.logits
        else:
            cache = generation_cache([layers_of(context.cache)], room=len(context.tail_ids))
            logits = engine.forward(context.tail_ids.tolist(), cache)
        worst = max(worst, error(logits, own_pass(engine, context)))
    return worst


def bf16_error(both: dict[str, HFEngine]) -> dict[str, float]:
    """Over the answers of `plain`, token by token."""
    errors, noise, agreed, clear = [], [], 0, 0
    for documents, question in prompts():
        context = both["plain"].build_kv_cache([HEAD, *documents])
        tail = list(both["plain"].build_prompt(question, context).tail_ids)
        answer: list[int] = []
        runs = []
        for engine in (both["plain"], both["captured"]):
            cache = generation_cache([layers_of(context)], room=len(tail) + TOKENS)
            logits = [engine.forward(tail, cache).float()]
            for i in range(TOKENS - 1):
                if len(answer) == i:
                    answer.append(int(logits[-1].argmax()))
                logits.append(engine.forward([answer[i]], cache).float())
            runs.append(torch.cat(logits))
        right, got = runs
        errors += ((got - right).norm(dim=-1) / right.norm(dim=-1)).tolist()
        top = right.topk(2).values
        leads = top[:, 0] - top[:, 1] > 0.1
        agreed += int((right.argmax(-1) == got.argmax(-1))[leads].sum())
        clear += int(leads.sum())
        ids = torch.tensor([[*context.token_ids.tolist(), *tail]], device="cuda")
        with torch.no_grad():
            whole = both["plain"].model(ids, use_cache=False, logits_to_keep=1).logits[0].float()
        noise.append(error(whole, right[:1]))
    at = torch.tensor(errors).quantile(torch.tensor([0.5, 0.99, 1.0])).tolist()
    return {
        "median": at[0],
        "99%": at[1],
        "largest": at[2],
        "model's own, one pass against two, median": float(torch.tensor(noise).median()),
        "agreement where clear": agreed / clear,
        "tokens where clear": clear,
    }


_FIRST = """
import sys, time, torch
from kvcag import HFEngine, KVCacheMemory
engine = HFEngine.from_pretrained(sys.argv[1], torch.bfloat16, "cuda")
engine = HFEngine(engine.model, engine.tokenizer, cuda_graphs=sys.argv[2] == "captured")
torch.cuda.synchronize()
started = time.perf_counter()
memory = KVCacheMemory(engine)
ids = memory.add("The library opens at nine. It is in Harbour Street. " * 20)
memory.ask("When does it open?", ids, strategy="exact", max_new_tokens=8)
print(time.perf_counter() - started)
"""


def first_question(path: str, how: str, kernels: str) -> float:
    """Seconds, in a process of its own, with compiled kernels in the folder `kernels`."""
    environment = {**os.environ, "TRITON_CACHE_DIR": kernels}
    command = [sys.executable, "-c", _FIRST, path, how]
    return float(
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: the embedded model")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    path = given.model
    if path is None:
        from kvcag.demo.model import embedded_model

        path = str(embedded_model())
    result: dict[str, Any] = {"machine": machine(torch.device("cuda")), "model": Path(path).name}
    both = engines(path, torch.float32)
    half = partial(engines, path, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "fp32: same tokens": lambda: same_answers(both),
            "fp32: full, largest error": lambda: {name: full_error(engine) for name, engine in both.items()},
            "bf16: logits": lambda: bf16_error(half()),
            "first question, s": lambda: {
                f"{how}, {when} process": first_question(path, how, f"{folder}/{how}")
                for how in ("plain", "captured")
                for when in ("first", "second")
            },
        }
        for name, part in parts.items():
            started = time.perf_counter()
            result[name] = part()
            print(name, result[name], f"({time.perf_counter() - started:.0f} s)", flush=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
