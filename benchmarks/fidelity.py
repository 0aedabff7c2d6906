"""Measures the error and the cost of each merging strategy, compared with a full prefill and with published methods.

    python benchmarks/fidelity.py --set musique --data musique.json --docs 5 --words 120 --skip 50 --limit 20 \
        --ratio 0.1 0.15 0.2 0.4 --out benchmarks/results/fidelity/musique.json
    python benchmarks/fidelity.py --set faq --out benchmarks/results/fidelity/faq.json
    python benchmarks/fidelity.py --data musique.json --docs 20 --words 260 --strategy rotate query --out ttft-8000.json
    python benchmarks/fidelity.py --plot benchmarks/results/fidelity/{musique,reference,faq}.json --out docs/img/kl.png

Each question of a set (`question_sets.py`) has documents. They are encoded one by one and merged through
`KVCacheMemory.merge`, or by a published strategy (`published.py`). The reference is a full prefill of the same token
ids in the same run, and its greedy answer of up to 32 tokens.

KL is KL(full prefill ‖ merged) in nats per token, teacher-forced on the first 24 tokens of that answer; agreement is
the share of those tokens where the argmax is the same. *Same answer* is the share of questions whose whole answer is
that of the full prefill, *answer F1* the F1 of its tokens. F1 and EM compare an answer with the set's own reference, as
SQuAD does. TTFT is merging and the tail's prefill, over the TTFT of the full prefill; choosing is the part of it that
found the tokens to recompute. Memory is what a merge needs at its peak beyond the cache that it returns, over that
cache. The table is printed; a plot goes beside `--out`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import statistics
import string
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import machine, table
from published import PUBLISHED, merged
from question_sets import Question, faq, musique, reference
from transformers import DynamicCache

import kvcag.cache.merge
from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.attention import by_row
from kvcag.cache.layers import cache_argument, crop, generation_cache, layers_of, nbytes
from kvcag.core import MergedContext
from kvcag.demo.model import embedded_model

HEAD = "You are a helpful assistant. Answer the question using only the passages below."
TOKENS, ANSWER = 24, 32
OURS = ("rotate", "anchor", "deviation", "query", "full")
RATIOLESS = ("rotate", "full")

MEASURES = {
    "kl": "KL",
    "agreement": "same token",
    "same_answer": "same answer",
    "answer_f1": "answer F1",
    "f1": "F1",
    "em": "EM",
    "recomputed": "recomputed",
    "ttft_ratio": "TTFT of full",
    "choosing": "choosing of TTFT",
    "memory": "memory",
}


@dataclass
class Row:
    """A strategy's figures, one entry of each list a question."""

    strategy: str
    ratio: float
    in_context: bool = False
    figures: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        name = self.strategy if self.strategy in RATIOLESS else f"{self.strategy} {self.ratio:.0%}"
        return f"{name}, in context" if self.in_context else name

    def add(self, **figures: float) -> None:
        for name, figure in figures.items():
            self.figures.setdefault(name, []).append(figure)

    def summary(self) -> dict[str, Any]:
        kl = self.figures["kl"]
        found = {name: summary_of(name, self.figures[name]) for name in MEASURES if name in self.figures}
        spread = statistics.stdev(kl) / len(kl) ** 0.5 if len(kl) > 1 else None
        how = {"name": self.name, "strategy": self.strategy, "ratio": self.ratio, "in_context": self.in_context}
        return {**how, "kl_standard_error": spread, **found}

    def merge(self, memory: KVCacheMemory, ids: list[str], question: str) -> MergedContext:
        if self.strategy in PUBLISHED:
            return merged(memory, ids, question, self.strategy, self.ratio)
        return memory.merge(ids, question, strategy=self.strategy, ratio=self.ratio)  # type: ignore[arg-type]


def summary_of(name: str, figures: list[float]) -> float:
    """A time is a median, memory is a peak, all else is a mean."""
    if name == "memory":
        return max(figures)
    return (statistics.median if name in ("ttft_ratio", "choosing") else statistics.mean)(figures)


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


@contextmanager
def timing_the_choice(device: torch.device) -> Iterator[list[float]]:
    """Seconds of each choice of tokens within the block."""
    spent: list[float] = []
    select = kvcag.cache.merge.select

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seconds, chosen = timed(device, lambda: select(*args, **kwargs))
        spent.append(seconds)
        return chosen

    kvcag.cache.merge.select = watched
    try:
        yield spent
    finally:
        kvcag.cache.merge.select = select


