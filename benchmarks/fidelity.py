"""How far each merging strategy is from a full prefill, and what it costs.

    python benchmarks/fidelity.py --data musique.json --docs 5 --words 120 --limit 20 \
        --strategy rotate anchor deviation query full --ratio 0.1 0.2 --out benchmarks/results/fidelity-5x120.json

`--data` is a JSON list of {"question": …, "ctxs": [{"text": …}, …]}. For each question, the context's first `--docs`
passages of `--words` words are kept one by one and merged through `KVCacheMemory.merge`. The reference is a full
prefill of the same token ids in the same run: KL is KL(full prefill ‖ merged) in nats a token, teacher-forced on the 24
greedy tokens of the full prefill; agreement is the share of those tokens where the argmax is the same. TTFT is
merging and the tail's prefill, over the TTFT of the full prefill. Memory is what a merge needs at its peak beyond the
cache that it returns, over that cache. Plots go beside `--out`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import cache_argument, layers_of, nbytes
from kvcag.demo.model import embedded_model

HEAD = "You are a helpful assistant. Answer the question using only the passages below."
QUESTION = "Summarize the passages, then answer: {}"
TOKENS = 24
RATIOLESS = ("rotate", "full")


@dataclass
class Row:
    strategy: str
    ratio: float
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    recomputed: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    ttft_ratio: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.strategy if self.strategy in RATIOLESS else f"{self.strategy} {self.ratio:.0%}"

    def summary(self) -> dict[str, Any]:
        spread = statistics.stdev(self.kl) / len(self.kl) ** 0.5 if len(self.kl) > 1 else None
        return {
            "strategy": self.strategy,
            "ratio": self.ratio,
            "kl": statistics.mean(self.kl),
            "kl_standard_error": spread,
            "agreement": statistics.mean(self.agreement),
            "recomputed_share": statistics.mean(self.recomputed),
            "ttft_seconds": statistics.median(self.ttft),
            "ttft_over_full_prefill": statistics.median(self.ttft_ratio),
            "peak_memory_over_cache": max(self.memory) if self.memory else None,
        }


class Peak:
    """Peak memory of a block, in bytes above what was in use before: the GPU's, or (on Linux) the process's."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.bytes: int | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.before = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        elif sys.platform == "linux":
            self.bytes = _status("VmHWM") - self.before


