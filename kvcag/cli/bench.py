"""`kvcag bench`: time to first token with caches and without, on this machine and with this model."""

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
from kvcag.cli import output
from kvcag.cli.demo import CorpusOption
from kvcag.cli.options import INSTRUCTION, Json, Model, Ratio
from kvcag.errors import InvalidInputError

if TYPE_CHECKING:
    from kvcag.core import MergedContext
    from kvcag.engines.hf import HFEngine

_QUESTION = "Which of the statements described above transfers control, and what happens to the local variables then?"
_DOCUMENTS = 4
"""How many documents a merged context is put together from."""

_WAYS = {
    "full_s": "full prefill",
    "memory_s": "cached",
    "disk_s": "from disk",
    "merged_s": "merged",
}


def bench(
    ctx: typer.Context,
    model: Model = None,
    corpus: CorpusOption = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", min=32, help="Context lengths; repeat. Default: 512, 1024 and 2048.")
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(min=1, help="Rounds, of which the median is shown. Default: 3, and 5 for --report.")
    ] = None,
    ratio: Ratio = 0.2,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Run a checkout's benchmarks/report.py instead: beside other libraries, with tables and plots. "
            "It takes --model, --tokens and --repeat; 40 minutes on two cores without --tokens.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time to first token over contexts of several lengths: read in full, cached, from disk, and merged.

    full prefill: the model reads the context for the question. cached: it was read before, and is in memory.
    from disk: it is in a store. merged: four documents, encoded one by one, are put together, and `--ratio` of their
    tokens recomputed.

    For example:

        kvcag bench

        kvcag bench --model Qwen/Qwen3-0.6B --tokens 1024 --tokens 4096 --json > bench.json
    """
    if report:
        sources = [ctx.get_parameter_source(name) for name in ("corpus", "ratio", "as_json")]
        if any(source and source.name != "DEFAULT" for source in sources):
            raise InvalidInputError(
                "--report takes --model, --tokens and --repeat alone: it has a corpus and ratios of its own, and "
                "writes files."
            )
        raise typer.Exit(_run_report(model, tokens, repeat))
    from kvcag.cli.loading import load_engine
    from kvcag.demo.corpus import load_corpus, python_topics

    texts = [document.text for document in (load_corpus(corpus) if corpus else python_topics())]
    engine = load_engine(model, prefix_cache_bytes=0)
    lengths, rounds = tokens or [512, 1024, 2048], repeat or 3
    for length in lengths:
        engine.check_fits(length + 256, 1)
    rows = []
    with output.progress("measuring", len(lengths), "lengths") as advance:
        for length in lengths:
            advance(0, f"{length:,} tokens")
            rows.append(_measure(engine, texts, length, rounds, ratio))
            advance(1)
    if as_json:
        output.emit({"machine": _machine(engine), "repeat": rounds, "ratio": ratio, "rows": rows})
        return
    console = output.stdout()
    headings = ["context", *_WAYS.values(), "sooner, cached", "sooner, merged"]
    console.print(output.table(dict.fromkeys(headings, "right"), [_cells(row) for row in rows]))
    console.print(
        f"\nseconds to the first token, medians of {rounds}; {', '.join(map(str, _machine(engine).values()))}"
    )


def _measure(engine: HFEngine, texts: Sequence[str], tokens: int, repeat: int, ratio: float) -> dict[str, Any]:
    """Medians, in seconds, of the four ways to a first token over about so many tokens."""
    from kvcag.chat_template import Document
    from kvcag.cli.context import exact
    from kvcag.engines.sampling import Sampling
    from kvcag.memory import KVCacheMemory
    from kvcag.stores.disk import DiskStore

    documents = _documents(engine, texts, tokens)
    system = {"role": "system", "content": [f"{INSTRUCTION}\n\n", *(Document(f"{text}\n\n") for text in documents)]}
    prompt = engine.template.prompt([system, {"role": "user", "content": _QUESTION}])
    memory = KVCacheMemory(engine, instruction=INSTRUCTION)
    items = [memory.extract(text) for text in documents]
    memory.add(items)

    def first(context: MergedContext | None) -> None:
        stream = engine.stream(prompt if context is None else engine.build_prompt(None, context), Sampling(), context)
        next(stream)
        stream.close()

    with tempfile.TemporaryDirectory() as folder:
        disk = DiskStore(folder)
        whole = engine.encode_item((), prompt.context_ids)
        disk.put(whole)
        seconds = _medians(
            repeat,
            {
                "full_s": lambda: first(None),
                "memory_s": lambda: first(exact(whole, prompt.tail_ids)),
                "disk_s": lambda: first(exact(disk.get(whole.id) or whole, prompt.tail_ids)),
                "merged_s": lambda: first(memory.merge([item.id for item in items], _QUESTION, "query", ratio)),
            },
        )
    return {"context_tokens": len(prompt.context_ids), "tail_tokens": len(prompt.tail_ids), **seconds}


def _medians(repeat: int, ways: dict[str, Callable[[], None]]) -> dict[str, float]:
    """All ways in turn, so that whatever else the machine does meets them alike; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeat + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    return {name: round(statistics.median(taken[1:]), 4) for name, taken in times.items()}


def _documents(engine: HFEngine, texts: Sequence[str], tokens: int) -> list[str]:
    """Texts that have about so many tokens together."""
    ids = list(engine.template.encode("\n\n".join(texts)))
    ids = (ids * (1 + tokens // max(1, len(ids))))[:tokens]
    step = -(-len(ids) // _DOCUMENTS)
    return [str(engine.tokenizer.decode(ids[start : start + step])) for start in range(0, len(ids), step)]


def _cells(row: dict[str, Any]) -> list[str]:
    sooner = (f"{row['full_s'] / row[name]:.1f}×" for name in ("memory_s", "merged_s"))
    return [f"{row['context_tokens']:,}", *(f"{row[name]:.3f}" for name in _WAYS), *sooner]


def _machine(engine: HFEngine) -> dict[str, Any]:
    """What the figures were taken on."""
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
    """The exit code of benchmarks/report.py, which measures what `--tokens` says, and all its lengths otherwise."""
    arguments = [*(["--model", model] if model else []), *(["--repeat", str(repeat)] if repeat else [])]
    arguments += ["--context", *map(str, tokens)] if tokens else []
    return subprocess.call([sys.executable, str(_report_script()), *arguments])


def _report_script() -> Path:
    """The report of a checkout: of the working directory, or of the one that kvcag is imported from.

    Raises:
        InvalidInputError: kvcag is installed without its repository.
    """
    for root in (Path.cwd(), Path(kvcag.__file__).resolve().parents[1]):
        script = root / "benchmarks" / "report.py"
        if script.is_file():
            return script
    raise InvalidInputError(
        "--report needs a checkout of the repository, with benchmarks/report.py. `kvcag bench` alone measures here."
    )
