"""What is printed where: results on stdout, everything that happens on the way on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_PIPED_WIDTH = 240
"""Columns where no terminal says how many it has: a path that is cut is no use to the next program."""


class _Console(Console):
    """A console that leaves a closed pipe to whoever runs the command."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def stdout() -> Console:
    """For results. Text is shown as it is, and colours only on a terminal."""
    return _console(stderr=False)


def stderr() -> Console:
    """For what happens on the way."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPED_WIDTH
    return _Console(stderr=stderr, markup=False, highlight=False, width=width)


def emit(value: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def emit_line(value: object) -> None:
    """One JSON document on a line of its own, for a stream of them."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def table(columns: Mapping[str, str], rows: Sequence[Sequence[object]]) -> Table:
    """A plain table.

    Args:
        columns: heading → `"left"` or `"right"`.
        rows: shown with `str`; None is empty.
    """
    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in columns.items():
        made.add_column(heading, justify="right" if justify == "right" else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        made.add_row(*("" if cell is None else str(cell) for cell in row))
    return made


@contextmanager
def progress(doing: str, total: int, unit: str) -> Iterator[Any]:
    """A bar on stderr where that is a terminal; gives a function that takes what is done and what comes next."""
    console = stderr()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=total)

        def advance(amount: int = 0, following: str = "") -> None:
            bar.update(task, advance=amount, description=f"{doing} {following[-32:]:<32}")

        yield advance


def size(count: int) -> str:
    """Bytes for people, in powers of ten as `ls -h --si` and disks have it."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def age(timestamp: float) -> str:
    """How long ago a moment was, in its largest unit."""
    seconds = max(0.0, time.time() - timestamp)
    for unit, length in (("w", 604_800), ("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def counted(count: int, noun: str) -> str:
    """`1 item`, `2 items`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