def _status(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
def full_prefill(model: Any, ids: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    """TTFT, the greedy tokens, and the log-probabilities that they were chosen from."""
    cache = DynamicCache()
    ids = ids.to(model.device)
    seconds, out = timed(model.device, lambda: model(ids[None], **cache_argument(model, cache), logits_to_keep=1))
    logits = [out.logits[0, -1]]
    while len(logits) < TOKENS:
        logits.append(model(logits[-1].argmax()[None, None], **cache_argument(model, cache)).logits[0, -1])
    rows = torch.stack(logits)
    return seconds, rows.argmax(-1), rows.float().log_softmax(-1)


@torch.no_grad()
def over_cache(model: Any, cache: DynamicCache, tail: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Log-probabilities over a merged cache, teacher-forced on `answer`."""
    ids = torch.cat([tail.to(model.device), answer[:-1]])
    logits = model(ids[None], **cache_argument(model, cache), logits_to_keep=len(answer)).logits[0]
    return logits.float().log_softmax(-1)


def measure(memory: KVCacheMemory, documents: list[str], question: str, rows: list[Row]) -> int:
    """Add one question's figures to each row. Returns the tokens of its context."""
    model, device = memory.engine.model, memory.engine.model.device
    items = [memory.extract(text) for text in documents]
    memory.add(items)
    ids = [item.id for item in items]
    reference = None
    for row in rows:

        def first_token(row: Row = row) -> Any:
            context = memory.merge(ids, question, strategy=row.strategy, ratio=row.ratio)
            with torch.no_grad():
                model(context.tail_ids[None].to(device), **cache_argument(model, context.cache), logits_to_keep=1)
            return context

        seconds, _ = timed(device, first_token)
        with Peak(device) as peak:
            context = memory.merge(ids, question, strategy=row.strategy, ratio=row.ratio)
        if reference is None:
            reference = full_prefill(model, torch.cat([context.token_ids, context.tail_ids]))
        full_seconds, answer, expected = reference
        cache_bytes = nbytes(layers_of(context.cache))
        found = over_cache(model, context.cache, context.tail_ids, answer)
        row.kl.append((expected.exp() * (expected - found)).sum(-1).mean().item())
        row.agreement.append((expected.argmax(-1) == found.argmax(-1)).float().mean().item())
        row.recomputed.append(context.report.recomputed_tokens / context.report.context_tokens)
        row.ttft.append(seconds)
        row.ttft_ratio.append(seconds / full_seconds)
        if peak.bytes is not None:
            row.memory.append((peak.bytes - cache_bytes) / cache_bytes)
    memory.delete(ids)
    return len(context.token_ids)


def plot(rows: list[dict[str, Any]], title: str, out: Path) -> list[Path]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    files = []
    axes = {
        "share": ("recomputed_share", "share of the context that is recomputed"),
        "ttft": ("ttft_over_full_prefill", "TTFT, of a full prefill"),
    }
    for suffix, (key, label) in axes.items():
        figure, axis = plt.subplots(figsize=(6, 4), constrained_layout=True)
        for strategy in dict.fromkeys(row["strategy"] for row in rows):
            points = sorted((row[key], max(row["kl"], 1e-6)) for row in rows if row["strategy"] == strategy)
            axis.plot(*zip(*points, strict=True), marker="o", label=strategy)
        axis.set(xlabel=label, ylabel="KL from a full prefill (nats a token)", yscale="log")
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.3)
        axis.legend()
        files.append(out.with_name(f"{out.stem}-{suffix}.png"))
        figure.savefig(files[-1], dpi=120)
        plt.close(figure)
    return files


def describe(engine: HFEngine, options: argparse.Namespace, tokens: list[int], rows: list[Row]) -> dict[str, Any]:
    device = engine.model.device
    return {
        "model": engine.fingerprint.model_name.rsplit("/", 1)[-1],
        "dtype": engine.fingerprint.dtype,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "documents": options.docs,
        "words": options.words,
        "questions": len(tokens),
        "context_tokens": statistics.mean(tokens),
        "rows": [row.summary() for row in rows],
        "kl_by_question": {row.name: row.kl for row in rows},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON list of questions with passages")
    parser.add_argument("--docs", type=int, default=5, help="documents for each question")
    parser.add_argument("--words", type=int, default=120, help="words of each document")
    parser.add_argument("--limit", type=int, default=10, help="how many questions")
    parser.add_argument("--skip", type=int, default=0, help="questions to leave out first")
    parser.add_argument("--strategy", nargs="+", default=["rotate", "anchor", "deviation", "query", "full"])
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.1, 0.2])
    parser.add_argument(
        "--model", default=None, help="a hub id or a folder; default: the embedded SmolLM2-135M-Instruct"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures; plots go beside it")
    options = parser.parse_args()

    engine = HFEngine.from_pretrained(options.model or embedded_model(), options.dtype, options.device)
    memory = KVCacheMemory(engine, instruction=HEAD)
    rows = [
        Row(strategy, ratio)
        for strategy in options.strategy
        for ratio in ([0.0] if strategy in RATIOLESS else options.ratio)
    ]
    questions = json.loads(options.data.read_text())[options.skip : options.skip + options.limit]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    tokens = []
    for number, question in enumerate(questions, 1):
        texts = [" ".join(ctx["text"].split()[: options.words]) for ctx in question["ctxs"][: options.docs]]
        documents = [f"Passage: {text}\n\n" for text in texts]
        tokens.append(measure(memory, documents, QUESTION.format(question["question"]), rows))
        result = describe(engine, options, tokens, rows)
        options.out.write_text(json.dumps(result, indent=1) + "\n")  # what is measured is kept, whatever comes
        print(f"question {number} of {len(questions)}: {tokens[-1]} tokens", file=sys.stderr)

    title = f"{result['model']}, {options.docs} documents × {options.words} words, {len(questions)} questions"
    files = plot(result["rows"], title, options.out)
    print(f"{'strategy':16} {'KL':>8} {'agree':>6} {'recomp.':>8} {'TTFT':>8} {'of full':>8} {'memory':>7}")
    for row in rows:
        s = row.summary()
        extra = "" if s["peak_memory_over_cache"] is None else f"{s['peak_memory_over_cache']:6.0%}"
        print(
            f"{row.name:16} {s['kl']:8.4f} {s['agreement']:6.3f} {s['recomputed_share']:8.1%} "
            f"{s['ttft_seconds']:7.2f}s {s['ttft_over_full_prefill']:8.3f} {extra:>7}"
        )
    print("written:", *(str(f) for f in [options.out, *files]))


if __name__ == "__main__":
    main()
