"""`kvcag demo`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvcag.errors import InvalidInputError


class Strategy(str, Enum):
    """How a context is put together, by the names that the library gives them."""

    exact = "exact"
    rotate = "rotate"
    anchor = "anchor"
    deviation = "deviation"
    query = "query"
    full = "full"


def demo(
    model: Annotated[
        str | None, typer.Option(help="A hub id or a folder. Default: the embedded SmolLM2-135M-Instruct.")
    ] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folders or files of .md, .txt, .jsonl; repeatable. Default: a dozen topics of Python's docs."
        ),
    ] = None,
    question: Annotated[list[str] | None, typer.Option(help="A question to ask; repeatable.")] = None,
    strategy: Annotated[
        Strategy, typer.Option(help="exact: one context, the same answers. Others merge documents cached one by one.")
    ] = Strategy.exact,
    ratio: Annotated[float, typer.Option(min=0, max=1, help="The share of tokens that a merge recomputes.")] = 0.2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 48,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write the figures to this file as well.")
    ] = None,
) -> None:
    """Encode a corpus once, then answer questions without caches and with them, side by side.

    For example:

        kvcag demo

        kvcag demo --corpus notes/ --question "Who is responsible for backups?" --json figures.json

        kvcag demo --strategy query --ratio 0.2
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise InvalidInputError(f"--json {json_file}: no such folder {json_file.absolute().parent}. Create it first.")
    from kvcag.demo.corpus import DEFAULT_QUESTIONS, GENERAL_QUESTIONS, load_corpus, python_topics

    documents = load_corpus(corpus) if corpus else python_topics()
    questions = question or list(GENERAL_QUESTIONS if corpus else DEFAULT_QUESTIONS)
    console = Console(markup=False, highlight=False)  # titles and answers are shown as they are
    try:
        with console.status("loading torch and transformers"):
            from kvcag.demo import show

        name, folder = show.model(model, console)
        settings = {"strategy": strategy.value, "ratio": ratio, "max_new_tokens": max_new_tokens}
        demonstration = show.load(name, folder, documents, console, **settings)
        demonstration.check(questions)
        figures = show.run(demonstration, name, [document.title for document in documents], questions, console)
    except KeyboardInterrupt:
        console.print("\ninterrupted")
        raise typer.Exit(130) from None
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"the figures are in {json_file}")
