"""`kvcag scheduler`: shows the decisions of a CacheScheduler."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from kvcag.cli import common
from kvcag.cli.common import Json


def scheduler(
    path: Annotated[Path, typer.Argument(help="The state file of a CacheScheduler: its argument `state`.")],
    text: Annotated[str | None, typer.Argument(help="A text, or the id of its cache. Default: all texts.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most this many texts, with the latest decisions.")] = 50,
    as_json: Json = False,
) -> None:
    """Show a CacheScheduler's last decision about each text, or explain why one text is or is not cached.

    The scheduler may be running. With --json, each text is one line, the oldest decision first. Exits with 1 if the
    text is unknown. For example:

        kvcag scheduler scheduler.sqlite "The library opens at nine on weekdays."

        kvcag scheduler scheduler.sqlite --limit 1000 --json | jq 'select(.action == "demoted")'
    """
    from kvcag.scheduler import read_texts

    texts = read_texts(path)
    if text is not None:
        texts = [each for each in texts if text.strip() in (each.id, each.text.strip())]
    rows: list[tuple[object, ...]] = []
    for each in texts[-limit:]:
        if as_json:
            common.emit(asdict(each), indent=None)
        when = f"{datetime.fromtimestamp(each.at):%m-%d %H:%M:%S}" if each.at else ""
        shown = " ".join(each.text.split())[:60]
        rows.append((when, each.action, each.count, each.tokens, each.reason, shown))
    if text is not None and not as_json:
        common.stdout().print(str(texts[0]) if texts else "not known: it was never retrieved, asked or encoded")
    elif not as_json:
        common.stdout().print(common.table(["when", "action", ">uses", ">tokens", "reason", "text"], rows))
    if not as_json:
        common.then(f"scheduler{common.paths([str(path)])}{'' if text else ' TEXT'}")
    if text is not None and not texts:
        raise typer.Exit(common.NEGATIVE)
