"""Errors as messages and exit codes, the same for every command."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from kvcag.errors import (
    CacheWarning,
    ContextLengthError,
    EngineError,
    InvalidInputError,
    KVCAGError,
    MissingExtraError,
    ModelFetchError,
    PromptError,
    StoreFullError,
    StoreUnavailableError,
    UnknownItemError,
)

NEGATIVE = 1
"""Something is damaged, missing, of another model, or was not confirmed."""
USAGE = 2
"""The arguments are wrong."""
FAILED = 3
"""The disk, the network, a missing extra or the model prevented it."""
INTERRUPTED = 130
"""Ctrl-C."""
CLOSED_PIPE = 141
"""The reader of stdout closed it."""

_FAILURES = (EngineError, MissingExtraError, ModelFetchError, StoreFullError, StoreUnavailableError)
DEBUG = "KVCAG_DEBUG"


class Commands(TyperGroup):
    """Runs a command, and turns its errors into a message on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. With `--debug`, an error keeps its traceback."""
        with warnings.catch_warnings():
            warnings.simplefilter("default", CacheWarning)
            warnings.showwarning = _warn
            try:
                result = super().invoke(ctx)
                sys.stdout.flush()  # raises BrokenPipeError here rather than at the exit of Python
                return result
            except KVCAGError as error:
                if os.environ.get(DEBUG):
                    raise
                say(_message(error))
                raise typer.Exit(exit_code(error)) from None
            except KeyboardInterrupt:
                say("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            except BrokenPipeError:
                _discard_stdout()
                raise typer.Exit(CLOSED_PIPE) from None


def exit_code(error: KVCAGError) -> int:
    """Return the exit code for an error."""
    if isinstance(error, InvalidInputError | PromptError):
        return USAGE
    return FAILED if isinstance(error, _FAILURES) else NEGATIVE


def say(line: str) -> None:
    """Print a line on stderr."""
    typer.echo(f"kvcag: {line}", err=True)


def _message(error: KVCAGError) -> str:
    """Return the error's message; its advice names options in place of arguments of the library."""
    if isinstance(error, UnknownItemError):
        return f"there is no item {', '.join(map(repr, error.ids))} in this store. `kvcag ls` lists the items."
    if isinstance(error, ContextLengthError):
        return (
            f"the prompt has {error.prompt_tokens:,} tokens; with --max-new-tokens {error.max_new_tokens:,} that is "
            f"{error.excess:,} more than the model's context of {error.limit:,}. Choose fewer documents, or lower "
            "--max-new-tokens."
        )
    if isinstance(error, StoreUnavailableError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _warn(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    if issubclass(category, UserWarning):
        say(f"warning: {message}")


def _discard_stdout() -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, sys.stdout.fileno())
    finally:
        os.close(devnull)
