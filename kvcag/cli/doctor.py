"""`kvcag doctor`: measures what merging costs in accuracy and saves in time."""

from __future__ import annotations

from typing import Annotated

import typer

from kvcag.cli import common
from kvcag.cli.common import CorpusOption, Json, Model


def doctor(
    model: Model = None,
    corpus: CorpusOption = None,
    instruction: Annotated[str | None, typer.Option(help="Put this instruction before the documents.")] = None,
    probes: Annotated[int, typer.Option(min=1, help="Compare on this many contexts.")] = 4,
    max_kl: Annotated[float, typer.Option(min=0, help="Allow this KL divergence, in nats per token.")] = 0.05,
    as_json: Json = False,
) -> None:
    """Compare every merge strategy with a full prefill, and keep the result for --strategy auto.

    Exits with 1 if no strategy is both accurate enough and cheaper than a full prefill, or if the model's caches cannot
    be merged.

    For example:

        kvcag doctor

        kvcag doctor --model Qwen/Qwen3-0.6B --corpus notes/ --max-kl 0.03
    """
    from kvcag.cli.files import read_corpus

    documents = [document.text for document in read_corpus(corpus)]
    engine = common.load_engine(model)
    from kvcag.cache.merge import check_mergeable
    from kvcag.calibration import calibrate

    with engine.exclusive() as live:
        check_mergeable(live)
    with common.progress("probing", probes, "contexts") as advance:
        calibration = calibrate(
            engine, documents, instruction=instruction, probes=probes, progress=lambda done, total: advance(1)
        )
    best = calibration.cheapest(max_kl)
    if as_json:
        common.emit({**calibration.model_dump(), "max_kl": max_kl, "best": best.model_dump() if best else None})
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
        if best:
            console.print(f"\n* strategy='auto', max_kl={max_kl:g} uses {best.strategy!r} at ratio {best.ratio:g}.")
        else:
            console.print(
                f"\nNo strategy is within KL {max_kl:g} and cheaper than a full prefill: 'auto' encodes everything."
            )
    if best is None:
        raise typer.Exit(common.NEGATIVE)
