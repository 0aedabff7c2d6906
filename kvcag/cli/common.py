"""What the commands share: options, the model and the store's folder, printing, errors and exit codes."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_type_hints

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from kvcag import errors
from kvcag.errors import CacheWarning, InvalidInputError, KVCAGError, StoreUnavailableError

if TYPE_CHECKING:
    from kvcag.engines.hf import HFEngine

# --- exit codes ---------------------------------------------------------------------------------------------------

NEGATIVE = 1
"""An item is damaged, missing or of another model, or the user did not confirm."""
USAGE = 2
"""The arguments are wrong."""
FAILED = 3
"""The disk, the network or the model failed, or an optional dependency is missing."""
INTERRUPTED = 130
"""Ctrl-C."""
CLOSED_PIPE = 141
"""The program that reads stdout closed the pipe."""

_USAGE_ERRORS = (InvalidInputError, errors.PromptError)
_FAILURES = (
    errors.EngineError,
    errors.MissingExtraError,
    errors.ModelFetchError,
    errors.StoreFullError,
    StoreUnavailableError,
)
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
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more
                raise typer.Exit(CLOSED_PIPE) from None


_running: ContextVar[Any] = ContextVar("_running")
"""The typer context of the running command, with the arguments that were typed."""


class Command(TyperCommand):
    """A command that `then` can find while it runs. Its help fills the width of the screen."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        paragraphs = inspect.cleandoc(self.help or "").split("\n\n")
        self.help = "\n\n".join(each if each.startswith(" ") else each.replace("\n", " ") for each in paragraphs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        token = _running.set(ctx)
        try:
            return super().invoke(ctx)
        finally:
            _running.reset(token)


def exit_code(error: KVCAGError) -> int:
    """Return the exit code for an error."""
    if isinstance(error, _USAGE_ERRORS):
        return USAGE
    return FAILED if isinstance(error, _FAILURES) else NEGATIVE


def say(line: str) -> None:
    """Print a line on stderr."""
    echo(f"kvcag: {line}", err=True)


def _message(error: KVCAGError) -> str:
    """Return the error's message, with advice that names the command's options instead of the library's arguments."""
    if isinstance(error, errors.UnknownItemError):
        return f"there is no item {', '.join(map(repr, error.ids))} in this store. `kvcag ls` lists the items."
    if isinstance(error, errors.ContextLengthError):
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


# --- options ------------------------------------------------------------------------------------------------------

INSTRUCTION = "You are a helpful assistant. Answer the question using only the passages below."
"""The default of `--instruction`."""

Strategy: TypeAlias = Literal["auto", "exact", "rotate", "anchor", "deviation", "query", "full"]
"""`kvcag.core.STRATEGIES` without importing torch. A test compares the two."""


def _shared(name: str, short: str | None, help: str, metavar: str) -> Any:
    """Return an option that the environment variable `KVCAG_<NAME>` also sets."""
    names = [f"--{name}", *([f"-{short}"] if short else [])]
    return typer.Option(*names, envvar=f"KVCAG_{name.upper()}", metavar=metavar, help=help)


_MODEL = "Load this Hugging Face hub id or folder. Default: the embedded SmolLM2-135M-Instruct."
_STORE = (
    "Store caches in this folder, or at an address that fsspec supports, such as s3://bucket/kv. Default: a folder in "
    "your user's cache folder; `kvcag ls` shows it."
)
_NAMESPACE = "Use the items of this namespace. Namespaces share no items. Default: the unnamed namespace."
_STRATEGY = (
    "Combine documents with this strategy. exact: encode them together as one context. auto: use that context if it is "
    "cached, otherwise the strategy that `kvcag doctor` recommended, otherwise query."
)
_SOURCE = "Use only items from this file, folder, glob or source; repeatable. Default: all items."
_CORPUS = "Read these files, folders or globs; repeatable. Default: twelve topics of Python's manual."

Model = Annotated[str | None, _shared("model", "m", _MODEL, "NAME")]
Store = Annotated[str | None, _shared("store", "s", _STORE, "PLACE")]
Namespace = Annotated[str, _shared("namespace", "n", _NAMESPACE, "NAME")]
Instruction = Annotated[str, _shared("instruction", None, "Put this instruction before the documents.", "TEXT")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and messages on stderr.")]
Source = Annotated[list[str] | None, typer.Option("--source", metavar="PATTERN", help=_SOURCE)]
StrategyOption = Annotated[Strategy, typer.Option("--strategy", help=_STRATEGY)]
Ratio = Annotated[float, typer.Option("--ratio", min=0, max=1, help="Recompute this share of merged tokens, 0 to 1.")]
CorpusOption = Annotated[list[str] | None, typer.Option("--corpus", help=_CORPUS)]


ENCODING_S = "encoding_s"
"""A metadata field of an item: how long encoding it took, in seconds."""


def takes(options: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the fields of a dataclass to a command as options. The command gets an instance of it as `options`."""
    hints = get_type_hints(options, include_extras=True)
    shared = [
        Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
        for each in fields(options)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            chosen = options(**{each.name: given.pop(each.name) for each in shared})
            command(**given, options=chosen)

        own = [each for each in signature(command, eval_str=True).parameters.values() if each.name != "options"]
        run.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in (*own, *shared)}
        return run

    return decorate


def default_store() -> Path:
    """Return `$KVCAG_CACHE/store`, or a folder in the platform's cache folder if that is not set."""
    if root := os.environ.get("KVCAG_CACHE"):
        return Path(root).expanduser() / "store"
    from platformdirs import user_cache_path

    return user_cache_path("kvcag", appauthor=False) / "store"


def resolve(model: str | None) -> tuple[str, str]:
    """Return a model's name and the name or folder to load it from. Downloads the embedded model if it is missing."""
    console = stderr()
    with console.status("importing torch and transformers"):
        import transformers

        from kvcag.demo.model import SMOLLM2, embedded_model
    transformers.utils.logging.disable_progress_bar()
    return (model, model) if model else (SMOLLM2.name, str(embedded_model(say=console.print)))


def load_engine(model: str | None, **settings: Any) -> HFEngine:
    """Load a model and its tokenizer.

    Raises:
        InvalidInputError: the model does not exist, or transformers cannot load it.
    """
    name, folder = resolve(model)
    with loading(name):
        from kvcag.engines.hf import HFEngine

        return HFEngine.from_pretrained(folder, **settings)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Show that a model is being loaded.

    Raises:
        InvalidInputError: the model does not exist, or transformers cannot load it.
    """
    try:
        with stderr().status(f"loading {name}"):
            yield
    except KVCAGError:
        raise
    except (OSError, ValueError) as refused:
        reason = next(iter(str(refused).strip().splitlines()), type(refused).__name__)
        raise InvalidInputError(
            f"the model {name!r} could not be loaded: {reason} Pass a hub id, or a folder that save_pretrained wrote."
        ) from refused


# --- printing: results on stdout, progress on stderr --------------------------------------------------------------


_CONTROL = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_ESCAPED = {code: f"\\u{code:04x}" for code in _CONTROL if chr(code) not in "\n\t"}
"""Control characters, characters that change the text direction, and surrogates."""


def plain(text: str) -> str:
    """Replace control characters by escapes, so that a terminal shows them instead of executing them."""
    return text.replace("\r\n", "\n").translate(_ESCAPED)


_WIDE = 240
"""The width of a pipe or a file, in columns."""


def terminal_width(stream: Any) -> int | None:
    """Return the width of a terminal in columns; None for a pipe or a file."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def echo(line: str = "", *, err: bool = False) -> None:
    """Print a line, with `plain` applied. On a terminal, long lines are broken between words."""
    width = terminal_width(sys.stderr if err else sys.stdout)
    if width is not None:
        line = "\n".join(
            textwrap.fill(each, width, break_long_words=False, break_on_hyphens=False) for each in line.split("\n")
        )
    typer.echo(plain(line), err=err)


class Flow:
    """Writes an answer piece by piece, on stdout or stderr. On a terminal, long lines are broken between words.

    The last word is held back while it fits into its line, since the next piece may make it longer. A wide character
    (Chinese, Japanese, Korean) counts as a word.
    """

    def __init__(self, *, err: bool = False) -> None:
        self._stream = sys.stderr if err else sys.stdout
        self.width = terminal_width(self._stream)
        self._at = 0  # columns written in this line
        self._word = ""  # the text that is held back
        self._may_break = False  # no part of this word is written yet

    def write(self, text: str) -> None:
        """Write a piece."""
        text = plain(text)
        self._stream.write(text if self.width is None else self._broken(text, self.width))
        self._stream.flush()

    def end(self) -> None:
        """Write the text that is held back, and end the line."""
        self.write("\n")

    def _broken(self, text: str, width: int) -> str:
        lines = ""
        for char in text:
            wide = cell_len(char) == 2
            if wide or char.isspace():
                lines += self._word_placed(width)
                self._may_break = self._at > 0
            if char.isspace():
                self._at = 0 if char == "\n" else self._at + 1
                lines += char if self._at <= width else ""
                self._may_break = self._at > 0
                continue
            self._word += char
            if wide or not self._may_break or self._at + cell_len(self._word) > width:
                lines += self._word_placed(width)
                self._may_break = wide
        return lines

    def _word_placed(self, width: int) -> str:
        cells = cell_len(self._word)
        new_line = self._may_break and self._at + cells > width
        placed = "\n" * new_line + self._word
        self._at, self._word = cells + self._at * (not new_line), ""
        return placed


_CARRIED = ("model", "store", "namespace", "instruction", "strategy", "ratio", "split", "context")
"""Options that a suggested command takes over, so that it works on the same items in the same way."""


def then(command: str) -> None:
    """Suggest the next command on stderr, with those typed options that the next command also has."""
    running = _running.get()
    takes = {option.name for option in running.parent.command.commands[command.split()[0]].params}
    for option in running.command.params:
        typed = running.get_parameter_source(option.name)
        if option.name in _CARRIED and option.name in takes and typed and typed.name == "COMMANDLINE":
            command += f" {option.opts[0]} {shlex.quote(str(running.params[option.name]))}"
    stderr().print(f"next: kvcag {command}", style="dim", soft_wrap=terminal_width(sys.stderr) is None)


ASK = 'ask "Your question?"'
"""The command that most other commands suggest."""


def paths(given: Sequence[str] | None, option: str = "") -> str:
    """Return paths as arguments of a command line, each after `option` if that is given: ` --source notes/`."""
    return "".join(f" {option} {shlex.quote(path)}".replace("  ", " ") for path in given or ())


def faster(full_s: float, cached_s: float) -> str:
    """Return the speed-up as text: `31 × faster`, `1.4 × faster` or `no faster`."""
    times = full_s / cached_s
    return f"{times:.{0 if times >= 9.95 else 1}f} × faster" if times >= 1.05 else "no faster"


class _Console(Console):
    """Prints `plain` text. Uses colours on a terminal only, and does not truncate paths in a pipe or a file."""

    def __init__(self, *, stderr: bool) -> None:
        width = terminal_width(sys.stderr if stderr else sys.stdout) or _WIDE
        super().__init__(stderr=stderr, markup=False, highlight=False, width=width)

    def print(self, *objects: Any, **how: Any) -> None:
        shown = (Text(plain(each.plain), each.style) if isinstance(each, Text) else each for each in objects)
        super().print(*(plain(each) if isinstance(each, str) else each for each in shown), **how)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # `Commands` handles it


def stdout() -> Console:
    """Return a console for results."""
    return _Console(stderr=False)


def stderr() -> Console:
    """Return a console for progress and remarks."""
    return _Console(stderr=True)


def emit(value: object, *, indent: int | None = 2) -> None:
    """Print a JSON document on stdout. With `indent=None`, print it on one line."""
    sys.stdout.write(json.dumps(value, indent=indent, ensure_ascii=False, default=str).translate(_ESCAPED) + "\n")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Return a table without borders.

    Args:
        columns: the headings. A heading that begins with `>` makes a right-aligned column.
        rows: the cells, printed with `str`. None makes an empty cell.
    """
    made = Table(box=None, pad_edge=False, header_style="bold")
    shown = [["" if cell is None else plain(str(cell)) for cell in row] for row in rows]
    names = [heading.removeprefix(">") for heading in columns]
    widths = [max(map(cell_len, column)) for column in zip(names, *shown, strict=True)]
    longest = max(widths)
    room = (terminal_width(sys.stdout) or _WIDE) - (sum(widths) - longest) - 2 * (len(widths) - 1)
    for heading, name, width in zip(columns, names, widths, strict=True):
        justify: Any = "right" if heading.startswith(">") else "left"
        most = max(room, 8) if width == longest else width  # if the table is too wide, truncate its longest column
        made.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis", max_width=most)
    for row in shown:
        made.add_row(*row)
    return made


@contextmanager
def progress(doing: str, total: int, unit: str) -> Iterator[Any]:
    """Show a progress bar if stderr is a terminal. Yields a function `advance(amount, next_item)`."""
    console = stderr()
    if not console.is_terminal:
        yield lambda amount=0, next_item="": None
        return
    text = TextColumn("{task.description}", markup=False)
    columns = text, BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda amount=0, next_item="": bar.update(
            task, advance=amount, description=f"{doing} {plain(next_item)[-32:]:<32}"
        )


def size(count: int) -> str:
    """Return a number of bytes as text, with units in powers of 1000."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


UNITS = {"w": 604_800, "d": 86_400, "h": 3600, "m": 60, "s": 1}
"""The length of each unit of time, in seconds."""


def age(timestamp: float) -> str:
    """Return the time since `timestamp` (seconds since 1970) in its largest unit."""
    seconds = max(0.0, time.time() - timestamp)
    unit = next((unit for unit, length in UNITS.items() if seconds >= length), "s")
    return f"{seconds / UNITS[unit]:.0f} {unit}"


def counted(count: int, noun: str) -> str:
    """Return `1 item`, `2 items`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
