"""Compares kvcag (fp32, bf16, int8 weights) with llama.cpp over cached contexts on two CPU cores; measures merging.

    python benchmarks/cpu.py --llama VENV/bin/python --out benchmarks/results/cpu.json

`VENV` is an environment with llama-cpp-python (`pip install llama-cpp-python` compiles for ten minutes). Both run
SmolLM2-135M over the same tokens: llama.cpp uses the wheel's Q4_1 file, kvcag the fp32 weights made from this file.
Measures for each context, in one run, in turns:

- `cold_s`: the time to read the context without a cache;
- `first_s`: from a question to its first token over the cached context (`HFEngine.stream`);
- `step_s`: the median time from a token to the next, and `floor_s`: bytes of weights and cache / memory bandwidth;
- `old_step_s` in fp32: the model's own modules and attention, which repeats keys once for each query head.

With `--merging`, also measures `query` over eight documents and a full prefill of the same prompt, both to the first
token (`KVCacheMemory`). Results of other contexts in `--out` stay.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from geometry import HEAD, documents_of, endless
from measuring import Ceilings, machine
from peers.llamacpp import LlamaCpp

from kvcag import HFEngine, KVCacheMemory, Sampling
from kvcag.cache.layers import layers_of
from kvcag.chat_template import Prompt
from kvcag.demo.model import SMOLLM2, download, embedded_model, take_gguf

CONTEXTS = (2000, 8000)
STEPS = 24
MERGED = 3400
QUESTION = "Which of the statements described above transfers control, and what happens to the local variables?"


Rows: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Medians by context, system and what was measured."""


class Ours:
    """One engine."""

    def __init__(self, name: str, **loading: Any) -> None:
        self.name = name
        self.engine = endless(HFEngine.from_pretrained(embedded_model(), device="cpu", **loading))

    def cold(self, ids: list[int]) -> float:
        self.engine.forget(None)
        started = time.perf_counter()
        self.cache = self.engine.context_of(self.engine.prefill(ids)[0], ids, (), None)  # type: ignore[arg-type]
        return time.perf_counter() - started

    def ask(self, context: list[int], tail: list[int]) -> list[float]:
        prompt = Prompt(tuple(context), (), tuple(tail))
        times = [time.perf_counter()]
        for chunk in self.engine.stream(prompt, Sampling(max_new_tokens=STEPS)):
            times += [time.perf_counter()] * bool(chunk.token_ids)
        self.engine.prefixes.clear()
        self.engine.prefixes.insert(context, layers_of(self.cache.cache))  # not what was said over it
        return [after - before for before, after in pairwise(times)]

    def old_steps(self, context: list[int], tail: list[int]) -> list[float]:
        now = {name: getattr(self.engine, name) for name in ("_by_position", "_step")}
        self.engine.__dict__ |= {"_by_position": False, "_step": None}
        try:
            return self.ask(context, tail)[1:]
        finally:
            self.engine.__dict__ |= now

    def bytes_of_step(self, tokens: int) -> int:
        model = self.engine.model
        embedding = model.get_input_embeddings().weight
        tied = model.get_output_embeddings().weight is embedding
        weights = sum(p.nbytes for p in model.parameters() if p is not embedding or tied)
        return weights + tokens * self.engine.bytes_per_token


def known_contexts(systems: list[Ours], llama: LlamaCpp, text: list[int], tail: list[int], given: Any) -> Rows:
    rows: Rows = {}
    for tokens in given.context:
        context = text[:tokens]
        taken: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for system in [llama, *systems]:
            for _ in range(given.cold):
                taken[system.name]["cold_s"].append(system.cold(context))
        for turn in range(given.repeat + 1):
            for system in [llama, *systems]:
                # Another first token each time: llama.cpp goes on from what it has read, of a question too.
                first, *steps = system.ask(context, [tail[0] + turn, *tail[1:]])
                if turn:  # the first is warm-up
                    taken[system.name]["first_s"].append(first)
                    taken[system.name]["step_s"] += steps
                if turn and system.name == "fp32":
                    taken[system.name]["old_step_s"] += system.old_steps(context, tail)  # type: ignore[union-attr]
        row = {name: {what: statistics.median(each) for what, each in own.items()} for name, own in taken.items()}
        for system in systems:
            ceilings = Ceilings.of(torch.device("cpu"), system.engine.model.dtype)
            row[system.name]["floor_s"] = system.bytes_of_step(tokens) / ceilings.bytes_per_s
        rows[str(tokens)] = row
        print(tokens, json.dumps(row), flush=True)
    return rows


def merging(system: Ours, repeat: int) -> dict[str, Any]:
    """Seconds to the first token of `query` 10% and 20%, and of a full prefill, over documents in new orders."""
    texts = documents_of(system.engine, MERGED, 8)
    engine = system.engine
    engine.forget(None)
    cold = endless(HFEngine(engine.model, engine.tokenizer, prefix_cache_bytes=0))
    memory = KVCacheMemory(engine, instruction=HEAD)
    reading = KVCacheMemory(cold, store=memory.store, instruction=HEAD)
    ids = memory.add(texts)
    taken: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, int] = {}
    for turn in range(repeat + 1):
        order = ids[1 + turn % 7 :] + ids[: 1 + turn % 7]
        for name, ratio in (("full", 0.0), ("0.1", 0.1), ("0.2", 0.2)):
            asked, strategy = (memory, "query") if ratio else (reading, "exact")
            engine.forget(None)
            engine.prefill(memory._prompt([{"role": "user", "content": QUESTION}], order, None, "documents").head_ids)
            chunks = asked.stream(QUESTION, order, strategy=strategy, ratio=ratio, max_new_tokens=1)
            usage = [chunk.usage for chunk in chunks if chunk.usage][-1]
            parts["tokens"] = usage.prompt_tokens
            if turn:
                taken[name].append(usage.ttft_s)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(each, taken["full"], strict=True)) for name, each in taken.items()
    }
    row = {**parts, "seconds": medians, "over_full": ratios}
    print(system.name, json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="the interpreter of an environment with llama-cpp-python")
    parser.add_argument("--context", type=int, nargs="*", default=CONTEXTS)
    parser.add_argument("--merging", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cold", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    systems = [Ours("fp32", dtype="float32"), Ours("bf16", dtype="bfloat16"), Ours("int8", int8_weights=True)]
    engine = systems[0].engine
    result: dict[str, Any] = json.loads(given.out.read_text()) if given.out and given.out.is_file() else {}
    result |= {"machine": machine(engine.device), "repeat": given.repeat}
    if given.llama:
        text = engine.template.encode(" ".join(documents_of(engine, max(CONTEXTS) + 100, 1)))
        tail = list(engine.template.split_system(HEAD, [{"role": "user", "content": QUESTION}]).tail_ids)
        with tempfile.TemporaryDirectory() as folder:
            gguf = take_gguf(SMOLLM2, download(SMOLLM2, Path(folder)), Path(folder))
            llama = LlamaCpp(given.llama, gguf, given.threads, max(CONTEXTS) + 192, STEPS)
        result["llama_cpp"] = llama.version
        result["contexts"] = {**result.get("contexts", {}), **known_contexts(systems, llama, text, tail, given)}
        llama.close()
    if given.merging:
        result["merging"] = {system.name: merging(system, given.repeat) for system in systems[:2]}
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
