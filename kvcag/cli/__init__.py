"""The `kvcag` command. Importing this needs no extra; running the command does."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; an error that kvcag raised on purpose becomes one message on stderr and an exit code.

    Exit codes: 0 done, 1 it failed, 2 the arguments cannot work, 130 interrupted.
    """
    try:
        from kvcag.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("rich", "typer"):
            raise
        sys.exit("The kvcag command needs an optional dependency: pip install 'kvcag[cli]'")
    from kvcag.errors import InvalidInputError, KVCAGError

    try:
        app()
    except KVCAGError as error:
        print(f"kvcag: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2 if isinstance(error, InvalidInputError) else 1)
