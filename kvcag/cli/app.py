"""All commands of the command line. A command imports torch only when it runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

import kvcag
from kvcag.cli.answer import ask, chat
from kvcag.cli.bench import bench
from kvcag.cli.common import DEBUG, Command, Commands
from kvcag.cli.demo import demo
from kvcag.cli.doctor import doctor
from kvcag.cli.encode import encode, sync
from kvcag.cli.scheduler import scheduler
from kvcag.cli.size import size
from kvcag.cli.store import import_memos, inspect, ls, purge, rm, verify

app = typer.Typer(
    name="kvcag",
    cls=Commands,
    epilog="Exit codes: 0 done; 1 an item is damaged, missing or of another model, or you did not confirm; 2 wrong "
    "arguments; 3 failed; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (demo, encode, ask, chat, ls, inspect, rm, purge, sync, verify, doctor, size, bench, scheduler):
    app.command(cls=Command)(_command)
app.command("import-memos", cls=Command)(import_memos)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvcag {kvcag.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar=DEBUG, help="Show the traceback of an error.")] = False,
) -> None:
    """Encode documents once into KV caches, and answer from them."""
    if debug:
        os.environ[DEBUG] = "1"
