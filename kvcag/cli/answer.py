"""`kvcag ask` and `kvcag chat`: answers from the items of a store."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from kvcag.cli import common
from kvcag.cli.common import INSTRUCTION, Instruction, Json, Model, Namespace, Ratio, Source, Store, StrategyOption
from kvcag.cli.files import fitting
from kvcag.errors import ContextLengthError, EmptyPromptError, FingerprintMismatchError, InvalidInputError, PromptError

if TYPE_CHECKING:
    from kvcag.chat_template import Message, Prompt
    from kvcag.cli.entries import Entry
    from kvcag.core import Usage
    from kvcag.engines.hf import HFEngine
    from kvcag.memory import KVCacheMemory

_MAX_NEW_TOKENS = "Generate at most this many tokens. Default: 512, or as many as fit into the model's context."
_TEMPERATURE = "Sample at this temperature; 0 is greedy."

_QUESTION = "Files or folders to answer from (optional), then the question. Type - to read the question from stdin."
_K = "Answer from at most this many items. Default: 4 items of PATH; without PATH, all items of the store."
_TAKEN = 4

_HELP = """/reset   forget the conversation; the documents stay
/undo    remove the last turn
/context list the documents
/help    show this list
/exit    leave, as Ctrl-D does. Ctrl-C cancels an answer; a second Ctrl-C leaves."""


@dataclass(frozen=True, slots=True)
class Answering:
    """Options of `ask` and `chat`: the items to answer from, and how to answer."""

    model: Model = None
    store: Store = None
    namespace: Namespace = ""
    id: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Answer from this item; repeatable. Default: all items.")
    ] = None
    source: Source = None
    strategy: StrategyOption = "auto"
    ratio: Ratio = 0.2
    instruction: Instruction = INSTRUCTION
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help=_MAX_NEW_TOKENS)] = None
    temperature: Annotated[float, typer.Option(min=0, help=_TEMPERATURE)] = 0.0
    as_json: Json = False


@common.takes(Answering)
def ask(
    words: Annotated[list[str], typer.Argument(metavar="[PATH]... QUESTION", help=_QUESTION)],
    options: Answering,
    k: Annotated[int | None, typer.Option("--k", min=1, help=_K)] = None,
) -> None:
    """Answer a question from files, or from items of a store.

    New and changed files are encoded first, as by `kvcag encode`. If there are more than --k items, those whose words
    fit the question best are used (BM25), and stderr names their files. The items' caches are merged. With --strategy
    exact, the model encodes the whole store once as one context and stores that context; later questions reuse it. The
    answer is printed on stdout; stderr shows how many tokens were reused.

    For example:

        kvcag ask notes/ "Who is responsible for backups?"

        kvcag ask "What changed?" --source notes/today.md --source notes/yesterday.md

        kvcag ask "Who was late?" --id 3f9c --id 81aa --strategy query --ratio 0.1 --json | jq -r .answer
    """
    *paths, question = words
    question = sys.stdin.read() if question == "-" else question
    if not question.strip():
        raise EmptyPromptError("the question is empty: type a question")
    corpus = corpus_of(paths, options) if paths else open_corpus(options)
    fitting = corpus.fitting(question, k or (_TAKEN if paths else len(corpus.entries)))
    text, usage = fitting.answer([{"role": "user", "content": question}])
    if options.as_json:
        facts = {"ids": [entry.id for entry in fitting.entries], "model": corpus.memory.engine.model_name}
        common.emit({"question": question, "answer": text.strip(), **facts, **_figures(usage)})
        return
    if len(fitting.entries) < len(corpus.entries) or paths:
        named = dict.fromkeys(entry.source for entry in fitting.entries)
        common.stderr().print(f"from {', '.join(named)}", style="dim")
    common.stderr().print(_summary(usage), style="dim")
    if paths:
        common.stderr().print(fitting.gain(usage), style="dim")
    common.then(f"chat{common.paths(options.id, '--id')}{common.paths(paths or options.source, '--source')}")


@common.takes(Answering)
def chat(options: Answering) -> None:
    r"""Chat about items of a store. Each turn prefills only its own tokens.

    Ctrl-C cancels an answer and removes its turn. A second Ctrl-C, or Ctrl-D, ends the chat. From a pipe, each line is
    a turn. With --json, each answer is one line of JSON.

    For example:

        kvcag chat

        kvcag chat --source notes/ --strategy query

        printf 'Who is it about?\nAnd where?\n' | kvcag chat --json | jq -r .answer
    """
    corpus = open_corpus(options)
    if sys.stdin.isatty():
        documents = common.counted(len(corpus.entries), "item")
        common.say(f"{documents} and {Path(corpus.memory.engine.model_name).name}; /help lists the commands")
    conversation = _Conversation(corpus)
    conversation.run()
    if not options.as_json:
        common.then(f"doctor{common.paths(options.source, '--corpus')}" if conversation.is_uncalibrated else "ls")


@dataclass(frozen=True, slots=True)
class Corpus:
    """The items to answer from.

    Attributes:
        memory: the model and the store.
        entries: the items, in the order in which the model reads them.
        options: how to answer. Strategy `exact` stores the context of the whole store, and `auto` uses that context if
            it is stored.
        is_part: whether the store has more items.
    """

    memory: KVCacheMemory
    entries: list[Entry]
    options: Answering
    is_part: bool = False

    def fitting(self, question: str, count: int) -> Corpus:
        """The `count` items whose words fit a question best (BM25), in their present order. All, if there are fewer."""
        if len(self.entries) <= count:
            return self
        places = fitting([entry.text for entry in self.entries], question, count)
        return replace(self, entries=[self.entries[place] for place in places], is_part=True)

    def gain(self, usage: Usage) -> str:
        """The time to the first word, and the speed-up over encoding the items, whose metadata has their times."""
        context = usage.context
        assert context is not None
        first = f"{usage.ttft_s:.2f} s to the first word"
        how = "exact" if context.is_exact else f"merged ({context.strategy})"
        timed = [entry.manifest.metadata.get(common.ENCODING_S) for entry in self.entries]
        seconds = [one for one in timed if isinstance(one, float)]
        if context.mode == "encoded" or len(seconds) < len(timed):
            return f"{first}, {how}"
        reading = sum(seconds) + usage.ttft_s * (1 - context.reused_tokens / context.context_tokens)
        return f"{first} (about {reading:.1f} s without caches): {common.faster(reading, usage.ttft_s)}, {how}"

    def answer(self, conversation: list[Message]) -> tuple[str, Usage]:
        """Answer the last message of a conversation. Without `--json`, print the answer as it is generated.

        Raises:
            InvalidInputError: the items and the conversation exceed the model's context.
        """
        started = time.perf_counter()
        engine, options = self.memory.engine, self.options
        sampling = engine.sampling(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
        prompt = self._prompt([entry.text for entry in self.entries], conversation)
        try:
            engine.check_fits(len(prompt.token_ids), 1)
        except ContextLengthError as long:
            what = "with the question" if len(conversation) == 1 else "with the conversation"
            raise InvalidInputError(
                f"{common.counted(len(self.entries), 'item')} {what} have {long.prompt_tokens:,} tokens, but the "
                f"model's context is {long.limit:,}. Choose fewer items with --id or --source."
            ) from long
        engine.check_fits(len(prompt.token_ids), sampling.max_new_tokens)
        is_new = False
        if not (options.id or options.source or self.is_part):
            whole = self._prompt(["".join(prompt.documents)], conversation)
            if options.strategy == "exact" or self._prefers(whole):
                prompt, is_new = whole, self._keep(whole)
        prepared = time.perf_counter() - started
        chunks = self.memory.stream(prompt, strategy=options.strategy, ratio=options.ratio, sampling=sampling)
        text, usage, flow = "", None, common.Flow()
        with contextlib.closing(chunks):
            for chunk in chunks:
                text, usage = text + chunk.text, chunk.usage
                if not options.as_json:
                    flow.write(chunk.text)
            if not options.as_json:
                flow.end()
        assert usage is not None  # the last chunk has it
        usage = replace(usage, ttft_s=usage.ttft_s + prepared, total_s=usage.total_s + prepared)
        return text, _as_encoded(usage) if is_new else usage

    def _prompt(self, texts: list[str], conversation: list[Message]) -> Prompt:
        from kvcag.chat_template import segment
        from kvcag.memory import insert_documents

        messages = insert_documents(self.memory.instruction or "", list(map(segment, texts)), conversation)
        return self.memory.engine.template.prompt(messages)

    def _prefers(self, whole: Prompt) -> bool:
        """Whether `auto` uses the context of the whole store: if it is stored, or if `auto` would not merge."""
        from kvcag.calibration import calibration_of

        engine = cast("HFEngine", self.memory.engine)

        if self.options.strategy != "auto":
            return False
        if self.memory.store.contains(self.memory.documents.key(whole.document_ids[0])):
            return True
        return not engine.is_mergeable or (engine.is_recurrent and calibration_of(engine) is None)

    def _keep(self, whole: Prompt) -> bool:
        """Store the context of the whole store, and delete the earlier one. Return whether it had to be encoded."""
        from kvcag.cli.entries import CONTEXT_OF, made_by, read_entries
        from kvcag.stores.base import MADE_OF

        memory, tokens = self.memory, whole.document_ids[0]
        if memory.documents.contains(whole.head_ids, tokens):
            return False
        common.say(f"encoding {common.counted(len(self.entries), 'item')} as one context of {len(tokens):,} tokens")
        sources = [entry.manifest.metadata.get("source") for entry in self.entries]
        made_of = {
            CONTEXT_OF: [entry.id for entry in self.entries],
            MADE_OF: [entry.text for entry in self.entries],
            "source": list(dict.fromkeys(source for source in sources if isinstance(source, str))),
        }
        item, is_new = memory.documents.find_or_encode(whole.head_ids, tokens, whole.documents[0], made_of)
        if memory.store.contains(item.id):  # False if the store could not be written
            old = [each for each in read_entries(memory.store)[0] if each.members and each.id != item.id]
            memory.store.delete(each.id for each in old if made_by(memory.engine, each.manifest))
        return is_new


def _as_encoded(usage: Usage) -> Usage:
    """The usage of an answer whose context was encoded and stored just before it."""
    context = usage.context
    assert context is not None
    tokens = context.context_tokens
    made = replace(context, mode="encoded", reused_tokens=0, encoded_tokens=tokens)
    cached = max(0, usage.cached_tokens - tokens)
    return replace(usage, cached_tokens=cached, created_tokens=usage.prompt_tokens - cached, context=made)


def corpus_of(paths: list[str], options: Answering) -> Corpus:
    """Encode new and changed files, and return the items of all the files.

    Raises:
        InvalidInputError: a file does not exist or has no text.
    """
    if options.id or options.source:
        raise InvalidInputError("PATH cannot be combined with --id or --source: pass one of them")
    from kvcag.cli.encode import Encoding, bring
    from kvcag.cli.entries import read_entries
    from kvcag.cli.files import read_texts

    reading = read_texts(paths)
    encoding = Encoding(options.model, options.store, options.namespace, options.instruction)
    memory = encoding.memory(encoding.open())
    entries = read_entries(memory.store)[0]
    wanted, encoded = bring(memory, reading, entries)
    if encoded:
        entries = read_entries(memory.store)[0]
    chosen = [entry for entry in entries if entry.id in wanted]
    return Corpus(memory, sorted(chosen, key=_place), options, is_part=True)


def open_corpus(options: Answering) -> Corpus:
    """Choose items of a store, then load the model.

    Raises:
        UnknownItemError: no item has a given id.
        FingerprintMismatchError: another model made the items.
    """
    from kvcag.cli.entries import choose, find, made_by, open_existing, read_entries

    opened = open_existing(options.store, options.namespace)
    entries = read_entries(opened)[0]
    chosen = sorted((entry for entry in entries if entry.is_document), key=_place)
    if options.id or options.source:
        from_sources = choose(chosen, options.source, None) if options.source else []
        chosen = list({entry.id: entry for entry in [*find(entries, options.id or []), *from_sources]}.values())
    if not chosen or opened is None:
        what = "no item has this source" if entries else "there are no items"
        place = options.store or common.default_store()
        common.say(f"{what} in {place}. `kvcag ls` lists items; `kvcag encode PATH` adds items.")
        raise typer.Exit(common.NEGATIVE)
    engine = common.load_engine(options.model)
    own = [entry for entry in chosen if made_by(engine, entry.manifest)]
    if not own or (options.id and len(own) < len(chosen)):
        other = next(entry for entry in chosen if entry not in own)
        found = other.manifest.fingerprint
        differences = engine.fingerprint.differences(found) if found else ["the item has no fingerprint"]
        raise FingerprintMismatchError(f"item {other.short} ({found.model_name if found else '?'})", differences)
    if len(own) < len(chosen):
        common.say(f"{common.counted(len(chosen) - len(own), 'item')} of other models left out")
    from kvcag.memory import KVCacheMemory

    # Room for a conversation of any length among the recent contexts, both merged and exact.
    room = 2 * engine.context_length * engine.bytes_per_token
    engine.prefixes.max_bytes = max(engine.prefixes.max_bytes, room)
    return Corpus(KVCacheMemory(engine, opened, options.instruction, namespace=options.namespace), own, options)


def _place(entry: Entry) -> tuple[str, int, str]:
    """A sort key: by file name, then by part number, so that the context does not depend on encoding times."""
    metadata = entry.manifest.metadata
    return str(metadata.get("source", "")), int(metadata.get("part", 0)), entry.id


class _Conversation:
    """Reads turns and answers them. A turn is added to the messages when its answer is complete."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.messages: list[Message] = []
        self.is_uncalibrated = False

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
                common.echo(err=True)
                common.say("cancelled; press Ctrl-C again, or Ctrl-D, to leave")

    def _command(self, name: str) -> None:
        if name == "/reset":
            self.messages.clear()
            common.say("the conversation is forgotten; the documents stay")
        elif name == "/undo" and self.messages:
            del self.messages[-2:]
            common.say(f"the last turn is removed; {common.counted(len(self.messages) // 2, 'turn')} left")
        elif name == "/context":
            for entry in self.corpus.entries:
                common.say(f"{entry.short}  {entry.manifest.tokens:>7,} tokens  {entry.source}")
        else:
            common.say("there is no turn to remove" if name == "/undo" else f"the commands are\n{_HELP}")

    def _answer(self, question: str) -> None:
        asked: list[Message] = [*self.messages, {"role": "user", "content": question}]
        try:
            text, usage = self.corpus.answer(asked)
        except (InvalidInputError, PromptError) as refused:  # usually because the prompt is too long
            if not sys.stdin.isatty():
                raise
            common.say(f"{refused} /reset forgets the conversation." if self.messages else str(refused))
            return
        if self.corpus.options.as_json:
            common.emit({"question": question, "answer": text.strip(), **_figures(usage)}, indent=None)
        elif self.messages:
            read = f"{usage.cached_tokens:,} tokens reused, {usage.created_tokens:,} read"
            common.stderr().print(f"{read}; {_timing(usage)}", style="dim")
        else:
            common.stderr().print(_summary(usage), style="dim")
        self.messages = [*asked, {"role": "assistant", "content": text}]
        self.is_uncalibrated = usage.context is not None and "not calibrated" in usage.context.reason

    def _read_line(self) -> str | None:
        """Return a line without surrounding white space, or None at the end of the input."""
        if not sys.stdin.isatty():
            line = sys.stdin.readline()
            return line.strip() if line else None
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() editing and a history
        try:
            return input("\n> ").strip()
        except EOFError:
            common.echo(err=True)
            return None


def _figures(usage: Usage) -> dict[str, object]:
    """Return the usage for JSON. Counts are in tokens, times in seconds."""
    figures = asdict(usage)
    return {"context": figures.pop("context"), "usage": figures}


def _summary(usage: Usage) -> str:
    context = usage.context
    assert context is not None
    parts = [f"{context.reused_tokens:,} of {context.context_tokens:,} context tokens reused"]
    if context.recomputed_tokens:
        parts.append(f"{context.recomputed_tokens:,} recomputed ({context.strategy})")
    if context.encoded_tokens:
        parts.append(f"{context.encoded_tokens:,} encoded")
    reason = context.reason.replace("kvcag.calibrate(engine, documents)", "`kvcag doctor`")
    return f"{', '.join(parts)}; {_timing(usage)}{f' [{reason}]' if reason else ''}"


def _timing(usage: Usage) -> str:
    tokens = common.counted(usage.completion_tokens, "token")
    return f"first token after {usage.ttft_s:.2f} s, {tokens} in {usage.total_s:.2f} s"
