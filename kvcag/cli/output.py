"""Printing: results on stdout, progress on stderr."""

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
"""Columns of a table that goes to a pipe or a file, so that paths are not cut."""


class _Console(Console):
    """A console that raises BrokenPipeError, which `Commands` handles."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def stdout() -> Console:
    """Return a console for results. It prints text as it is, with colours only on a terminal."""
    return _console(stderr=False)


def stderr() -> Console:
    """Return a console for progress and remarks."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPED_WIDTH
    return _Console(stderr=stderr, markup=False, highlight=False, width=width)


def emit(value: object, *, indent: int | None = 2) -> None:
    """Print one JSON document on stdout; with `indent=None` on one line."""
    sys.stdout.write(json.dumps(value, indent=indent, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def emit_line(value: object) -> None:
    """Print one JSON document on one line of stdout."""
    emit(value, indent=None)


def table(columns: Mapping[str, str], rows: Sequence[Sequence[object]]) -> Table:
    """Return a table without borders.

    Args:
        columns: heading → `"left"` or `"right"`.
        rows: the cells, shown with `str`; None is an empty cell.
    """
    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in columns.items():
        made.add_column(heading, justify="right" if justify == "right" else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        made.add_row(*("" if cell is None else str(cell) for cell in row))
    return made


@contextmanager
def progress(doing: str, total: int, unit: str) -> Iterator[Any]:
    """Show a progress bar on stderr if that is a terminal. Yields `advance(amount, next_item)`."""
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

        def advance(amount: int = 0, next_item: str = "") -> None:
            bar.update(task, advance=amount, description=f"{doing} {next_item[-32:]:<32}")

        yield advance


def size(count: int) -> str:
    """Return bytes as text, in powers of 1000."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def age(timestamp: float) -> str:
    """Return the time since `timestamp` (seconds since 1970) in its largest unit."""
    seconds = max(0.0, time.time() - timestamp)
    for unit, length in (("w", 604_800), ("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def counted(count: int, noun: str) -> str:
    """Return `1 item`, `2 items`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
