"""The `kvcag` command. Importing this needs no extra; running the command does."""

from __future__ import annotations

import sys

_EXTRA = ("platformdirs", "rich", "typer")


def main() -> None:
    """Run the command.

    Exit codes: 0 done; 1 the answer is no (damaged, missing, of another model, not confirmed); 2 the arguments cannot
    work; 3 it could not be done here and now (disk, network, an extra that is missing); 130 interrupted; 141 whoever
    read stdout closed it.
    """
    try:
        from kvcag.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in _EXTRA:
            raise
        print("The kvcag command needs an optional dependency: pip install 'kvcag[cli]'", file=sys.stderr)  # noqa: T201
        sys.exit(3)
    app()
