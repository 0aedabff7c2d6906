"""Options that several commands share, and what they stand for: the store's folder, the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_type_hints

import typer

from kvcag.cli import output
from kvcag.errors import InvalidInputError, KVCAGError

if TYPE_CHECKING:
    from kvcag.engines.hf import HFEngine

INSTRUCTION = "You are a helpful assistant. Answer the question using only the passages below."
"""The default of `--instruction`."""

Strategy: TypeAlias = Literal["auto", "exact", "rotate", "anchor", "deviation", "query", "full"]
"""`kvcag.contexts.STRATEGIES` without importing torch. A test compares the two."""

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="KVCAG_MODEL",
        metavar="NAME",
        help="Load this hub id or folder. Default: the embedded SmolLM2-135M-Instruct.",
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(
        "--store",
        "-s",
        envvar="KVCAG_STORE",
        metavar="FOLDER",
        help="Keep caches in this folder. Default: a folder in your user's cache folder; `kvcag ls` shows it.",
    ),
]
Namespace = Annotated[
    str,
    typer.Option(
        "--namespace",
        "-n",
        envvar="KVCAG_NAMESPACE",
        metavar="NAME",
        help="Use the items of this namespace. Namespaces share nothing.",
    ),
]
Instruction = Annotated[
    str,
    typer.Option(
        "--instruction",
        envvar="KVCAG_INSTRUCTION",
        metavar="TEXT",
        help="Put this instruction before the documents.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and everything else on stderr.")]
Source = Annotated[
    list[str] | None,
    typer.Option("--source", metavar="PATTERN", help="Choose items by file, folder, glob or source; repeatable."),
]
OlderThan = Annotated[
    str | None,
    typer.Option("--older-than", metavar="AGE", help="Choose items encoded longer ago than 90s, 30m, 12h, 7d or 4w."),
]
StrategyOption = Annotated[
    Strategy,
    typer.Option(
        "--strategy",
        help="Put documents together this way. exact: as one context. auto: exact where that context is cached, else "
        "what `kvcag doctor` measured, or 'query'.",
    ),
]
Ratio = Annotated[float, typer.Option("--ratio", min=0, max=1, help="Recompute this share of tokens in a merge.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="Generate at most this many tokens. Default: 512, or what fits."),
]
Temperature = Annotated[float, typer.Option("--temperature", min=0, help="Sample at this temperature; 0 is greedy.")]
CorpusOption = Annotated[
    list[str] | None,
    typer.Option(
        "--corpus", help="Read these files, folders or globs; repeatable. Default: twelve topics of Python's manual."
    ),
]


def takes(options: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take the fields of a dataclass as options. It is called with the dataclass as `options`."""
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
    """Return a model's name and where to load it from. The embedded model is fetched if it is missing."""
    console = output.stderr()
    with console.status("importing torch and transformers"):
        import transformers

        from kvcag.demo.model import SMOLLM2, embedded_model
    transformers.utils.logging.disable_progress_bar()
    if model:
        return model, model
    return SMOLLM2.name, str(embedded_model(say=console.print))


def load_engine(model: str | None, **settings: Any) -> HFEngine:
    """Load a model and its tokenizer. Raises as `loading`."""
    name, folder = resolve(model)
    with loading(name):
        from kvcag.engines.hf import HFEngine

        return HFEngine.from_pretrained(folder, **settings)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Show that a model is being loaded.

    Raises:
        InvalidInputError: there is no such model, or transformers cannot load it.
    """
    try:
        with output.stderr().status(f"loading {name}"):
            yield
    except KVCAGError:
        raise
    except (OSError, ValueError) as refused:
        reason = next(iter(str(refused).strip().splitlines()), type(refused).__name__)
        raise InvalidInputError(
            f"the model {name!r} could not be loaded: {reason} Pass a folder that save_pretrained wrote, or a hub id."
        ) from refused
