"""`kvcag doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A hub id or a folder. Default: the embedded SmolLM2-135M-Instruct.")
    ] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(help="Folders or files of .md, .txt, .jsonl; repeatable. Default: topics of Python's docs."),
    ] = None,
    head: Annotated[str | None, typer.Option(help="The instruction that will stand before the documents.")] = None,
    probes: Annotated[int, typer.Option(min=1, help="How many contexts to try.")] = 4,
    max_kl: Annotated[float, typer.Option(min=0, help="Nats a token that a merged context may be off.")] = 0.05,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write the figures here too.")
    ] = None,
) -> None:
    """Can this model's caches be merged, and how well? Compares every strategy with a full prefill.

    The verdict is kept for `merge(strategy="auto")`.

    For example:

        kvcag doctor

        kvcag doctor Qwen/Qwen3-0.6B --corpus notes/ --max-kl 0.03
    """
    from kvcag.demo.corpus import load_corpus, python_topics

    documents = [document.text for document in (load_corpus(corpus) if corpus else python_topics())]
    console = Console(highlight=False)
    with console.status("loading torch and transformers"):
        from kvcag.cache.merge import check_mergeable
        from kvcag.demo import show
        from kvcag.engines.hf import HFEngine

    name, folder = show.model(model, console)
    engine = HFEngine.from_pretrained(folder)
    with engine.exclusive() as live:
        check_mergeable(live)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("probing", total=probes)
        calibration = engine.calibrate(
            documents, head=head, probes=probes, progress=lambda done, total: bar.update(task, completed=done)
        )
    best = calibration.cheapest(max_kl)
    table = Table(title=f"{name}: {calibration.probes} contexts of about {calibration.context_tokens} tokens")
    for heading in ("strategy", "recomputed", "KL, nats a token", "same token", "time to first token"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    for verdict in sorted(calibration.verdicts, key=lambda verdict: verdict.cost):
        cells = (f"{verdict.ratio:.0%}", f"{verdict.kl:.4f}", f"{verdict.agreement:.1%}", f"{verdict.cost:.0%} of full")
        table.add_row(verdict.strategy, *cells, style="bold green" if verdict == best else None)
    console.print(table)
    if best is None:
        console.print(f"No strategy is within KL {max_kl:g} and cheaper than a full prefill: 'auto' encodes all.")
    else:
        console.print(f"strategy='auto', max_kl={max_kl:g} takes {best.strategy!r} at ratio {best.ratio:g}.")
    if json_file is not None:
        json_file.write_text(json.dumps(calibration.model_dump(), indent=2) + "\n", encoding="utf-8")
        console.print(f"the figures are in {json_file}", markup=False)
