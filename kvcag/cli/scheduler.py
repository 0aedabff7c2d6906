"""`kvcag scheduler log` and `kvcag scheduler show`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from kvcag.cli.output import age, emit, emit_line, size, stdout, table

scheduler = typer.Typer(help="What a CacheScheduler did, and what it keeps.", no_args_is_help=True)

_Path = Annotated[Path, typer.Argument(help="The file that CacheScheduler has as state=.")]
_Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


@scheduler.command()
def log(
    path: _Path,
    limit: Annotated[int, typer.Option(min=1, help="How many entries, the last ones.")] = 50,
    json: Annotated[bool, typer.Option("--json", help="A JSON object a line, the oldest first.")] = False,
) -> None:
    """What it did, and why; the oldest first. Works while the scheduler runs.

    For example:

        kvcag scheduler log scheduler.sqlite

        kvcag scheduler log scheduler.sqlite --limit 1000 --json | jq 'select(.action == "demoted")'
    """
    from kvcag.scheduler.log import log_of

    entries = log_of(path, limit)
    if json:
        for entry in entries:
            emit_line(asdict(entry))
        return
    columns = {"when": "left", "action": "left", "cache": "left", "tokens": "right", "size": "right", "reason": "left"}
    rows = [
        (f"{datetime.fromtimestamp(e.at):%m-%d %H:%M:%S}", e.action, _short(e.key), e.tokens, size(e.bytes), e.reason)
        for e in entries
    ]
    stdout().print(table(columns, rows))


@scheduler.command()
def show(path: _Path, json: _Json = False) -> None:
    """The caches that it keeps, and those that went back to text. Works while the scheduler runs."""
    from kvcag.scheduler.log import caches_of

    caches = caches_of(path)
    if json:
        emit([asdict(cache) for cache in caches])
        return
    columns = {"cache": "left", "kept": "left", "uses": "right", "tokens": "right", "size": "right", "text": "left"}
    rows = [
        (
            _short(cache.key),
            f"{'for' if cache.cached else 'text for'} {age(cache.since)}",
            cache.uses,
            cache.tokens,
            size(cache.bytes),
            " ".join(cache.text.split())[:60],
        )
        for cache in caches
    ]
    stdout().print(table(columns, rows))
    kept = [cache for cache in caches if cache.cached]
    stdout().print(f"{len(kept)} of {len(caches)} caches kept, {size(sum(cache.bytes for cache in kept))}")


def _short(key: str) -> str:
    return key.removeprefix("kv:sha256:")[:12]
