"""`kvcag demo`: answers without caches and with them, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvcag.cli import common
from kvcag.cli.common import CorpusOption, Json, Model, Ratio, StrategyOption

if TYPE_CHECKING:
    from kvcag.demo.run import Comparison


def demo(
    model: Model = None,
    corpus: CorpusOption = None,
    question: Annotated[list[str] | None, typer.Option("--question", help="Ask this question; repeatable.")] = None,
    strategy: StrategyOption = "exact",
    ratio: Ratio = 0.2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate at most this many tokens.")] = 48,
    as_json: Json = False,
) -> None:
    """Encode a corpus once, then answer questions without caches and with them, side by side.

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
        from kvcag.demo.run import Demonstration

        shown = Demonstration(folder, documents, strategy=strategy, ratio=ratio, max_new_tokens=max_new_tokens)
    shown.check(questions)
    started = time.perf_counter()
    with common.progress("encoding", shown.corpus_tokens, "tokens") as advance:
        for document, tokens in zip(documents, shown.encode(), strict=True):
            advance(tokens, document.title)
    encode_s = time.perf_counter() - started
    console.print(
        f"{len(documents)} documents, {shown.corpus_tokens} tokens encoded once in {encode_s:.1f} s; "
        f"the caches take {common.size(shown.cache_bytes)}"
    )
    answered = []
    for number, asked in enumerate(questions, start=1):
        console.print(Text(f"\n{number}. {asked}", style="bold"))
        answered.append(shown.ask(asked, _printer(console, "full prefill"), _printer(console, "from caches")))
        console.print()
    console.print("\ntime to first token, and the tokens of the context\n")
    console.print(_table(answered))
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


def _printer(console: Console, label: str) -> Callable[[str], None]:
    """Return a function that prints an answer piece by piece, after a label."""
    started = False

    def show(text: str) -> None:
        nonlocal started
        text = text if started else text.lstrip()
        if text and not started:
            started = True
            console.print(Text(f"\n{label}: ", style="dim"), end="")
        console.print(Text(text.replace("\n", " ")), end="", soft_wrap=True)

    return show


def _table(answered: Sequence[Comparison]) -> Table:
    columns = ["question", ">full", ">cached", ">speed-up", ">encoded", ">reused", ">recomputed", ">same"]
    rows = []
    for number, row in enumerate(answered, start=1):
        times = f"{row.ttft_full_s:.2f} s", f"{row.ttft_cached_s:.2f} s", f"{row.speedup:.1f}×"
        tokens = row.encoded_tokens, row.reused_tokens, row.recomputed_tokens
        rows.append((f"{number}. {row.question[:40]}", *times, *tokens, "yes" if row.same_answer else "no"))
    return common.table(columns, rows)
