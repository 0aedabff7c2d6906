"""`kvcag doctor`: measures how much accuracy merging costs, and how much time it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcag.cli import common
from kvcag.cli.common import CorpusOption, Json, Model
from kvcag.errors import InvalidInputError

_QUESTIONS = (
    "Ask the questions in this file, one per line; ten real questions are best. Default: questions made from the "
    "documents."
)
_PROBES = "Compare on this many contexts. Default: one per question, at most 10; 4 without --questions."
_ITEMS = 4
"""The number of documents in a context: as many as `kvcag ask PATH` uses by default."""


def doctor(
    model: Model = None,
    corpus: CorpusOption = None,
    questions: Annotated[Path | None, typer.Option(metavar="FILE", help=_QUESTIONS)] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Put this instruction before the documents. Default: none.")
    ] = None,
    probes: Annotated[int | None, typer.Option(min=1, help=_PROBES)] = None,
    max_kl: Annotated[float, typer.Option(min=0, help="Allow this KL divergence, in nats per token.")] = 0.05,
    as_json: Json = False,
) -> None:
    """Compare merge strategies with a full prefill, recommend one, and save the result for --strategy auto.

    Each context has four documents: with --questions, those whose words fit the question best, as in `kvcag ask`;
    without, documents chosen at random.

    Exits with 1 if no strategy is both accurate enough and cheaper than a full prefill, or if the model's caches cannot
    be merged.

    For example:

        kvcag doctor

        kvcag doctor --model Qwen/Qwen3-0.6B --corpus notes/ --questions questions.txt --max-kl 0.03
    """
    from kvcag.cli.files import fitting, read_corpus, read_texts

    documents = [document.text for document in read_corpus(corpus)]
    asked: list[str] = []
    if questions is not None:
        asked = [line.strip() for text in read_texts([str(questions)]).texts for line in text.text.splitlines()]
        asked = [question for question in asked if question]
    if probes is None:
        probes = min(len(asked), 10) or 4
    if len(documents) < 2:
        raise InvalidInputError("the corpus has only one document, and merging needs two: give --corpus at least two.")
    engine = common.load_engine(model)
    from kvcag.calibration import calibrate

    engine.check_mergeable()
    with common.progress("probing", probes, "contexts") as advance:
        calibration = calibrate(
            engine,
            documents,
            asked,
            instruction=instruction,
            probes=probes,
            documents_per_probe=_ITEMS,
            retrieve=lambda question: [documents[place] for place in fitting(documents, question, _ITEMS)],
            progress=lambda done, total: advance(1),
        )
    best, recommended = calibration.cheapest(max_kl), calibration.recommendation(max_kl)
    if as_json:
        said = {"best": best.model_dump() if best else None, "recommendation": recommended}
        common.emit({**calibration.model_dump(), "max_kl": max_kl, **said})
    else:
        console = common.stdout()
        console.print(
            f"{engine.model_name}: {calibration.probes} contexts of about {calibration.context_tokens} tokens\n"
        )
        rows = [
            (
                f"{verdict.strategy} *" if verdict == best else verdict.strategy,
                f"{verdict.ratio:.0%}",
                f"{verdict.kl:.4f}",
                f"{verdict.agreement:.1%}",
                f"{verdict.cost:.0%} of full",
            )
            for verdict in sorted(calibration.verdicts, key=lambda verdict: verdict.cost)
        ]
        columns = ["strategy", ">recomputed", ">KL, nats per token", ">same token", ">time to first token"]
        console.print(common.table(columns, rows))
        console.print(f"\n{recommended[0].upper()}{recommended[1:]}. strategy='auto', max_kl={max_kl:g} does that.")
        common.then(f'ask{common.paths(corpus)} "Your question?"')
    if best is None:
        raise typer.Exit(common.NEGATIVE)
