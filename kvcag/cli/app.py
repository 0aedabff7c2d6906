"""The command line's commands and options; what they do is elsewhere, and imported when it is asked for."""

from __future__ import annotations

from typing import Annotated

import typer

import kvcag
from kvcag.cli.demo import demo
from kvcag.cli.doctor import doctor
from kvcag.cli.store import import_memos, verify

app = typer.Typer(
    name="kvcag",
    help="Encode documents once into KV caches, and answer from them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvcag {kvcag.__version__}")
        raise typer.Exit


app.command()(demo)
app.command()(doctor)
app.command()(verify)
app.command("import-memos")(import_memos)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of `kvcag` itself."""