@dataclass
class Reference:
    """What a full prefill gives: its time, its greedy tokens, and the log-probabilities of the first `TOKENS`."""

    seconds: float
    tokens: list[int]
    expected: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, ids: torch.Tensor) -> Reference:
        cache, ids = DynamicCache(), ids.to(model.device)
        seconds, out = timed(model.device, lambda: model(ids[None], **cache_argument(model, cache), logits_to_keep=1))
        rows = [out.logits[0, -1]]
        while len(rows) < ANSWER:
            rows.append(model(rows[-1].argmax()[None, None], **cache_argument(model, cache)).logits[0, -1])
        tokens = torch.stack(rows).argmax(-1).tolist()
        return cls(seconds, tokens, torch.stack(rows[:TOKENS]).float().log_softmax(-1))

    @torch.no_grad()
    def compare(self, model: Any, cache: Any, first: torch.Tensor) -> dict[str, float]:
        """KL and agreement of a merged cache that holds the tail; `first` are the logits after it."""
        length = cache.get_seq_length()
        ids = torch.tensor([self.tokens[: TOKENS - 1]], device=model.device)
        rest = model(ids, **cache_argument(model, cache)).logits[0]
        crop(cache, length)
        found = torch.cat([first, rest]).float().log_softmax(-1)
        kl = (self.expected.exp() * (self.expected - found)).sum(-1).mean()
        same = (self.expected.argmax(-1) == found.argmax(-1)).float().mean()
        return {"kl": kl.item(), "agreement": same.item()}


@torch.no_grad()
def answers(model: Any, caches: Sequence[Any], firsts: Sequence[torch.Tensor]) -> list[list[int]]:
    """`ANSWER` greedy tokens over each cache, all caches a step at a time."""
    tokens = [first.argmax(-1, keepdim=True) for first in firsts]
    answered = [[int(token)] for token in tokens]
    while len(answered[0]) < ANSWER:
        at = torch.tensor([[cache.get_seq_length()] for cache in caches], device=model.device)
        with by_row(model, caches) as rows:
            given = cache_argument(model, rows)
            logits = model(torch.stack(tokens), position_ids=at, use_cache=True, **given).logits[:, -1]
        tokens = list(logits.argmax(-1, keepdim=True))
        for answer, token in zip(answered, tokens, strict=True):
            answer.append(int(token))
    return answered


def measure(memory: KVCacheMemory, question: Question, rows: list[Row], *, peaks: bool) -> int:
    """Add one question's figures to each row; those in context come last. Returns the tokens of its context."""
    engine = memory.engine
    model, device = engine.model, engine.model.device
    documents = [f"Passage: {text}\n\n" for text in question.documents]
    before = {
        text: [f"Passage: {near}\n\n"] * bool(near) for text, near in zip(documents, question.before, strict=True)
    }
    ids = memory.add(documents)
    whole, caches, firsts = None, [], []
    for row in rows:
        if row.in_context:
            memory.add(documents, context=before.__getitem__)

        def first_token(row: Row = row) -> Any:
            context = row.merge(memory, ids, question.prompt)
            pieces, room = [layers_of(context.cache)], len(context.tail_ids) + ANSWER
            if context.read is None:
                cache = generation_cache(pieces, room)
                return context, cache, engine.forward(context.tail_ids.tolist(), cache)
            return context, generation_cache([*pieces, layers_of(context.read.cache)], room), context.read.logits

        with timing_the_choice(device) as choosing:
            seconds, (context, cache, first) = timed(device, first_token)
        if whole is None:
            whole = Reference.of(model, torch.cat([context.token_ids, context.tail_ids]))
        row.add(**whole.compare(model, cache, first), ttft_ratio=seconds / whole.seconds)
        row.add(recomputed=context.report.recomputed_tokens / context.report.context_tokens)
        if row.strategy in OURS:
            row.add(choosing=sum(choosing) / seconds)
        caches.append(cache)
        firsts.append(first[0])
        if peaks:
            with Peak(device) as peak:
                context = row.merge(memory, ids, question.prompt)
            size = nbytes(layers_of(context.cache))
            row.add(memory=((peak.bytes or 0) - size) / size)
    assert whole is not None
    expected = until_the_end(engine, whole.tokens)
    for row, tokens in zip(rows, answers(model, caches, firsts), strict=True):
        answer = until_the_end(engine, tokens)
        row.add(same_answer=float(answer == expected), answer_f1=f1(answer, expected))
        row.add(**against_reference(engine.tokenizer.decode(answer), question.answers))
    memory.delete(ids)
    return len(context.token_ids)


def until_the_end(engine: HFEngine, tokens: list[int]) -> list[int]:
    """An answer's tokens before the one that ends it."""
    ends = engine.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def f1(found: Sequence[Any], expected: Sequence[Any]) -> float:
    common = (Counter(found) & Counter(expected)).total()
    return 2 * common / (len(found) + len(expected)) if found or expected else 1.0


