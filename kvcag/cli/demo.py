"""`kvcag demo`: a race between a model with a full prefill and the same model with caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvcag.cli import common
from kvcag.cli.common import CorpusOption, Json, Model, Ratio, StrategyOption

if TYPE_CHECKING:
    from kvcag.core import Chunk
    from kvcag.demo.run import Comparison, OnPiece, Runner

_SIDES = "reads everything", "from the cache"
_TWO_COLUMNS = 80
"""The minimum width of a terminal, in columns, that shows both answers side by side."""


def demo(
    model: Model = None,
    corpus: CorpusOption = None,
    question: Annotated[
        list[str] | None,
        typer.Option("--question", help="Ask this question; repeatable. Default: questions that suit the corpus."),
    ] = None,
    strategy: StrategyOption = "exact",
    ratio: Ratio = 0.2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate at most this many tokens.")] = 48,
    as_json: Json = False,
) -> None:
    """Race a model that reads all documents per question against the same model with caches.

    The command encodes a corpus once. Then both sides answer each question with the same tokens and decoding, one after
    the other, so that neither slows the other down. A terminal of at least 80 columns shows both side by side.

    For example:

        kvcag demo

        kvcag demo --corpus notes/ --question "Who is responsible for backups?" --json > figures.json

        kvcag demo --strategy query --ratio 0.2
    """
    from kvcag.cli.files import read_corpus
    from kvcag.demo.corpus import DEFAULT_QUESTIONS, GENERAL_QUESTIONS

    documents = read_corpus(corpus)
    questions = question or list(GENERAL_QUESTIONS if corpus else DEFAULT_QUESTIONS)
    name, folder = common.resolve(model)
    console = common.stderr() if as_json else common.stdout()
    with common.loading(name):
        from kvcag.demo.run import Demonstration, Runner

        shown = Demonstration(folder, documents, strategy=strategy, ratio=ratio, max_new_tokens=max_new_tokens)
    shown.check(questions)
    started = time.perf_counter()
    with common.progress("encoding", shown.corpus_tokens, "tokens") as advance:
        for document, tokens in zip(documents, shown.encode(), strict=True):
            advance(tokens, document.title)
    encode_s = time.perf_counter() - started
    console.print(
        f"{common.counted(len(documents), 'document')}, {shown.corpus_tokens:,} tokens, encoded once in "
        f"{encode_s:.1f} s; the caches take {common.size(shown.cache_bytes)}.\n"
        "One side answers, then the other: the same model, tokens and greedy decoding."
    )
    answered = []
    for number, asked in enumerate(questions, start=1):
        console.print(Text(f"\n{number}. {asked}\n", style="bold"))
        full, cached = map(Runner, _SIDES)
        with _watched(console, (full, cached)) as on_piece:
            answered.append(shown.ask(asked, full, cached, on_piece))
        console.print(_verdict(answered[-1]))
    if len(answered) > 1:
        same = sum(row.same_answer for row in answered)
        median = statistics.median(row.speedup for row in answered)
        console.print(f"\n{len(answered)} questions: {common.faster(median, 1)} (median); {same} answers the same")
    if as_json:
        common.emit(
            {
                "model": name,
                "strategy": strategy,
                "corpus_tokens": shown.corpus_tokens,
                "encode_s": encode_s,
                "cache_bytes": shown.cache_bytes,
                "questions": [asdict(row) for row in answered],
            }
        )
    else:
        common.then(f'ask{common.paths(corpus or ["PATH"])} "Your question?"')


def _verdict(row: Comparison) -> str:
    first = f"{row.ttft_cached_s:.2f} s to the first word instead of {row.ttft_full_s:.2f} s"
    reused = f"{row.reused_tokens:,} of {row.context_tokens:,} tokens reused"
    recomputed = f", {row.recomputed_tokens:,} recomputed" if row.recomputed_tokens else ""
    same = "the same answer" if row.same_answer else "another answer"
    return f"{first}: {common.faster(row.ttft_full_s, row.ttft_cached_s)}; {reused}{recomputed}; {same}"


@contextmanager
def _watched(console: Console, sides: Sequence[Runner]) -> Iterator[OnPiece]:
    """Show both answers: side by side with running clocks if the terminal can, otherwise one after the other."""
    if console.is_terminal and not console.no_color and not console.is_dumb_terminal and console.width >= _TWO_COLUMNS:
        with Live(_Race(sides), console=console, refresh_per_second=10):
            yield lambda side, chunk: None
        return
    flows: dict[str, common.Flow] = {}

    def write(side: Runner, chunk: Chunk) -> None:
        if side.name not in flows:
            flows[side.name] = common.Flow(err=console.stderr)
            console.print(Text(f"{side.name}:", style="bold"))
        flows[side.name].write(chunk.text)
        if chunk.finish_reason:
            flows[side.name].end()
            console.print(Text(f"{_clock(side)}\n", style="dim"))

    yield write


@dataclass(frozen=True, slots=True)
class _Race:
    """A table of both answers, side by side. Each time it is drawn, it reads the clocks again."""

    sides: Sequence[Runner]

    def __rich_console__(self, *_: Any) -> Iterator[Table]:
        grid = Table.grid(expand=True, padding=(0, 4, 1, 0))
        for _side in self.sides:
            grid.add_column(ratio=1)
        grid.add_row(*(Text.assemble((side.name, "bold"), f"\n{_clock(side)}") for side in self.sides))
        grid.add_row(*(Text(common.plain(side.text.strip())) for side in self.sides))
        yield grid


def _clock(side: Runner) -> str:
    if side.first_s is None:
        return f"{side.clock_s:.1f} s" if side.clock_s else "waits for its turn"
    ended = f"all {side.total_s:.2f} s" if side.total_s is not None else f"{side.clock_s:.1f} s"
    return f"first word {side.first_s:.2f} s, {ended}"
