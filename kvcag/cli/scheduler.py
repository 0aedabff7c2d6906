"""`kvcag scheduler log` and `kvcag scheduler why`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from kvcag.cli import common
from kvcag.cli.common import Json

scheduler = typer.Typer(help="Show what a CacheScheduler decided, and why.", no_args_is_help=True)

_Path = Annotated[Path, typer.Argument(help="The file that CacheScheduler has as state=.")]


@scheduler.command()
def log(
    path: _Path,
    limit: Annotated[int, typer.Option(min=1, help="Show so many texts, those with the latest decisions.")] = 50,
    as_json: Json = False,
) -> None:
    """Show the last decision about each text, and why; the oldest first. The scheduler may be running.

    With --json, each text is one line.

    For example:

        kvcag scheduler log scheduler.sqlite --limit 1000 --json | jq 'select(.action == "demoted")'
    """
    from kvcag.scheduler import read_texts

    rows: list[tuple[object, ...]] = []
    for each in read_texts(path)[-limit:]:
        if as_json:
            common.emit(asdict(each), indent=None)
        when = f"{datetime.fromtimestamp(each.at):%m-%d %H:%M:%S}" if each.at else ""
        text = " ".join(each.text.split())[:60]
        rows.append((when, each.action, each.count, each.tokens, each.reason, text))
    if not as_json:
        common.stdout().print(common.table(["when", "action", ">uses", ">tokens", "reason", "text"], rows))


@scheduler.command()
def why(
    path: _Path,
    text: Annotated[str, typer.Argument(help="A text, or the id of its cache.")],
    as_json: Json = False,
) -> None:
    """Explain why a text is or is not cached. Exits with 1 if the text is not known.

    For example:

        kvcag scheduler why scheduler.sqlite "The library opens at nine on weekdays."
    """
    from kvcag.scheduler import read_texts

    found = next((each for each in read_texts(path) if text.strip() in (each.id, each.text.strip())), None)
    if as_json:
        common.emit(asdict(found) if found else None)
    else:
        common.stdout().print(str(found) if found else "not known: it was never retrieved, asked or encoded")
    if not found:
        raise typer.Exit(common.NEGATIVE)
