"""`kvcag ask` and `kvcag chat`: answers from the items of a store."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcag.cli import output
from kvcag.cli.group import NEGATIVE, say
from kvcag.cli.options import (
    INSTRUCTION,
    Instruction,
    Json,
    MaxNewTokens,
    Model,
    Namespace,
    Ratio,
    Source,
    Store,
    Strategy,
    StrategyOption,
    Temperature,
    default_store,
    load_engine,
)
from kvcag.errors import (
    ContextLengthError,
    EmptyPromptError,
    FingerprintMismatchError,
    InvalidInputError,
    PromptError,
)

if TYPE_CHECKING:
    from kvcag.chat_template import Prompt
    from kvcag.cli.entries import Entry
    from kvcag.core import Chunk, Item, MergedContext, MergeReport, Usage
    from kvcag.engines.hf import HFEngine
    from kvcag.engines.session import Session
    from kvcag.memory import KVCacheMemory

Ids = Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="Answer from this item only; repeatable.")]

_HELP = """/reset   forget the conversation; the documents stay
/undo    remove the last turn
/context list the documents
/help    show this list
/exit    leave, as Ctrl-D does. Ctrl-C cancels an answer; a second Ctrl-C leaves."""


def ask(
    question: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")],
    model: Model = None,
    store: Store = None,
    namespace: Namespace = "",
    ids: Ids = None,
    source: Source = None,
    strategy: StrategyOption = "auto",
    ratio: Ratio = 0.2,
    instruction: Instruction = INSTRUCTION,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    as_json: Json = False,
) -> None:
    """Answer a question from the items of a store, or from chosen ones.

    The items are merged. With --strategy exact the model reads the whole store once as one context and keeps that
    context in the store; later questions reuse it. The answer is on stdout; stderr shows what was reused.

    For example:

        kvcag ask "Who is responsible for backups?"

        kvcag ask "What changed?" --source notes/today.md --source notes/yesterday.md

        kvcag ask "Who was late?" --id 3f9c --id 81aa --strategy query --ratio 0.1 --json | jq -r .answer
    """
    question = sys.stdin.read() if question == "-" else question
    if not question.strip():
        raise EmptyPromptError("the question is empty: there is nothing to answer")
    corpus = open_corpus(model, store, namespace, instruction, ids, source)
    engine = corpus.engine
    started = time.perf_counter()
    context = corpus.context(question, strategy, ratio)
    sampling = engine.sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    prompt = engine.build_prompt(None, context)
    chunks = engine.stream(prompt, sampling, context, namespace=namespace, started=started)
    answer, usage = _read(chunks, silent=as_json)
    if as_json:
        facts = {"ids": [entry.id for entry in corpus.entries], "model": engine.model_name}
        output.emit({"question": question, "answer": answer, **facts, **_figures(usage, context.report)})
    else:
        output.stderr().print(_summary(usage, context.report), style="dim")


def chat(
    model: Model = None,
    store: Store = None,
    namespace: Namespace = "",
    ids: Ids = None,
    source: Source = None,
    strategy: StrategyOption = "auto",
    ratio: Ratio = 0.2,
    instruction: Instruction = INSTRUCTION,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    as_json: Json = False,
) -> None:
    r"""Talk about the items of a store, or about chosen ones. Each turn prefills its own tokens only.

    Ctrl-C cancels an answer and removes its turn; a second Ctrl-C, or Ctrl-D, leaves. Lines from a pipe are turns:
    with --json each answer is one line of JSON.

    For example:

        kvcag chat

        kvcag chat --source notes/ --strategy query

        printf 'Who is it about?\nAnd where?\n' | kvcag chat --json | jq -r .answer
    """
    corpus = open_corpus(model, store, namespace, instruction, ids, source)
    if sys.stdin.isatty():
        documents = output.counted(len(corpus.entries), "item")
        say(f"{documents} and {Path(corpus.engine.model_name).name}; /help lists the commands")
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    _Conversation(corpus, strategy, ratio, settings, as_json).run()


@dataclass(frozen=True, slots=True)
class Corpus:
    """The items of a store to answer from.

    Attributes:
        memory: the model and the store.
        entries: the items, in the order in which the model reads them.
        is_whole: these are all items of the store that the model made.
    """

    memory: KVCacheMemory
    entries: list[Entry]
    is_whole: bool

    @property
    def engine(self) -> HFEngine:
        """The model."""
        from kvcag.engines.hf import HFEngine

        assert isinstance(self.memory.engine, HFEngine)
        return self.memory.engine

    def context(self, question: str, strategy: Strategy, ratio: float) -> MergedContext:
        """Put the items together for a question.

        Args:
            question: the question; strategy `query` chooses tokens by it.
            strategy: as for `KVCacheMemory.merge`. `exact` keeps the context of a whole store in the store, and `auto`
                uses that context if it is there.
            ratio: the recompute ratio of a merge, in [0, 1].

        Raises:
            InvalidInputError: items and question exceed the model's context.
        """
        from kvcag.documents import segment
        from kvcag.memory import insert_documents

        memory, documents = self.memory, self.memory.documents
        texts = [segment(entry.text) for entry in self.entries]
        messages = insert_documents(memory.instruction or "", texts, [{"role": "user", "content": question}])
        prompt = self.engine.template.prompt(messages)
        try:
            self.engine.check_fits(len(prompt.token_ids), 1)
        except ContextLengthError as long:
            raise InvalidInputError(
                f"{output.counted(len(self.entries), 'item')} with the question are {long.prompt_tokens:,} tokens, and "
                f"the model's context is {long.limit:,}: choose fewer with --id or --source."
            ) from long
        whole_ids = tuple(chain.from_iterable(prompt.document_ids))
        if self.is_whole and (strategy == "exact" or self._prefers(whole_ids, strategy)):
            if not documents.contains(prompt.head_ids, whole_ids):
                say(f"reading {output.counted(len(self.entries), 'item')}, {len(whole_ids):,} tokens, as one context")
            item, is_new = documents.find_or_encode(
                prompt.head_ids, whole_ids, "".join(prompt.documents), self._made_of()
            )
            if is_new:
                self._delete_old_contexts(item.id)
            return exact_context(self.engine, item, prompt, memory.namespace, is_new=is_new)
        return memory.context_for(prompt, strategy, ratio)

    def _prefers(self, whole_ids: tuple[int, ...], strategy: Strategy) -> bool:
        """Whether `auto` answers from the context of the whole store: it is kept, or the model cannot merge."""
        from kvcag.cache.rope import check_mergeable
        from kvcag.errors import UnsupportedModelError

        if strategy != "auto":
            return False
        if self.memory.store.contains(self.memory.documents.key(whole_ids)):
            return True
        try:
            check_mergeable(self.engine.model)
        except UnsupportedModelError:
            return True
        return False

    def _made_of(self) -> dict[str, Any]:
        from kvcag.cli.entries import CONTEXT_OF
        from kvcag.stores.base import MADE_OF

        sources = [entry.manifest.metadata.get("source") for entry in self.entries]
        return {
            CONTEXT_OF: [entry.id for entry in self.entries],
            MADE_OF: [entry.text for entry in self.entries],
            "source": list(dict.fromkeys(source for source in sources if isinstance(source, str))),
        }

    def _delete_old_contexts(self, new: str) -> None:
        """Delete contexts that this model made of the whole store before the store changed."""
        from kvcag.cli.entries import read_entries

        store = self.memory.store
        if store.contains(new):  # else the store cannot be written
            old = [entry for entry in read_entries(store)[0] if entry.members and _made_by(self.engine, entry)]
            store.delete(entry.id for entry in old if entry.id != new)


def exact_context(
    engine: HFEngine, item: Item, prompt: Prompt, namespace: str = "", *, is_new: bool = False
) -> MergedContext:
    """Return the context of a prompt whose documents are one item; nothing but the instruction is prefilled.

    Args:
        engine: the model.
        item: all documents of the prompt. If it was encoded behind another instruction, it is encoded again.
        prompt: instruction, documents and question.
        namespace: the namespace of recent contexts.
        is_new: the item was encoded for this prompt; for the report.
    """
    from kvcag.cache.layers import concat, layers_of
    from kvcag.core import KVCacheItem, MergeReport, ids_digest

    assert isinstance(item, KVCacheItem)
    if item.prefix_digest != ids_digest(prompt.head_ids):
        return engine.exact_context(prompt.context_ids, prompt.tail_ids, namespace)
    layers = [(keys.to(engine.device), values.to(engine.device)) for keys, values in layers_of(item.memory)]
    if prompt.head_ids:
        layers = concat([engine.prefill(prompt.head_ids, namespace=namespace)[0], layers])
    count = len(prompt.context_ids)
    encoded = count if is_new else 0
    report = MergeReport("encoded" if is_new else "prefix", "exact", count, count - encoded, 0, encoded)
    return engine.context_of(layers, prompt.context_ids, prompt.tail_ids, report)


def open_corpus(
    model: str | None,
    store: Path | None,
    namespace: str,
    instruction: str,
    ids: list[str] | None,
    sources: list[str] | None,
) -> Corpus:
    """Choose items of a store, then load the model.

    Raises:
        UnknownItemError: no item has such an id.
        FingerprintMismatchError: another model made the items.
    """
    from kvcag.cli.entries import choose, find, open_existing, read_entries

    opened = open_existing(store, namespace)
    entries = read_entries(opened)[0]
    chosen = sorted((entry for entry in entries if not entry.is_context), key=_place)
    if ids or sources:
        from_sources = choose(chosen, sources, None) if sources else []
        chosen = list({entry.id: entry for entry in [*find(entries, ids or []), *from_sources]}.values())
    if not chosen or opened is None:
        what = "no item has this source" if entries else "there are no items"
        say(f"{what} in {store or default_store()}. `kvcag ls` lists items; `kvcag encode PATH` adds some.")
        raise typer.Exit(NEGATIVE)
    engine = load_engine(model)
    own = [entry for entry in chosen if _made_by(engine, entry)]
    if not own or (ids and len(own) < len(chosen)):
        other = next(entry for entry in chosen if entry not in own)
        made_by = other.manifest.fingerprint
        differences = engine.fingerprint.differences(made_by) if made_by else ["it names no model"]
        raise FingerprintMismatchError(f"item {other.short} ({made_by.model_name if made_by else '?'})", differences)
    if len(own) < len(chosen):
        say(f"{output.counted(len(chosen) - len(own), 'item')} of other models left out")
    from kvcag.memory import KVCacheMemory

    memory = KVCacheMemory(engine, opened, instruction, namespace=namespace)
    return Corpus(memory, own, not (ids or sources))


def _made_by(engine: HFEngine, entry: Entry) -> bool:
    made_by = entry.manifest.fingerprint
    return made_by is not None and engine.fingerprint.matches(made_by)


def _place(entry: Entry) -> tuple[str, int, str]:
    """Sort files by name and the parts of a file by number, so that the context does not depend on when."""
    metadata = entry.manifest.metadata
    return str(metadata.get("source", "")), int(metadata.get("part", 0)), entry.id


class _Conversation:
    """Reads turns and answers them. A cancelled turn is removed.

    Args:
        corpus: the items to answer from.
        strategy: how they are put together, for the first question; so is `ratio`.
        ratio: the recompute ratio, in [0, 1].
        settings: settings of `Sampling`.
        as_json: print one JSON object per turn in place of the text.
    """

    def __init__(
        self, corpus: Corpus, strategy: Strategy, ratio: float, settings: dict[str, Any], as_json: bool
    ) -> None:
        self.corpus, self.strategy, self.ratio, self.settings, self.as_json = corpus, strategy, ratio, settings, as_json
        self.session: Session | None = None
        self._report: MergeReport | None = None

    def run(self) -> None:
        """Answer until the end of the input, /exit, or a second Ctrl-C."""
        interrupted = False
        while True:
            try:
                line = self._read_line()
                if line is None or line.split(maxsplit=1)[:1] in (["/exit"], ["/quit"]):
                    return
                if line.startswith("/"):
                    self._command(line.split()[0])
                elif line:
                    interrupted = False
                    self._answer(line)
            except KeyboardInterrupt:
                if interrupted:
                    return
                if not sys.stdin.isatty():
                    raise
                interrupted = True
                typer.echo(err=True)
                say("cancelled; Ctrl-C again, or Ctrl-D, leaves")

    def _command(self, name: str) -> None:
        turns = len(self.session.turns) if self.session else 0
        if name == "/reset":
            self.session = self._report = None
            say("the conversation is forgotten; the documents stay")
        elif name == "/undo" and self.session and turns:
            self.session.rollback()
            say(f"the last turn is removed; {output.counted(turns - 1, 'turn')} left")
        elif name == "/context":
            for entry in self.corpus.entries:
                say(f"{entry.short}  {entry.manifest.tokens:>7,} tokens  {entry.source}")
        else:
            say("there is no turn to remove" if name == "/undo" else f"the commands are\n{_HELP}")

    def _answer(self, question: str) -> None:
        try:
            answer, usage = self._turn(question)
        except (InvalidInputError, PromptError) as refused:  # most often the prompt is too long
            if not sys.stdin.isatty():
                raise
            say(f"{refused} /reset forgets the conversation." if self.session else str(refused))
            return
        report = self._report if self.session and len(self.session.turns) == 1 else None
        if self.as_json:
            output.emit_line({"question": question, "answer": answer, **_figures(usage, report)})
            return
        later = f"{usage.cached_tokens:,} tokens reused, {usage.created_tokens:,} read; {_timing(usage)}"
        output.stderr().print(_summary(usage, report) if report else later, style="dim")

    def _turn(self, question: str) -> tuple[str, Usage]:
        started = time.perf_counter()
        if self.session is None:
            from kvcag.engines.session import Session

            context = self.corpus.context(question, self.strategy, self.ratio)
            self.session, self._report = Session(self.corpus.engine, context), context.report
        prepared = time.perf_counter() - started
        stream = self.session.stream(question, **self.settings)
        try:
            answer, usage = _read(stream, silent=self.as_json)
        finally:
            stream.close()
        return answer, replace(usage, ttft_s=usage.ttft_s + prepared, total_s=usage.total_s + prepared)

    def _read_line(self) -> str | None:
        """Return a line without surrounding blanks, or None at the end of the input."""
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


def _read(chunks: Iterable[Chunk], *, silent: bool) -> tuple[str, Usage]:
    """Return an answer and its usage; print the answer as it is generated, unless `silent`."""
    answer, usage = "", None
    for chunk in chunks:
        answer += chunk.text
        usage = chunk.usage or usage
        if not silent:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    if not silent:
        typer.echo()
    assert usage is not None  # the last chunk has it
    return answer.strip(), usage


def _figures(usage: Usage, report: MergeReport | None) -> dict[str, object]:
    """Return usage and report for JSON. Counts are tokens, times are seconds."""
    return {
        "context": asdict(report) if report else None,
        "usage": {name: value for name, value in asdict(usage).items() if name != "context"},
    }


def _summary(usage: Usage, report: MergeReport) -> str:
    parts = [f"{report.reused_tokens:,} of {report.context_tokens:,} context tokens reused"]
    if report.recomputed_tokens:
        parts.append(f"{report.recomputed_tokens:,} recomputed ({report.strategy})")
    if report.encoded_tokens:
        parts.append(f"{report.encoded_tokens:,} encoded")
    reason = report.reason.replace("kvcag.calibrate(engine, documents)", "`kvcag doctor`")
    return f"{', '.join(parts)}; {_timing(usage)}{f' [{reason}]' if reason else ''}"


def _timing(usage: Usage) -> str:
    tokens = output.counted(usage.completion_tokens, "token")
    return f"first token after {usage.ttft_s:.2f} s, {tokens} in {usage.total_s:.2f} s"
