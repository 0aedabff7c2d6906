"""How every command ends: what went wrong as one message, and an exit code that scripts can trust."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from kvcag.errors import (
    ContextLengthError,
    EngineError,
    InvalidInputError,
    KVCAGError,
    MissingExtraError,
    ModelFetchError,
    StoreFullError,
    StoreUnavailableError,
    UnknownItemError,
)

NEGATIVE = 1
"""The answer is no: something is damaged, missing, of another model, or was not confirmed."""
USAGE = 2
"""The arguments cannot work."""
FAILED = 3
"""It could not be done here and now: no disk, no network, an extra that is not installed, a model that failed."""
INTERRUPTED = 130
CLOSED_PIPE = 141

_FAILURES = (EngineError, MissingExtraError, ModelFetchError, StoreFullError, StoreUnavailableError)
DEBUG = "KVCAG_DEBUG"


class Commands(TyperGroup):
    """Runs a command, and turns what it raises into a message on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """As click's, with errors that kvcag raises on purpose reported; with `--debug` they keep their traceback."""
        shown, warnings.showwarning = warnings.showwarning, _warn
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a pipe that was closed shows here, and not while Python shuts down
            return result
        except KVCAGError as error:
            if os.environ.get(DEBUG):
                raise
            say(_in_words_of_the_shell(error))
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _forget(sys.stdout)
            raise typer.Exit(CLOSED_PIPE) from None
        finally:
            warnings.showwarning = shown


def exit_code(error: KVCAGError) -> int:
    """What a script is told about an error."""
    if isinstance(error, InvalidInputError):
        return USAGE
    return FAILED if isinstance(error, _FAILURES) else NEGATIVE


def _in_words_of_the_shell(error: KVCAGError) -> str:
    """The message; where the library's advice is an argument of its own, the command's instead."""
    if isinstance(error, UnknownItemError):
        return f"there is no item {', '.join(map(repr, error.ids))} here. `kvcag ls` lists what there is."
    if isinstance(error, ContextLengthError):
        return (
            f"the prompt has {error.prompt_tokens:,} tokens, with --max-new-tokens {error.max_new_tokens:,} that is "
            f"{error.excess:,} more than the model's context of {error.limit:,}. Choose fewer documents, or lower it."
        )
    if isinstance(error, StoreUnavailableError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def say(line: str) -> None:
    """A line to the person, on stderr."""
    typer.echo(f"kvcag: {line}", err=True)


def _warn(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    if issubclass(category, UserWarning):
        say(f"warning: {message}")


def _forget(stream: TextIO) -> None:
    """Let what is still to be written go nowhere."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, stream.fileno())
    finally:
        os.close(devnull)
