"""MemoryCube: texts and the caches made from them, as one memory.

The idea comes from MemOS, whose cube holds a plaintext memory and an activation memory. Here the caches follow the
texts: editing or deleting a text deletes its caches, and the model encodes a text that has no cache.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from operator import methodcaller
from os import PathLike
from typing import Any, cast

from kvcag.cache.layers import layers_of, mapped
from kvcag.chat_template import Message, Prompt, as_messages
from kvcag.concurrency import async_twin, iterate
from kvcag.contexts import Read
from kvcag.core import (
    DEFAULT_RATIO,
    MAX_KL,
    Answer,
    Chunk,
    KVCacheItem,
    Mode,
    Strategy,
    TextualMemoryItem,
)
from kvcag.cube.dump import CubeDump, read_dump, write_dump
from kvcag.cube.texts import (
    ListedTexts,
    RetrieverTexts,
    SearchableTexts,
    TextSide,
    distinct,
    is_made_of,
    live_of,
    read_all,
    stripped,
)
from kvcag.engines.base import Engine
from kvcag.engines.constrain import ConstraintLike
from kvcag.engines.hf import HFEngine
from kvcag.errors import (
    CacheWarning,
    ContextLengthError,
    CorpusLengthError,
    CorruptItemError,
    FormatError,
    InvalidInputError,
    UnknownItemError,
)
from kvcag.memory import KVCacheMemory, insert_documents
from kvcag.stores.base import DeletionReport, Described, KVStore
from kvcag.stores.dump import purge_dump
from kvcag.stores.files import is_instruction

_QUESTION: Message = {"role": "user", "content": "…"}


@dataclass(frozen=True, slots=True)
class CubeAnswer(Answer):
    """An answer, the texts in its prompt, and which of them were cached.

    Attributes:
        sources: the texts in the prompt, in order.
        cached: the ids of the texts that came from caches.
        encoded: the ids of the texts that were encoded for this answer.
    """

    sources: list[TextualMemoryItem] = field(default_factory=list)
    cached: tuple[str, ...] = ()
    encoded: tuple[str, ...] = ()

    @property
    def side(self) -> Mode:
        """How the texts got into the context.

        `encoded`: at least one text was encoded for this answer, or there were no texts. `prefix`: all texts came from
        caches that equal a full prefill. `merged`: all texts came from caches that were merged.
        """
        if self.encoded or not self.sources:
            return "encoded"
        return "prefix" if self.report is None or self.report.is_exact else "merged"


@dataclass(frozen=True, slots=True)
class _Opened:
    """An answer that is prepared, but not generated. `held` says for each document whether it was cached before."""

    sources: list[TextualMemoryItem]
    prompt: Prompt
    held: list[bool]
    merges: bool
    chunks: Generator[Chunk, None, None]

    def answer(self) -> CubeAnswer:
        """Generate the answer."""
        whole, held, ids = Answer.of(self.chunks), self.held, [text.id for text in self.sources]
        report = whole.report
        if report is not None and report.strategy == "exact" and self.merges:  # documents after the prefix were encoded
            held = [place.stop <= report.reused_tokens for place in self.prompt.document_places]
        elif report is not None and self.merges and all(held) and report.encoded_tokens > len(self.prompt.head_ids):
            held = [False] * len(held)  # a cache was damaged, or evicted meanwhile
        if len(held) != len(ids):  # with strategy "exact" all texts are one document
            held = [all(held)] * len(ids)
        cached = tuple(id for id, was_held in zip(ids, held, strict=True) if was_held)
        encoded = tuple(id for id, was_held in zip(ids, held, strict=True) if not was_held)
        return CubeAnswer(whole.text, whole.usage, whole.finish_reason, self.sources, cached, encoded)


class MemoryCube:
    """Holds texts, and keeps their caches in step with them. Thread-safe.

    ```python
    cube = MemoryCube("Qwen/Qwen3-0.6B", instruction="Answer from the notes.")
    cube.add(["The tower was completed in 1889.", "The bridge was opened in 1932."])
    print(cube.ask("When was the tower completed?"))
    cube.dump("cube/")
    ```

    Args:
        engine: the model that encodes and answers: a Hugging Face hub id, a folder, or an engine.
        texts: the place that finds texts, such as `kvcag.langchain.VectorStoreTexts` or
            `kvcag.llama_index.IndexTexts`. Without it, every question is answered from all texts.
        store: stores the caches: a folder, or a store that only this cube uses. In memory by default.
        instruction: stands before the texts, in the system turn.
        namespace: the user or corpus of the cube. Two namespaces share no file, no cache and no recent context. A
            store that is passed as an object must have this namespace.
        strategy: how the caches of several texts are merged, as for `KVCacheMemory.merge`. With `"exact"`, the texts
            of a question have one cache together: the answer is that of a full prefill, and after an edit all of them
            are encoded again. With every other strategy, each text has its own cache.
        ratio: the recompute ratio, 0 to 1.

    Attributes:
        memory: the `KVCacheMemory` of the caches.
        texts: the place that finds texts, or None.

    Raises:
        InvalidInputError: `engine` is neither a name nor an engine.
    """

    def __init__(
        self,
        engine: Engine | str | PathLike[str],
        texts: TextSide | None = None,
        store: KVStore | str | PathLike[str] | None = None,
        *,
        instruction: str | None = None,
        namespace: str = "",
        strategy: Strategy = "auto",
        ratio: float = DEFAULT_RATIO,
    ) -> None:
        self.memory = KVCacheMemory(engine, store, instruction, namespace=namespace)
        self.texts = texts
        self.namespace = namespace
        self.strategy = strategy
        self.ratio = ratio
        self._known: dict[str, TextualMemoryItem] = {}
        self._changes = 0
        self._undeleted: set[str] = set()  # texts whose caches a failed store may still have; deleted again later
        self._lock = threading.RLock()

    @classmethod
    def from_dir(
        cls,
        dir: str | PathLike[str],
        engine: Engine | str | PathLike[str],
        texts: TextSide | None = None,
        store: KVStore | str | PathLike[str] | None = None,
        **settings: Any,
    ) -> MemoryCube:
        """Make a cube from a dump, with the dump's instruction and namespace.

        Args:
            dir: the folder of the dump.
            engine: as for the class.
            texts: as for the class.
            store: as for the class.
            **settings: further arguments of the class.

        Raises:
            StoreUnavailableError, CorruptItemError, FormatError, InvalidInputError: as `load`.
        """
        dumped = read_dump(dir)
        settings = {"instruction": dumped.instruction, "namespace": dumped.namespace, **settings}
        cube = cls(engine, texts, store, **settings)
        cube._load(dir, dumped)
        return cube

    def __repr__(self) -> str:
        of = f" of {self.namespace!r}" if self.namespace else ""
        return f"<MemoryCube{of}: {len(self._known)} texts over {self.memory.engine!r} in {self.memory.store!r}>"

    # --- texts ---------------------------------------------------------------------------------------------------

    def add(self, documents: object) -> list[str]:
        """Add texts, and return their ids in order. Does not encode them; see `encode`.

        A text replaces an earlier text with the same id, and the caches of the earlier text are deleted.

        Args:
            documents: one or several of these: a str, a LangChain `Document`, a LlamaIndex node (its text as the LLM
                reads it) or a `TextualMemoryItem`. A document without an id gets an id made from its text.

        Raises:
            EmptyPromptError: a text is empty. Nothing was added.
            InvalidInputError: a document has no text, or `texts` is read-only.
        """
        texts = read_all(documents)
        with self._lock:
            self._look()
            new = [text for text in texts if self._known.get(text.id) != text]
            if self.texts is not None and new:
                self.texts.add(new)
            self._follow(new)
        return [text.id for text in texts]

    def edit(self, id: str, text: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Change a text. Deletes its caches, and keeps those of other texts.

        Args:
            id: the id of the text.
            text: the new text.
            metadata: the new metadata; None keeps the old metadata.

        Raises:
            UnknownItemError: the cube has no text with this id.
        """
        with self._lock:
            known = self.get(id)
            if known is None:
                raise UnknownItemError([id], "Add it: cube.add(...).")
            self.add(
                TextualMemoryItem(id=id, memory=text, metadata=dict(known.metadata if metadata is None else metadata))
            )

    def delete(self, ids: str | Sequence[str]) -> DeletionReport:
        """Delete texts, here and in `texts`, and every cache made from them, in every tier of the store.

        Unknown ids are ignored.

        Returns:
            What was deleted where, and what could not be deleted. A store that fails does not raise: its failure is in
            the report, and the next deletion tries again.
        """
        listed = [ids] if isinstance(ids, str) else list(ids)
        failed = {}
        with self._lock:
            if self.texts is not None:
                try:
                    self.texts.delete(listed)
                except Exception as error:  # any database may raise here, and the caches must still be deleted
                    failed[type(self.texts).__name__] = f"{type(error).__name__}: {error}"
                    warnings.warn(f"texts could not be deleted from {failed}", CacheWarning, stacklevel=2)
            report = self._follow([], gone=listed)
            if self._undeleted and not report.failed:
                report += self._drop(set(), live_of(self._known.values()))
            return report + DeletionReport({}, failed)

    def sync(self, documents: object) -> DeletionReport:
        """Make these documents the cube's texts: add new ones, edit changed ones, and delete the others.

        Also deletes every cache in the store that was made from other texts, even by an earlier process. Encodes
        nothing.

        Args:
            documents: as for `add`.

        Raises:
            EmptyPromptError, InvalidInputError: as `add`.
        """
        texts = read_all(documents)
        ids, live = {text.id for text in texts}, live_of(texts)
        with self._lock:
            self.add(texts)
            report = self.delete([id for id in self._known if id not in ids])
            return report + self._erase(
                lambda item: not is_instruction(item.id) and not is_made_of(_text_of(item), live)
            )

    def purge(self, text: str, dumps: Iterable[str | PathLike[str]] = ()) -> DeletionReport:
        """Delete every cache made from a text that the cube no longer holds, and delete the text from dumps.

        For a text that the cube holds, call `delete`.

        Args:
            text: the text.
            dumps: folders that `dump` wrote. The text and its caches are deleted from them, too.

        Raises:
            InvalidInputError: the cube holds the text.
        """
        with self._lock:
            live = live_of(self._known.values())
            if stripped(text) in live:
                raise InvalidInputError("the cube holds this text. Call delete(id), which also deletes its caches.")
            report = self._drop({text}, live)
        folders = [dumps] if isinstance(dumps, str | PathLike) else dumps
        return sum((purge_dump(folder, text) for folder in folders), report)

    def get(self, id: str) -> TextualMemoryItem | None:
        """The text with this id, or None."""
        self._look()
        return self._known.get(id)

    def get_all(self) -> list[TextualMemoryItem]:
        """All texts of the cube, oldest first."""
        self._look()
        with self._lock:
            return list(self._known.values())

    def search(self, question: str, k: int | None = None) -> list[TextualMemoryItem]:
        """The texts for a question: those that `texts` finds, best first, or all texts if the cube cannot search.

        If `texts` finds a new or changed text, the cube takes it over.

        Args:
            question: the question.
            k: the maximum number of texts. None: `texts` decides.

        Raises:
            InvalidInputError: `k` was given and the cube cannot search.
        """
        if not isinstance(self.texts, SearchableTexts):
            if k is not None:
                raise InvalidInputError(
                    f"k={k} needs a search, but this cube cannot search its texts. Pass searchable texts (texts=…) to "
                    "the cube, or leave k out to answer from all texts."
                )
            return self.get_all()
        while True:
            changes = self._changes
            found = distinct(self.texts.search(question, k))
            with self._lock:
                if changes == self._changes:  # otherwise a found text may have been deleted: search again
                    self._follow(found)
                    return found

    # --- answers -------------------------------------------------------------------------------------------------

    def encode(self) -> int:
        """Encode texts that have no cache yet, ahead of questions, and return the number of new caches.

        Other threads can ask questions between two texts. With strategy `"exact"`, all texts get one cache together;
        but if `texts` can search, nothing is encoded, since only a question determines which texts stand together.

        Raises:
            UnsupportedModelError: the engine cannot encode documents ahead of a question.
            ContextLengthError: a text exceeds the model's context; with `"exact"`, all texts together exceed it.
        """
        texts = self.get_all()
        groups = [[text] for text in texts]
        if self.strategy == "exact":
            groups = [] if isinstance(self.texts, SearchableTexts) or not texts else [texts]
        return sum([self._encode(group) for group in groups])

    def ask(self, question: str | Sequence[Message], k: int | None = None, **answering: Any) -> CubeAnswer:
        """Answer a question from the cube's texts. If no text is found, the model answers without texts.

        `str(answer)` is the answer's text. The arguments and errors are those of `stream`.
        """
        opened = self._open(question, k, **answering)
        with closing(opened.chunks):
            return opened.answer()

    def stream(
        self,
        question: str | Sequence[Message],
        k: int | None = None,
        *,
        strategy: Strategy | None = None,
        ratio: float | None = None,
        max_kl: float = MAX_KL,
        constraint: ConstraintLike | None = None,
        **sampling: Any,
    ) -> Generator[Chunk, None, None]:
        """Answer a question from the cube's texts, as a stream of chunks. Closing the stream stops the model.

        Args:
            question: a str, or chat messages that end with the question.
            k: the maximum number of texts to answer from, if `texts` can search.
            strategy: as for the class; None: the cube's.
            ratio: the recompute ratio, 0 to 1; None: the cube's.
            max_kl: the error that strategy `"auto"` allows, in nats per token.
            constraint: a constraint on the answer: a pydantic model, a JSON schema, `Regex`, `Choices` or `Grammar`.
            **sampling: settings of `Sampling`, such as `max_new_tokens`.

        Raises:
            CorpusLengthError: the texts do not fit into the model's context. Nothing was encoded.
            InvalidInputError: a setting or strategy is unknown, or `k` is given and `texts` cannot search.
            ConstraintError: the constraint cannot be used.
        """
        return self._open(question, k, strategy, ratio, max_kl, constraint, **sampling).chunks

    # --- dumps ---------------------------------------------------------------------------------------------------

    def dump(self, dir: str | PathLike[str]) -> None:
        """Write texts and caches to a folder. An earlier dump is replaced in one step, or not at all.

        Caches made from texts that the cube does not hold are left out.

        Raises:
            StoreUnavailableError: the folder cannot be written, for example because the disk is full. The earlier dump
                is unchanged.
        """
        texts = self.get_all()
        write_dump(dir, CubeDump(self.namespace, self.memory.instruction, texts, self._items_of(live_of(texts))))

    def load(self, dir: str | PathLike[str]) -> None:
        """Add the texts and caches of a dump. A text replaces the cube's text with the same id.

        New texts are also added to `texts`. Only caches of this cube's model are used: if another model made them, a
        `CacheWarning` says so, and the texts are encoded again when they are first needed, or by `encode`. The whole
        dump is read and verified first, so the cube is unchanged if this raises.

        Raises:
            StoreUnavailableError: the folder has no dump, or cannot be read.
            CorruptItemError: a file was truncated or changed, or is missing; the error names the file.
            FormatError: a newer release wrote the dump, or it is not the dump of a cube.
            InvalidInputError: the dump belongs to another namespace.
        """
        self._load(dir, read_dump(dir))

    def _load(self, dir: str | PathLike[str], dumped: CubeDump) -> None:
        theirs = dumped.namespace
        if theirs != self.namespace:
            raise InvalidInputError(
                f"{dir} is the dump of namespace {theirs!r}, but this cube has the namespace {self.namespace!r}. "
                f"Load the dump into a MemoryCube(..., namespace={theirs!r})."
            )
        with self._lock:
            if isinstance(self.texts, RetrieverTexts):  # read-only: `add` would raise
                self._follow(dumped.texts)
            else:
                self.add(dumped.texts)
            differences = self._take(dumped.items)
        if differences:
            warnings.warn(
                f"another model made the caches in {dir} ({'; '.join(differences)}), so the texts are encoded again "
                "when they are first needed. Call encode() to encode them now.",
                CacheWarning,
                stacklevel=3,
            )

    # --- asynchronous twins --------------------------------------------------------------------------------------

    aadd = async_twin(add)
    aedit = async_twin(edit)
    adelete = async_twin(delete)
    apurge = async_twin(purge)
    asearch = async_twin(search)
    aencode = async_twin(encode)
    aask = async_twin(ask)
    adump = async_twin(dump)
    aload = async_twin(load)

    async def astream(
        self, question: str | Sequence[Message], k: int | None = None, **answering: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Asynchronous `stream`. Leaving the loop stops the model."""
        async with aclosing(iterate(lambda: self.stream(question, k, **answering))) as chunks:
            async for chunk in chunks:
                yield chunk

    # --- prompts -------------------------------------------------------------------------------------------------

    def _open(
        self,
        question: str | Sequence[Message],
        k: int | None,
        strategy: Strategy | None = None,
        ratio: float | None = None,
        max_kl: float = MAX_KL,
        constraint: ConstraintLike | None = None,
        **sampling: Any,
    ) -> _Opened:
        """Find texts and prepare their context. The answer is generated while its `chunks` are read."""
        messages, settings = as_messages(question), self.memory.engine.sampling(**sampling)
        strategy = strategy or self.strategy
        while True:
            sources = self.search(_question_of(messages), k)
            with self._lock:  # no text may be deleted while its cache is made
                if not self._are_current(sources):
                    continue
                prompt = self._prompt(sources, messages, strategy)
                held = self._held(prompt)
                try:
                    chunks = self.memory.stream(
                        prompt,
                        strategy="full" if strategy == "exact" else strategy,  # with "exact" there is one document
                        ratio=self.ratio if ratio is None else ratio,
                        max_kl=max_kl,
                        sampling=settings,
                        constraint=constraint,
                    )
                except ContextLengthError as error:
                    if not sources:
                        raise
                    raise CorpusLengthError(len(sources), isinstance(self.texts, SearchableTexts), error) from error
                return _Opened(sources, prompt, held, self.memory.engine.merges, chunks)

    def _prompt(self, texts: Sequence[TextualMemoryItem], messages: Sequence[Message], strategy: Strategy) -> Prompt:
        """The prompt: the texts, then the messages. Each text is a document; with `exact`, all texts are one document.

        Each text ends with a blank line, as in the prompts of the adapters.
        """
        documents = [f"{text.memory}\n\n" for text in texts]
        if strategy == "exact" and documents:
            documents = ["".join(documents)]
        behind = insert_documents(self.memory.instruction or "", documents, messages)
        return self.memory.engine.template.prompt(behind)

    def _held(self, prompt: Prompt) -> list[bool]:
        """For each document of a prompt, whether it is cached, so that the model need not encode it."""
        engine, documents = self.memory.engine, self.memory.documents
        known = engine.known_prefix(prompt.context_ids, self.namespace)
        if engine.merges and known < len(prompt.context_ids):
            ids = [documents.key(token_ids) for token_ids in prompt.kept_ids]
            reads = (Read(token_ids, "", {}) for token_ids in prompt.kept_ids)
            there = documents.containing(prompt.head_ids, dict(zip(ids, reads, strict=True)))
            return [id in there for id in ids]
        return [place.stop <= known for place in prompt.document_places]

    def _encode(self, texts: Sequence[TextualMemoryItem]) -> bool:
        """Encode texts as one document. Returns False if they have a cache already, or changed meanwhile."""
        with self._lock:
            if not self._are_current(texts):
                return False
            prompt = self._prompt(texts, [_QUESTION], "exact")
            [token_ids], [document] = prompt.kept_ids, prompt.documents
            if self.memory.documents.contains(prompt.head_ids, token_ids):
                return False
            metadata = {"doc_id": texts[0].id} if len(texts) == 1 else {}
            with self.memory.documents.instruction(prompt.instruction_ids):
                self.memory.documents.find_or_encode(prompt.head_ids, token_ids, document, metadata)
            return True

    # --- caches follow texts -------------------------------------------------------------------------------------

    def _are_current(self, texts: Iterable[TextualMemoryItem]) -> bool:
        return all(text.id in self._known and self._known[text.id].memory == text.memory for text in texts)

    def _look(self) -> None:
        """Take over changes from a place whose texts may change without the cube."""
        with self._lock:
            if isinstance(self.texts, ListedTexts):
                listed = self.texts.listed()
                ids = {text.id for text in listed}
                self._follow(listed, gone=[id for id in self._known if id not in ids])

    def _follow(self, texts: Iterable[TextualMemoryItem], gone: Iterable[str] = ()) -> DeletionReport:
        """Add or change texts, forget those in `gone`, and delete caches whose words are in no text any more."""
        report = DeletionReport()
        known = self._known | {text.id: text for text in texts}
        for id in gone:
            known.pop(id, None)
        live = live_of(known.values())
        is_same = known.keys() == self._known.keys() and self._are_current(known.values())
        if not is_same:
            report = self._drop({was.memory for was in self._known.values() if stripped(was.memory) not in live}, live)
            self._changes += 1
        self._known = known
        return report

    def _drop(self, gone: set[str], live: set[str]) -> DeletionReport:
        """Delete the caches made from deleted texts, alone or with other texts, from every tier.

        Unlike `KVCacheMemory.purge`, this also finds the text within larger texts, such as a document that a framework
        rendered, and keeps the caches of live texts. All recent contexts of the namespace are dropped, because each of
        them may contain such a text.

        Args:
            gone: the deleted texts.
            live: the texts that the cube holds, `stripped`.
        """
        gone = gone | self._undeleted
        if not gone:
            return DeletionReport()
        found = {stripped(text) for text in gone}
        template, documents = self.memory.engine.template, self.memory.documents
        keys = [documents.key(template.encode_text(f"{text}\n\n")) for text in gone]  # reaches damaged items, too

        def is_stale(item: Described) -> bool:
            text = _text_of(item)
            return text not in live and any(one in text for one in found)

        report = self._erase(is_stale, keys)
        self.memory.store.forget(gone)
        self._undeleted = gone if report.failed else set()
        return report

    def _erase(self, is_stale: Callable[[Described], bool], keys: Iterable[str] = ()) -> DeletionReport:
        """Delete stale caches, caches that cannot be read, and the caches with these `keys`."""
        store = self.memory.store
        return self.memory.erased(lambda: store.erase(keys) + store.erase_where(is_stale, unreadable=True))

    # --- items of a dump -----------------------------------------------------------------------------------------

    def _items_of(self, live: set[str]) -> Iterator[KVCacheItem]:
        """The instruction's cache, and the items made from live texts only, so that a load encodes nothing.

        A damaged item is left out with a `CacheWarning`.
        """
        engine = self.memory.engine
        head_ids = engine.template.instruction_ids(self.memory.instruction)
        if engine.merges and head_ids:
            context = engine.exact_context(head_ids, (), self.namespace)
            yield KVCacheItem(memory=context.cache, token_ids=context.token_ids, fingerprint=engine.fingerprint)
        for key in list(self.memory.store.keys()):
            try:
                item = self.memory.store.get(key)
                if item is not None and is_made_of(item.records.composed_text_memory, live):
                    yield item
            except (CorruptItemError, FormatError) as damaged:
                warnings.warn(f"a cache was left out of the dump: {damaged}", CacheWarning, stacklevel=5)

    def _take(self, items: Iterable[KVCacheItem]) -> list[str]:
        """Store the items of this cube's model.

        Returns how another model differs from the cube's, if a text has only that model's cache; or else an empty list.
        """
        engine = self.memory.engine
        foreign, taken = dict[str, list[str]](), set[str]()
        for item in items:
            text = item.records.composed_text_memory
            if item.fingerprint is None:
                continue
            if not engine.fingerprint.matches(item.fingerprint):
                if text:
                    foreign[text] = engine.fingerprint.differences(item.fingerprint)
            elif text:
                self.memory.store.put(item)
                taken.add(text)
            elif engine.merges:  # the instruction's cache belongs to the engine's recent contexts
                hf = cast("HFEngine", engine)
                layers = mapped(layers_of(item.memory), methodcaller("to", hf.device))
                hf.prefixes.insert(item.token_ids.tolist(), layers, self.namespace)
        return next((differences for text, differences in foreign.items() if text not in taken), [])


def _question_of(messages: Sequence[Message]) -> str:
    """The text of the last user message."""
    content = next((message["content"] for message in reversed(messages) if message.get("role") == "user"), "")
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


def _text_of(item: Described) -> str:
    return stripped(item.records.composed_text_memory)
