"""The command line's commands; what they do is elsewhere, and imported when it is asked for."""

from __future__ import annotations

import os
from typing import Annotated

import typer

import kvcag
from kvcag.cli.ask import ask
from kvcag.cli.bench import bench
from kvcag.cli.chat import chat
from kvcag.cli.demo import demo
from kvcag.cli.doctor import doctor
from kvcag.cli.encode import encode, sync
from kvcag.cli.group import DEBUG, Commands
from kvcag.cli.items import inspect, ls, rm
from kvcag.cli.scheduler import scheduler
from kvcag.cli.size import size
from kvcag.cli.store import import_memos, verify

app = typer.Typer(
    name="kvcag",
    cls=Commands,
    help="Encode documents once into KV caches, and answer from them.",
    epilog="Exit codes: 0 done, 1 the answer is no, 2 the arguments cannot work, 3 it failed, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(encode)
app.command()(ask)
app.command()(chat)
app.command()(ls)
app.command()(inspect)
app.command()(rm)
app.command()(sync)
app.command()(verify)
app.command()(doctor)
app.command()(size)
app.command()(bench)
app.command("import-memos")(import_memos)
app.add_typer(scheduler, name="scheduler")


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
