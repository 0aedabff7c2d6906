"""`kvcag demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcag.cli import output
from kvcag.cli.options import Json, Model, Ratio, Strategy

CorpusOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--corpus", help="Folders or files of .md, .txt, .jsonl; repeat. Default: a dozen topics of Python's docs."
    ),
]


def demo(
    model: Model = None,
    corpus: CorpusOption = None,
    question: Annotated[list[str] | None, typer.Option("--question", help="A question to ask; repeat.")] = None,
    strategy: Annotated[
        Strategy,
        typer.Option(
            "--strategy", help="exact: one context, the same answers. Others merge documents cached one by one."
        ),
    ] = Strategy.exact,
    ratio: Ratio = 0.2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 48,
    as_json: Json = False,
) -> None:
    """Encode a corpus once, then answer questions without caches and with them, side by side.

    For example:

        kvcag demo

        kvcag demo --corpus notes/ --question "Who is responsible for backups?" --json > figures.json

        kvcag demo --strategy query --ratio 0.2
    """
    from kvcag.demo.corpus import DEFAULT_QUESTIONS, GENERAL_QUESTIONS, load_corpus, python_topics

    documents = load_corpus(corpus) if corpus else python_topics()
    questions = question or list(GENERAL_QUESTIONS if corpus else DEFAULT_QUESTIONS)
    from kvcag.cli.loading import loading, resolve

    name, folder = resolve(model)
    console = output.stderr() if as_json else output.stdout()
    with loading(name):
        from kvcag.demo import show
        from kvcag.demo.run import Demonstration

        demonstration = Demonstration(
            folder, documents, strategy=strategy.value, ratio=ratio, max_new_tokens=max_new_tokens
        )
    demonstration.check(questions)
    figures = show.run(demonstration, name, [document.title for document in documents], questions, console)
    if as_json:
        output.emit(figures)
