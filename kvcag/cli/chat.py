"""`kvcag chat`: a conversation over what is kept."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from kvcag.cli import output
from kvcag.cli.ask import Ids, StrategyOption, figures, summary, timing
from kvcag.cli.group import say
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
from kvcag.errors import InvalidInputError

if TYPE_CHECKING:
    from kvcag.cli.context import Corpus
    from kvcag.core import MergeReport, Usage
    from kvcag.engines.session import Session

_HELP = """/reset   forget the conversation; the documents stay
/undo    take back the last turn
/context what the answers come from
/help    this
/exit    leave, as Ctrl-D does. Ctrl-C cancels an answer; a second one leaves."""


def chat(
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
    r"""Talk about what is kept. Each turn prefills what was said and nothing else, and says what was reused.

    Ctrl-C cancels an answer, and the turn is forgotten; a second one, or Ctrl-D, leaves. Lines from a pipe are turns:
    with --json each answer is one line of JSON.

    For example:

        kvcag chat

        kvcag chat --source notes/ --strategy query

        printf 'Who is it about?\nAnd where?\n' | kvcag chat --json | jq -r .answer
    """
    from kvcag.cli.context import open_corpus

    corpus = open_corpus(model, store, namespace, instruction, ids, source)
    if sys.stdin.isatty():
        documents = output.counted(len(corpus.entries), "item")
        say(f"{documents} and {corpus.engine.model_name.rstrip('/').rpartition('/')[2]}; /help lists the commands")
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    Conversation(corpus, strategy, ratio, settings, as_json).run()


class Conversation:
    """Reads turns, answers them, and goes on when one of them is cancelled.

    Args:
        corpus: what the answers come from.
        strategy: how it is put together, for the first question.
        ratio: the recompute ratio.
        settings: of `Sampling`.
        as_json: one JSON object a turn in place of the streamed text.
    """

    def __init__(
        self, corpus: Corpus, strategy: AnyStrategy | None, ratio: float, settings: dict[str, Any], as_json: bool
    ) -> None:
        self.corpus, self.strategy, self.ratio, self.settings, self.as_json = corpus, strategy, ratio, settings, as_json
        self.session: Session | None = None
        self._report: MergeReport | None = None

    def run(self) -> None:
        """Until the end of the input, /exit, or a second Ctrl-C."""
        interrupted = False
        while True:
            try:
                said = self._read()
                if said is None or (said.startswith("/") and not self.command(said)):
                    return
                if said and not said.startswith("/"):
                    interrupted = False
                    self._answer(said)
            except KeyboardInterrupt:
                if interrupted:
                    return
                if not sys.stdin.isatty():
                    raise
                interrupted = True
                typer.echo(err=True)
                say("cancelled; Ctrl-C again, or Ctrl-D, leaves")

    def command(self, line: str) -> bool:
        """Do what a line that begins with a slash says; whether to go on."""
        turns = len(self.session.turns) if self.session else 0
        name = line.split()[0]
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            self.session = self._report = None
            say("the conversation is forgotten; the documents stay")
        elif name == "/undo" and self.session and turns:
            self.session.rollback()
            say(f"the last turn is taken back; {output.counted(turns - 1, 'turn')} left")
        elif name == "/context":
            for entry in self.corpus.entries:
                say(f"{entry.short}  {entry.manifest.tokens:>7,} tokens  {entry.source}")
        else:
            say("there is no turn to take back" if name == "/undo" else f"the commands are\n{_HELP}")
        return True

    def turn(self, question: str) -> tuple[str, Usage]:
        """One answer, streamed unless it is to be JSON, and what it took. Cancelled, it is as if never asked."""
        started = time.perf_counter()
        session = self._session(question)
        prepared = time.perf_counter() - started
        answer, usage = "", None
        stream = session.stream(question, **self.settings)
        try:
            for chunk in stream:
                answer += chunk.text
                usage = chunk.usage or usage
                if not self.as_json:
                    sys.stdout.write(chunk.text)
                    sys.stdout.flush()
        finally:
            stream.close()
        assert usage is not None  # the last chunk has it
        return answer.strip(), replace(usage, ttft_s=usage.ttft_s + prepared, total_s=usage.total_s + prepared)

    def _answer(self, question: str) -> None:
        try:
            answer, usage = self.turn(question)
        except InvalidInputError as refused:  # too long, most often
            if not sys.stdin.isatty():
                raise
            say(f"{refused} /reset forgets what was said." if self.session else str(refused))
            return
        report = self._report if self.session and len(self.session.turns) == 1 else None
        if self.as_json:
            output.emit_line({"question": question, "answer": answer, **figures(usage, report)})
            return
        typer.echo()
        later = f"{usage.cached_tokens:,} tokens reused, {usage.created_tokens:,} read; {timing(usage)}"
        output.stderr().print(summary(usage, report) if report else later, style="dim")

    def _session(self, question: str) -> Session:
        if self.session is None:
            context = self.corpus.context(question, self.strategy, self.ratio)
            self._report = context.report
            from kvcag.engines.session import Session

            self.session = Session(self.corpus.engine, context)
        return self.session

    def _read(self) -> str | None:
        """A line, without the blanks around it; None at the end of the input."""
        if not sys.stdin.isatty():
            line = sys.stdin.readline()
            return line.strip() if line else None
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() editing and a history
        try:
            return input("\n> ").strip()
        except EOFError:
            typer.echo(err=True)
            return None
