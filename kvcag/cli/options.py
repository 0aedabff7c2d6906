"""Options that commands share: the same name, environment variable and meaning everywhere."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

INSTRUCTION = "You are a helpful assistant. Answer the question using only the passages below."
"""The instruction before the documents, where none is given."""


class Strategy(str, Enum):
    """How a context is put together, by the names that the library gives them."""

    exact = "exact"
    rotate = "rotate"
    anchor = "anchor"
    deviation = "deviation"
    query = "query"
    full = "full"


class AnyStrategy(str, Enum):
    """The same, and `auto`: what `kvcag doctor` found."""

    exact = "exact"
    rotate = "rotate"
    anchor = "anchor"
    deviation = "deviation"
    query = "query"
    full = "full"
    auto = "auto"


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="KVCAG_MODEL",
        metavar="NAME",
        help="A hub id, or a folder that save_pretrained wrote. Default: the embedded SmolLM2-135M-Instruct.",
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(
        "--store",
        "-s",
        envvar="KVCAG_STORE",
        metavar="FOLDER",
        help="Where caches are kept. Default: a folder of your user's cache, as `kvcag ls` shows.",
    ),
]
Namespace = Annotated[
    str,
    typer.Option(
        "--namespace",
        "-n",
        envvar="KVCAG_NAMESPACE",
        metavar="NAME",
        help="Whose items these are. Namespaces share nothing.",
    ),
]
Instruction = Annotated[
    str,
    typer.Option(
        "--instruction", envvar="KVCAG_HEAD", metavar="TEXT", help="The instruction that stands before documents."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout; everything else goes to stderr.")]
Source = Annotated[
    list[str] | None,
    typer.Option(
        "--source", metavar="PATTERN", help="What was made from this file, folder or glob, or has this source; repeat."
    ),
]
OlderThan = Annotated[
    str | None, typer.Option("--older-than", metavar="AGE", help="What was encoded longer ago: 90s, 30m, 12h, 7d, 4w.")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="The most tokens of an answer. Default: 512, or what still fits."),
]
Temperature = Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy: the same answer every time.")]
Ratio = Annotated[float, typer.Option("--ratio", min=0, max=1, help="The share of tokens that a merge recomputes.")]


def default_store() -> Path:
    """`$KVCAG_CACHE/store`, or a folder in the platform's cache folder where that is not set."""
    if root := os.environ.get("KVCAG_CACHE"):
        return Path(root).expanduser() / "store"
    from platformdirs import user_cache_path

    return user_cache_path("kvcag", appauthor=False) / "store"
