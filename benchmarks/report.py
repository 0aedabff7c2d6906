"""Compares kvcag with other systems in one run, in turns, and writes a report with tables and plots.

    make bench                                   # this, and the profile (benchmarks/profiling.py) after it
    python benchmarks/report.py [--context 128 512 1024 2048 4096 8000] [--repeat 5] [--out benchmarks/results/report]

For each length of context, each system (benchmarks/peers/) gets eight documents and reads them in advance if it can.
Then each of the `--repeat` questions goes to every system before the next question, so that other load on the machine
affects all systems in the same way. Answers are greedy with 32 tokens; end-of-sequence tokens are ignored. Figures are
medians; agreement is the mean share of an answer's tokens before the first difference from the full prefill's answer.

Writes report.json, report.md and plots to `--out`, and the plots to docs/img/ for docs/benchmarks.md.
If a run is interrupted, the measured lengths are saved; with `--add` the next run continues.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from geometry import documents_of, endless
from measuring import Ceilings, Work, machine, seconds
from peers import compressing
from peers.base import TOKENS, Answer, Peer, context_ids, prompt_ids
from peers.frameworks import LangChain, LlamaIndex
from peers.memos import MemOS, Mended
from peers.ours import Exact, Merged
from peers.plain import Deepcopied, FullPrefill, NoContext
from report_plots import plots
from report_tables import markdown

from kvcag import HFEngine
from kvcag.cache.layers import cache_argument, generation_cache
from kvcag.demo.model import embedded_model

ROOT = Path(__file__).parents[1]
DOCUMENTS = 8
QUESTIONS = [
    "Which of the statements described above transfers control, and what happens to the local variables then?",
    "What does the text say about lists, and what does an empty one yield?",
    "Summarize what is said about loops, step by step.",
    "Which exceptions are mentioned above, and when is each of them raised?",
    "Explain the difference between two of the statements described above.",
]
REFERENCE, NOTHING_READ = FullPrefill.name, NoContext.name


def peers_of(engine: HFEngine, worker: compressing.Worker | None) -> list[Peer]:
    made: list[Peer] = [
        FullPrefill(engine),
        NoContext(engine),
        Deepcopied(engine),
        LangChain(engine),
        LlamaIndex(engine),
        MemOS(engine),
        Mended(engine),
        Exact(engine),
        Merged(engine, "rotate"),
        Merged(engine, "query", 0.1),
        Merged(engine, "query", 0.2),
    ]
    if worker is not None:
        made += [compressing.KVPress(engine, worker, 0.0), compressing.KVPress(engine, worker, 0.5)]
    return made


def measure(engine: HFEngine, peers: Sequence[Peer], tokens: int, repeat: int, ceilings: Ceilings) -> dict[str, Any]:
    """One row of the report: everything over contexts of about `tokens` tokens."""
    documents = documents_of(engine, tokens, DOCUMENTS)
    context = context_ids(engine, documents)
    systems: dict[str, dict[str, Any]] = {peer.name: {} for peer in peers}
    asked: dict[str, list[Answer]] = {peer.name: [] for peer in peers}
    for peer in peers:
        prepared = seconds(engine.device, partial(peer.prepare, documents))
        systems[peer.name] |= {"prepare_s": prepared, "bytes_held": peer.bytes_held}
    bare = []
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(repeat)]
    for turn, question in enumerate(questions):
        for peer in [*peers[turn % len(peers) :], *peers[: turn % len(peers)]]:
            if "failed" not in systems[peer.name]:
                ask(peer, question, systems[peer.name], asked[peer.name])
        bare.append(bare_pass(engine, context, question))
        print(f"  {len(context)} tokens, question {turn + 1} of {repeat}", file=sys.stderr, flush=True)
    question_tokens = statistics.median(len(prompt_ids(engine, context, q)[0]) - len(context) for q in questions)
    for peer in peers:
        systems[peer.name] |= summary(engine, asked[peer.name], asked[REFERENCE], asked[NOTHING_READ])
    return {
        "context_tokens": len(context),
        "question_tokens": question_tokens,
        "repeat": repeat,
        "bare_s": statistics.median(bare),
        "floors": floors(engine, len(context), int(question_tokens), ceilings),
        "ceilings": asdict(ceilings),
        "machine": machine(engine.device),
        "systems": systems,
    }


def ask(peer: Peer, question: str, system: dict[str, Any], answers: list[Answer]) -> None:
    try:
        answers.append(peer.ask(question))
    except Exception as error:  # reported in the system's place; the others go on
        traceback.print_exc()
        system["failed"] = f"{type(error).__name__}: {error}"


@torch.no_grad()
def bare_pass(engine: HFEngine, context: tuple[int, ...], question: str) -> float:
    """Seconds of the model's own forward pass over the question and a cache that is ready."""
    layers, _ = engine.prefill(context, namespace=Exact.name)
    tail = prompt_ids(engine, context, question)[:, len(context) :]
    cache = generation_cache([layers], room=tail.shape[1])
    return seconds(
        engine.device,
        lambda: engine.model(tail, **cache_argument(engine.model, cache), use_cache=True, logits_to_keep=1),
    )


