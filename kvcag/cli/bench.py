"""`kvcag bench`: measures the time to first token with and without caches."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kvcag
from kvcag.cli import common
from kvcag.cli.common import INSTRUCTION, CorpusOption, Json, Model, Ratio
from kvcag.errors import InvalidInputError

if TYPE_CHECKING:
    from kvcag.core import MergedContext
    from kvcag.engines.hf import HFEngine

_QUESTION = "Which of the statements described above transfers control, and what happens to the local variables then?"
_DOCUMENTS = 4
"""The number of documents in a merged context."""

_WAYS = {"full_s": "full prefill", "memory_s": "cached", "disk_s": "from disk", "merged_s": "merged"}
_REPORT = (
    "Run benchmarks/report.py of a checkout instead, which also measures other libraries. Can be combined with "
    "--model, --tokens and --repeat. Takes 40 minutes on two cores without --tokens."
)


def bench(
    ctx: typer.Context,
    model: Model = None,
    corpus: CorpusOption = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--tokens", min=32, help="Measure contexts of this many tokens; repeatable. Default: 512, 1024, 2048."
        ),
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(min=1, help="Take medians of this many rounds. Default: 3, or 5 with --report.")
    ] = None,
    ratio: Ratio = 0.2,
    report: Annotated[bool, typer.Option("--report", help=_REPORT)] = False,
    as_json: Json = False,
) -> None:
    """Measure the time to first token with and without caches, for contexts of several lengths.

    The columns are: full prefill: the model encodes the whole context. cached: the context's cache is in memory. from
    disk: the cache is in a store on disk. merged: the caches of four documents are merged, and the share --ratio of
    their tokens is recomputed.

    For example:

        kvcag bench

        kvcag bench --model Qwen/Qwen3-0.6B --tokens 1024 --tokens 4096 --json > bench.json
    """
    if report:
        sources = [ctx.get_parameter_source(name) for name in ("corpus", "ratio", "as_json")]
        if any(source and source.name != "DEFAULT" for source in sources):
            raise InvalidInputError(
                "--report takes --model, --tokens and --repeat only: its corpus and ratios are fixed, and it writes "
                "files. Leave the other options out."
            )
        raise typer.Exit(_run_report(model, tokens, repeat))
    from kvcag.cli.files import read_corpus

    texts = [document.text for document in read_corpus(corpus)]
    engine = common.load_engine(model, prefix_cache_bytes=0)
    lengths, rounds = tokens or [512, 1024, 2048], repeat or 3
    for length in lengths:
        engine.check_fits(length + 256, 1)
    rows = []
    with common.progress("measuring", len(lengths), "lengths") as advance:
        for length in lengths:
            advance(0, f"{length:,} tokens")
            rows.append(_measure(engine, texts, length, rounds, ratio))
            advance(1)
    if as_json:
        common.emit({"machine": _machine(engine), "repeat": rounds, "ratio": ratio, "rows": rows})
        return
    headings = ["context", *_WAYS.values(), "speed-up, cached", "speed-up, merged"]
    cells = [
        [
            f"{row['context_tokens']:,}",
            *(f"{row[name]:.3f}" for name in _WAYS),
            *(f"{row['full_s'] / row[name]:.1f}×" for name in ("memory_s", "merged_s")),
        ]
        for row in rows
    ]
    common.stdout().print(common.table([f">{heading}" for heading in headings], cells))
    machine = ", ".join(map(str, _machine(engine).values()))
    common.stdout().print(f"\nseconds to the first token, medians of {rounds}; {machine}")
    common.then(f"doctor{common.paths(corpus, '--corpus')}")


def _measure(engine: HFEngine, texts: Sequence[str], tokens: int, repeat: int, ratio: float) -> dict[str, Any]:
    """Return the medians in seconds for a context of about `tokens` tokens."""
    from kvcag.engines.base import Sampling
    from kvcag.memory import KVCacheMemory, insert_documents

    documents = [f"{text}\n\n" for text in _documents(engine, texts, tokens)]
    messages = insert_documents(INSTRUCTION, ["".join(documents)], [{"role": "user", "content": _QUESTION}])
    prompt = engine.template.prompt(messages)
    memory = KVCacheMemory(engine, instruction=INSTRUCTION)
    ids = memory.add(documents)

    def first(context: MergedContext | None) -> None:
        stream = engine.stream(prompt if context is None else engine.build_prompt(None, context), Sampling(), context)
        next(stream)
        stream.close()

    with tempfile.TemporaryDirectory() as folder:
        disk = KVCacheMemory(engine, folder, INSTRUCTION)
        whole = memory.extract("".join(documents))  # one document after its instruction: exact without a merge
        disk.add(whole)
        seconds = _medians(
            repeat,
            {
                "full_s": lambda: first(None),
                "memory_s": lambda: first(memory.merge(whole, _QUESTION, "rotate")),
                "disk_s": lambda: first(disk.merge(whole.id, _QUESTION, "rotate")),
                "merged_s": lambda: first(memory.merge(ids, _QUESTION, "query", ratio)),
            },
        )
    return {"context_tokens": len(prompt.context_ids), "tail_tokens": len(prompt.tail_ids), **seconds}


def _medians(repeat: int, ways: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Time all ways in turn, so that other load affects them equally. The first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeat + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    return {name: round(statistics.median(taken[1:]), 4) for name, taken in times.items()}


def _documents(engine: HFEngine, texts: Sequence[str], tokens: int) -> list[str]:
    """Return four texts that have about `tokens` tokens together."""
    ids = list(engine.template.encode("\n\n".join(texts)))
    ids = (ids * (1 + tokens // max(1, len(ids))))[:tokens]
    step = -(-len(ids) // _DOCUMENTS)
    return [str(engine.tokenizer.decode(ids[start : start + step])) for start in range(0, len(ids), step)]


def _machine(engine: HFEngine) -> dict[str, Any]:
    """Return the model, the machine and the versions that the figures belong to."""
    import torch
    import transformers

    return {
        "model": Path(engine.model_name).name,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "device": str(engine.device),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": f"torch {torch.__version__}",
        "transformers": f"transformers {transformers.__version__}",
        "kvcag": f"kvcag {kvcag.__version__}",
    }


def _run_report(model: str | None, tokens: list[int] | None, repeat: int | None) -> int:
    """Run benchmarks/report.py of the working directory or of kvcag's checkout, and return its exit code.

    Raises:
        InvalidInputError: there is no such script.
    """
    scripts = [root / "benchmarks" / "report.py" for root in (Path.cwd(), Path(kvcag.__file__).resolve().parents[1])]
    script = next(filter(Path.is_file, scripts), None)
    if script is None:
        raise InvalidInputError(
            "--report needs a checkout of the repository, with benchmarks/report.py. Run the command there, or leave "
            "--report out."
        )
    arguments = [*(["--model", model] if model else []), *(["--repeat", str(repeat)] if repeat else [])]
    arguments += ["--context", *map(str, tokens)] if tokens else []  # without, the script has its own lengths
    return subprocess.call([sys.executable, str(script), *arguments])
