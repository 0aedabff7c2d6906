"""`kvcag ask`: one question over what is kept."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvcag.cli import output
from kvcag.cli.options import (
    INSTRUCTION,
    AnyStrategy,
    Instruction,
    Json,
    MaxNewTokens,
    Model,
    Namespace,
    Ratio,
    Source,
    Store,
    Temperature,
)
from kvcag.errors import EmptyPromptError

if TYPE_CHECKING:
    from kvcag.core import MergeReport, Usage

Ids = Annotated[
    list[str] | None, typer.Option("--id", metavar="ID", help="Answer from this item alone, or from several; repeat.")
]
StrategyOption = Annotated[
    AnyStrategy | None,
    typer.Option(
        "--strategy",
        help="How items are put together. Default: the whole store exactly; chosen items by 'query'. "
        "'auto' takes what `kvcag doctor` measured.",
    ),
]


def ask(
    question: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")],
    model: Model = None,
    store: Store = None,
    namespace: Namespace = "",
    ids: Ids = None,
    source: Source = None,
    strategy: StrategyOption = None,
    ratio: Ratio = 0.2,
    instruction: Instruction = INSTRUCTION,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    as_json: Json = False,
) -> None:
    """Answer a question from what is kept: from the whole store as one exact context, or from chosen items, merged.

    The whole store is read in one piece at the first question and kept so; the questions after it, in this process or
    another, find it. The answer is on stdout, and what was reused on stderr.

    For example:

        kvcag ask "Who is responsible for backups?"

        kvcag ask "What changed?" --source notes/today.md --source notes/yesterday.md

        kvcag ask "Who was late?" --id 3f9c --id 81aa --strategy query --ratio 0.1 --json | jq -r .answer
    """
    question = sys.stdin.read() if question == "-" else question
    if not question.strip():
        raise EmptyPromptError("the question is empty: there is nothing to answer")
    from kvcag.cli.context import open_corpus

    corpus = open_corpus(model, store, namespace, instruction, ids, source)
    engine = corpus.engine
    started = time.perf_counter()
    context = corpus.context(question, strategy, ratio)
    sampling = engine.sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    answer, usage = "", None
    chunks = engine.stream(engine.build_prompt(None, context), sampling, context, namespace=namespace, started=started)
    for chunk in chunks:
        answer += chunk.text
        usage = chunk.usage or usage
        if not as_json:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    assert usage is not None  # the last chunk has it
    if as_json:
        facts = {"ids": [entry.id for entry in corpus.entries], "model": engine.model_name}
        output.emit({"question": question, "answer": answer.strip(), **facts, **figures(usage, context.report)})
    else:
        typer.echo()
        output.stderr().print(summary(usage, context.report), style="dim")


def figures(usage: Usage, report: MergeReport | None) -> dict[str, object]:
    """What an answer took, as JSON has it. Counts are tokens, times seconds."""
    return {
        "context": asdict(report) if report else None,
        "usage": {name: value for name, value in asdict(usage).items() if name != "context"},
    }


def summary(usage: Usage, report: MergeReport) -> str:
    """What an answer took, as one line."""
    parts = [f"{report.reused_tokens:,} of {report.context_tokens:,} context tokens reused"]
    if report.recomputed_tokens:
        parts.append(f"{report.recomputed_tokens:,} recomputed ({report.strategy})")
    if report.encoded_tokens:
        parts.append(f"{report.encoded_tokens:,} encoded")
    reason = report.reason.replace("engine.calibrate(documents)", "`kvcag doctor`")
    return f"{', '.join(parts)}; {timing(usage)}{f' [{reason}]' if reason else ''}"


def timing(usage: Usage) -> str:
    """When the first token came, and the last."""
    tokens = output.counted(usage.completion_tokens, "token")
    return f"first token after {usage.ttft_s:.2f} s, {tokens} in {usage.total_s:.2f} s"
