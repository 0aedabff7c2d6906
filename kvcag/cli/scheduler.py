"""`kvcag scheduler log` and `kvcag scheduler why`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from kvcag.cli.group import NEGATIVE
from kvcag.cli.output import emit, emit_line, stdout, table

scheduler = typer.Typer(help="Show what a CacheScheduler decided, and why.", no_args_is_help=True)

_Path = Annotated[Path, typer.Argument(help="The file that CacheScheduler has as state=.")]


@scheduler.command()
def log(
    path: _Path,
    limit: Annotated[int, typer.Option(min=1, help="Show so many texts, those with the latest decisions.")] = 50,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object per line, the oldest first.")] = False,
) -> None:
    """Show the last decision about each text, and why; the oldest first. The scheduler may be running.

    For example:

        kvcag scheduler log scheduler.sqlite --limit 1000 --json | jq 'select(.action == "demoted")'
    """
    from kvcag.scheduler import read_texts

    texts = read_texts(path)[-limit:]
    if json:
        for stats in texts:
            emit_line(asdict(stats))
        return
    columns = {"when": "left", "action": "left", "uses": "right", "tokens": "right", "reason": "left", "text": "left"}
    rows = []
    for stats in texts:
        when = f"{datetime.fromtimestamp(stats.at):%m-%d %H:%M:%S}" if stats.at else ""
        text = " ".join(stats.text.split())[:60]
        rows.append((when, stats.action, stats.count, stats.tokens, stats.reason, text))
    stdout().print(table(columns, rows))


@scheduler.command()
def why(
    path: _Path,
    text: Annotated[str, typer.Argument(help="A text, or the id of its cache.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Explain why a text is or is not cached. Exits with 1 if the text is not known.

    For example:

        kvcag scheduler why scheduler.sqlite "The library opens at nine on weekdays."
    """
    from kvcag.scheduler import read_texts

    found = next((each for each in read_texts(path) if text.strip() in (each.id, each.text.strip())), None)
    if json:
        emit(asdict(found) if found else None)
    else:
        stdout().print(str(found) if found else "not known: it was never retrieved, asked or encoded")
    if not found:
        raise typer.Exit(NEGATIVE)
