"""The `kvcag` command. Importing this package needs no extra; running the command does."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command. `kvcag.cli.common` lists the exit codes."""
    try:
        from kvcag.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("platformdirs", "rich", "typer"):
            raise
        print("The kvcag command needs an optional dependency: pip install 'kvcag[cli]'", file=sys.stderr)  # noqa: T201
        sys.exit(3)
    app(prog_name="kvcag")