def against_reference(answer: str, references: Sequence[str]) -> dict[str, float]:
    """The best F1 and EM over the references, of words without case, punctuation and articles."""

    def words(text: str) -> list[str]:
        plain = text.lower().translate(str.maketrans("", "", string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", plain).split()

    found = words(answer)
    return {
        "f1": max(f1(found, words(each)) for each in references),
        "em": float(any(found == words(each) for each in references)),
    }


def resumed(memory: KVCacheMemory, result: dict[str, Any], rows: list[Row]) -> list[float]:
    """Give each row what an earlier run measured. Returns the mean length of its contexts, once a question."""
    if result["learned_drift"] != memory.drift:
        raise SystemExit("what the earlier run learned is not in KVCAG_CACHE any more: begin anew, without --resume")
    for row in rows:
        row.figures = result["by_question"][row.name]
    return [result["context_tokens"]] * result["questions"]


def describe(
    memory: KVCacheMemory, options: argparse.Namespace, tokens: list[float], rows: list[Row]
) -> dict[str, Any]:
    return {
        "set": options.set,
        "model": memory.engine.fingerprint.model_name.rsplit("/", 1)[-1],
        "dtype": memory.engine.fingerprint.dtype,
        "machine": options.machine,
        "documents": options.docs,
        "words": options.words,
        "learned_drift": memory.drift,
        "questions": len(tokens),
        "first_question": options.skip,
        "context_tokens": statistics.mean(tokens),
        "rows": [row.summary() for row in rows],
        "by_question": {row.name: row.figures for row in rows},
    }


def markdown(result: dict[str, Any]) -> str:
    shown = [name for name in MEASURES if any(name in row for row in result["rows"])]
    cells = []
    for row in result["rows"]:
        spread = row["kl_standard_error"]
        kl = f"{abs(row['kl']):.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
        rest = ["–" if name not in row else f"{row[name]:.2f}" for name in shown if name != "kl"]
        cells.append([row["name"], kl, *rest])
    return table(["", *(MEASURES[name] for name in shown)], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=["musique", "reference", "faq"], default="musique", help="which questions")
    parser.add_argument("--data", type=Path, help="JSON list of questions with passages, for --set musique")
    parser.add_argument("--docs", type=int, default=5, help="documents for each question")
    parser.add_argument("--words", type=int, default=120, help="words of each document, about")
    parser.add_argument("--limit", type=int, default=10, help="how many questions")
    parser.add_argument("--skip", type=int, default=0, help="questions to leave out first")
    parser.add_argument("--strategy", nargs="+", default=["rotate", "query", *PUBLISHED], choices=[*OURS, *PUBLISHED])
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.1, 0.2])
    parser.add_argument(
        "--model", default=None, help="a hub id or a folder; default: the embedded SmolLM2-135M-Instruct"
    )
    parser.add_argument("--in-context", action="store_true", help="measure ours with documents encoded in context, too")
    parser.add_argument("--learn", action="store_true", help="learn a drift from documents of questions not measured")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, in a second merge")
    parser.add_argument("--plot", nargs="+", type=Path, help="measure nothing: plot these figures into --out")
    parser.add_argument("--resume", action="store_true", help="go on where the run that wrote --out was cut off")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures; a plot goes beside it")
    options = parser.parse_args()
    from fidelity_plot import plot

    if options.plot:
        plot([json.loads(file.read_text()) for file in options.plot], options.out)
        return
    engine = HFEngine.from_pretrained(options.model or embedded_model(), options.dtype, options.device)
    options.machine = machine(engine.model.device)
    memory = KVCacheMemory(engine, instruction=HEAD, namespace="fidelity")
    rows = [
        Row(strategy, ratio, in_context)
        for in_context in ([False, True] if options.in_context else [False])
        for strategy in options.strategy
        if strategy in OURS or not in_context
        for ratio in ([0.0] if strategy in RATIOLESS else options.ratio)
    ]
    if options.set == "musique":
        questions = musique(options.data, options.docs, options.words)
    else:
        questions = {"reference": reference, "faq": faq}[options.set](options.docs, options.words)
    others = [*questions[: options.skip], *questions[options.skip + options.limit :]]
    questions = questions[options.skip : options.skip + options.limit]
    tokens: list[float] = []
    if options.resume:
        tokens = resumed(memory, json.loads(options.out.read_text()), rows)
    else:
        memory.delete_all()  # what an earlier run learned
        if options.learn:
            memory.learn([f"Passage: {text}\n\n" for question in others for text in question.documents])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    once = [Row("rotate", 0.0), Row("query", 0.1)]  # what is learned once a model
    measure(memory, questions[0], once, peaks=False)
    for number, question in enumerate(questions[len(tokens) :], len(tokens) + 1):
        tokens.append(measure(memory, question, rows, peaks=options.memory))
        result = describe(memory, options, tokens, rows)
        options.out.write_text(json.dumps(result, indent=1) + "\n")  # what is measured is kept, whatever comes
        print(f"question {number} of {len(questions)}: {tokens[-1]} tokens", file=sys.stderr)
    plot([result], options.out.with_suffix(".png"))
    print(markdown(result))
    print("written:", options.out, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
