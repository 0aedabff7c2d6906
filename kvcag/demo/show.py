"""What the demonstration prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kvcag.demo.run import Comparison, Demonstration


def run(
    demonstration: Demonstration, name: str, titles: Sequence[str], questions: Sequence[str], console: Console
) -> dict[str, Any]:
    """Encode, ask, and print; the figures, times in seconds and `cache_bytes` in bytes."""
    encode_s = encode(demonstration, titles, console)
    console.print(
        f"{len(titles)} documents, {demonstration.corpus_tokens} tokens encoded once in {encode_s:.1f} s; "
        f"the caches take {demonstration.cache_bytes / 2**20:.0f} MiB"
    )
    answered = [ask(demonstration, question, number, console) for number, question in enumerate(questions, start=1)]
    console.print()
    console.print(table(answered))
    return {
        "model": name,
        "strategy": demonstration.strategy,
        "corpus_tokens": demonstration.corpus_tokens,
        "encode_s": encode_s,
        "cache_bytes": demonstration.cache_bytes,
        "questions": [asdict(row) for row in answered],
    }


def encode(demonstration: Demonstration, titles: Sequence[str], console: Console) -> float:
    """Encode the corpus under a progress bar; seconds it took."""
    columns = (
        TextColumn("encoding {task.description:<20.20}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
    )
    started = perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(titles[0], total=sum(demonstration.document_tokens))
        for following, tokens in zip([*titles[1:], "done"], demonstration.encode(), strict=True):
            progress.update(task, advance=tokens, description=following)
    return perf_counter() - started


def ask(demonstration: Demonstration, question: str, number: int, console: Console) -> Comparison:
    """Answer a question twice, each answer printed as it is generated."""
    console.print(Text(f"\n{number}. {question}", style="bold"))
    printers = [_Printer(console, label) for label in ("full prefill", "from caches")]
    answered = demonstration.ask(question, printers[0].show, printers[1].show)
    console.print()
    return answered


def table(answered: Sequence[Comparison]) -> Table:
    """The figures of every question, side by side."""
    table = Table(box=box.SIMPLE, expand=True, title="time to first token, and the tokens of the context")
    table.add_column("question", no_wrap=True, overflow="ellipsis", ratio=1)
    for heading in ("full", "cached", "sooner", "encoded", "reused", "recomputed", "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, row in enumerate(answered, start=1):
        table.add_row(
            Text(f"{number}. {row.question}"),
            f"{row.ttft_full_s:.2f} s",
            f"{row.ttft_cached_s:.2f} s",
            f"{row.speedup:.1f}×",
            str(row.encoded_tokens),
            str(row.reused_tokens),
            str(row.recomputed_tokens),
            "yes" if row.same_answer else "no",
        )
    return table


class _Printer:
    """Prints an answer piece by piece, after a label that waits for the first piece."""

    def __init__(self, console: Console, label: str) -> None:
        self.console = console
        self.label = label
        self.started = False

    def show(self, text: str) -> None:
        if not self.started:
            text = text.lstrip()
        if text:
            if not self.started:
                self.console.print(Text(f"\n{self.label}: ", style="dim"), end="")
                self.started = True
            self.console.print(Text(text.replace("\n", " ")), end="", soft_wrap=True)