def floors(engine: HFEngine, context: int, question: int, ceilings: Ceilings) -> dict[str, float]:
    work = partial(Work.of, engine.model)
    step = work(1, context + question + TOKENS // 2).floor(ceilings)
    full, exact = work(context + question, 0).floor(ceilings), work(question, context).floor(ceilings)
    tenth = work(question + context // 10, context).floor(ceilings)
    return {"full_s": full, "exact_s": exact, "query_10_s": tenth, "step_s": step}


def summary(
    engine: HFEngine, answers: list[Answer], reference: list[Answer], nothing_read: list[Answer]
) -> dict[str, Any]:
    if not answers:
        return {}
    agrees = [agreement(engine, *pair) for pair in zip(reference, answers, strict=False)]
    unread = [agreement(engine, *pair) for pair in zip(nothing_read, answers, strict=False)]
    return {
        "ttft_s": statistics.median(answer.ttft_s for answer in answers),
        "total_s": statistics.median(answer.total_s for answer in answers),
        "agreement": statistics.mean(agrees),
        "agreement_without_documents": statistics.mean(unread),
        "answers": [asdict(answer) for answer in answers],
    }


def agreement(engine: HFEngine, expected: Answer, found: Answer) -> float:
    left, right = (engine.template.encode(answer.text.strip()) for answer in (expected, found))
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
    return same / max(len(left), len(right), 1)


def warm(peers: Sequence[Peer]) -> None:
    for peer in peers:
        peer.prepare(["A few words.\n\n", "And a few more.\n\n"])
        peer.ask("What?")


def kept(path: Path, key: dict[str, Any]) -> dict[str, Any]:
    """The report that stands there, if it is of the same model; its other rows stay."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if {name: found.get(name) for name in key} == key else {**key, "rows": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096, 8000])
    parser.add_argument("--repeat", type=int, default=5, help="questions for each length")
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "report")
    parser.add_argument(
        "--add", action="store_true", help="keep the lengths that report.json has and that are not asked"
    )
    parser.add_argument("--only-write", action="store_true", help="measure nothing: tables and plots of report.json")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "report.json"
    model = given.model or str(embedded_model())
    about = {"model": Path(model).name, "dtype": given.dtype, "answer_tokens": TOKENS}
    result = kept(path, about) if given.add or given.only_write else {**about, "rows": []}
    if not given.only_write:
        run(result, model, given, path)
    (given.out / "report.md").write_text(markdown(result))
    for plot in plots(result, given.out):
        if given.out.resolve().is_relative_to(ROOT):
            shutil.copy(plot, ROOT / "docs" / "img" / f"bench-{plot.name}")
    print((given.out / "report.md").read_text())


def run(result: dict[str, Any], model: str, given: argparse.Namespace, path: Path) -> None:
    engine = endless(HFEngine.from_pretrained(model, dtype=given.dtype))
    worker = compressing.Worker(engine, torch.get_num_threads()) if compressing.PYTHON.exists() else None
    result["left_out"] = [] if worker else ["kvpress: its environment is not there; `make bench` makes it"]
    result["kvpress"] = worker.versions if worker else None
    peers = peers_of(engine, worker)
    ceilings = Ceilings.of(engine.device, engine.model.dtype)
    warm(peers)
    for tokens in given.context:
        started = time.perf_counter()
        row = measure(engine, peers, tokens, given.repeat, ceilings) | {"asked_tokens": tokens}
        others = [other for other in result["rows"] if other["asked_tokens"] != tokens]
        result["rows"] = sorted([*others, row], key=lambda row: row["context_tokens"])
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"{tokens} tokens: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if worker:
        worker.close()


if __name__ == "__main__":
    main()
