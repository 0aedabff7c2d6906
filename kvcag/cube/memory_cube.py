"""MemoryCube: texts and the caches made from them, as one memory.

The idea comes from MemOS, whose cube holds a plaintext memory and an activation memory. Here the caches follow the
texts: a text that is edited or deleted loses its caches, and a text without a cache is read by the model.
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
    """An answer, the texts it was made from, and which of them came from caches.

    Attributes:
        sources: the texts in the prompt, in order.
        cached: ids of the texts that came from caches.
        encoded: ids of the texts that the model read for this answer.
    """

    sources: list[TextualMemoryItem] = field(default_factory=list)
    cached: tuple[str, ...] = ()
    encoded: tuple[str, ...] = ()

    @property
    def side(self) -> Mode:
        """Which side of the cube answered.

        `encoded`: the model read at least one text, or there were no texts. `prefix`: all texts came from caches,
        exactly as a full prefill computes them. `merged`: all came from caches, some of their tokens recomputed.
        """
        if self.encoded or not self.sources:
            return "encoded"
        return "prefix" if self.report is None or self.report.is_exact else "merged"


@dataclass(frozen=True, slots=True)
class _Opened:
    """An answer that was prepared and not yet generated. `held`: for each document, whether it was cached before."""

    sources: list[TextualMemoryItem]
    prompt: Prompt
    held: list[bool]
    merges: bool
    chunks: Generator[Chunk, None, None]

    def answer(self) -> CubeAnswer:
        """Generate the answer."""
        whole, held, ids = Answer.of(self.chunks), self.held, [text.id for text in self.sources]
        report = whole.report
        if report is not None and report.strategy == "exact" and self.merges:  # encoded in order, as far as not reused
            held = [place.stop <= report.reused_tokens for place in self.prompt.document_places]
        elif report is not None and self.merges and all(held) and report.encoded_tokens > len(self.prompt.head_ids):
            held = [False] * len(held)  # a cache was damaged, or left the store meanwhile
        if len(held) != len(ids):  # the texts are one document
            held = [all(held)] * len(ids)
        cached = tuple(id for id, was_held in zip(ids, held, strict=True) if was_held)
        encoded = tuple(id for id, was_held in zip(ids, held, strict=True) if not was_held)
        return CubeAnswer(whole.text, whole.usage, whole.finish_reason, self.sources, cached, encoded)


class MemoryCube:
    """Texts, and caches that follow them. Safe to use from several threads.

    ```python
    cube = MemoryCube("Qwen/Qwen3-0.6B", instruction="Answer from the notes.")
    cube.add(["The tower was completed in 1889.", "The bridge was opened in 1932."])
    print(cube.ask("When was the tower completed?"))
    cube.dump("cube/")
    ```

    Args:
        engine: the model that encodes and answers: a hub id, a folder, or an engine.
        texts: the place that finds texts, such as `kvcag.langchain.VectorStoreTexts` or
            `kvcag.llama_index.IndexTexts`. Without it, every question is answered from all texts.
        store: where caches are kept: a store that only this cube uses, or a folder. In memory by default.
        instruction: stands before the texts, in the system turn.
        namespace: the user or corpus that the cube belongs to. Namespaces share no file, no cache and no recent
            context. A store that is passed as an object must be of this namespace.
        strategy: how the caches of several texts are combined, as for `KVCacheMemory.merge`. `"exact"` keeps the
            texts of a question together as one cache: the answer is that of a full prefill, and an edit encodes all
            of them again. Every other strategy keeps one cache per text.
        ratio: the recompute ratio, in [0, 1].

    Attributes:
        memory: the activation side, a `KVCacheMemory`.
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
        self._undeleted: set[str] = set()  # texts of which a store that failed may still have caches: tried again
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

        Arguments are those of the class; errors are those of `load`.
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
        """Add texts and return their ids, in order. Nothing is encoded yet; see `encode`.

        A text replaces an earlier one with the same id, and the caches of the earlier one are deleted.

        Args:
            documents: one or several: a str, a LangChain `Document`, a LlamaIndex node (its text as the LLM would
                read it) or a `TextualMemoryItem`. A document without an id gets one from its text.

        Raises:
            EmptyPromptError: a text is empty. Nothing was added.
            InvalidInputError: no text can be read from a document, or `texts` cannot be written to.
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
        """Change a text. Its caches are deleted; the caches of other texts stay.

        Args:
            id: the id of the text.
            text: the new text.
            metadata: the new metadata; None keeps the present ones.

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

        Ids that are missing are ignored.

        Returns:
            What was deleted where, and what could not be. Nothing is raised for a store that fails; the next deletion
            tries again.
        """
        listed = [ids] if isinstance(ids, str) else list(ids)
        failed = {}
        with self._lock:
            if self.texts is not None:
                try:
                    self.texts.delete(listed)
                except Exception as error:  # of whatever database it is; the caches are deleted all the same
                    failed[type(self.texts).__name__] = f"{type(error).__name__}: {error}"
                    warnings.warn(f"texts could not be deleted from {failed}", CacheWarning, stacklevel=2)
            report = self._follow([], gone=listed)
            if self._undeleted and not report.failed:
                report += self._drop(set(), live_of(self._known.values()))
            return report + DeletionReport({}, failed)

    def sync(self, documents: object) -> DeletionReport:
        """Make these documents the cube's texts: add new ones, edit changed ones, delete the others.

        Every cache made from anything else is deleted from the store, also those of an earlier process. Nothing is
        encoded. Arguments and errors are those of `add`.
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
        """Delete every cache made from a text that the cube does not hold, and the text from dumps.

        `delete` deletes the caches of a text that the cube holds.

        Args:
            text: the text.
            dumps: folders that `dump` wrote, to delete the text and its caches there too.

        Raises:
            InvalidInputError: the cube holds the text.
        """
        with self._lock:
            live = live_of(self._known.values())
            if stripped(text) in live:
                raise InvalidInputError("the cube holds this text. Delete the text by its id: that deletes its caches.")
            report = self._drop({text}, live)
        folders = [dumps] if isinstance(dumps, str | PathLike) else dumps
        return sum((purge_dump(folder, text) for folder in folders), report)

    def get(self, id: str) -> TextualMemoryItem | None:
        """A text, or None."""
        self._look()
        return self._known.get(id)

    def get_all(self) -> list[TextualMemoryItem]:
        """Every text that the cube knows, oldest first."""
        self._look()
        with self._lock:
            return list(self._known.values())

    def search(self, question: str, k: int | None = None) -> list[TextualMemoryItem]:
        """The texts that answer a question: those that `texts` finds, best first; all texts if it cannot search.

        A text that is found and is new, or has changed, becomes the cube's text.

        Args:
            question: what to search for.
            k: the most texts; None leaves the number to `texts`.

        Raises:
            InvalidInputError: `k` was given and the cube cannot search.
        """
        if not isinstance(self.texts, SearchableTexts):
            if k is not None:
                raise InvalidInputError(
                    f"k={k}, and this cube cannot search its texts. Give the cube texts that can be searched "
                    "(texts=…), or leave k out to answer from all texts."
                )
            return self.get_all()
        while True:
            changes = self._changes
            found = distinct(self.texts.search(question, k))
            with self._lock:
                if changes == self._changes:  # else a text that was found may have been deleted meanwhile
                    self._follow(found)
                    return found

    # --- answers -------------------------------------------------------------------------------------------------

    def encode(self) -> int:
        """Encode texts that have no cache yet, ahead of a question, and return how many caches were made.

        Other threads can ask questions between two texts. Under strategy `"exact"` all texts become one cache; if
        `texts` can search, it is not known which texts will stand together, and nothing is encoded.

        Raises:
            UnsupportedModelError: the engine cannot encode documents ahead of a question.
            ContextLengthError: a text, or under `"exact"` all texts together, exceed the model's context.
        """
        texts = self.get_all()
        groups = [[text] for text in texts]
        if self.strategy == "exact":
            groups = [] if isinstance(self.texts, SearchableTexts) or not texts else [texts]
        return sum([self._encode(group) for group in groups])

    def ask(self, question: str | Sequence[Message], k: int | None = None, **answering: Any) -> CubeAnswer:
        """Answer a question from the cube. If no text is found, the model answers without texts.

        `str(answer)` is the text. Arguments and errors are those of `stream`.
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
        """Answer a question from the cube, piece by piece. Closing the stream stops the model.

        Args:
            question: a str, or chat messages that end with the question.
            k: the most texts to answer from, if `texts` can search.
            strategy: see the class; None is the cube's.
            ratio: the recompute ratio, in [0, 1]; None is the cube's.
            max_kl: the error that strategy `"auto"` allows, in nats per token.
            constraint: what the answer must be: a pydantic model, a JSON schema, `Regex`, `Choices` or `Grammar`.
            **sampling: settings of `Sampling`, such as `max_new_tokens`.

        Raises:
            CorpusLengthError: the texts do not fit into the model's context. Nothing was encoded.
            InvalidInputError: an unknown setting or strategy, or `k` without texts that can be searched.
            ConstraintError: the constraint cannot be used.
        """
        return self._open(question, k, strategy, ratio, max_kl, constraint, **sampling).chunks

    # --- dumps ---------------------------------------------------------------------------------------------------

    def dump(self, dir: str | PathLike[str]) -> None:
        """Write texts and caches to a folder. An earlier dump is replaced in one step, or not at all.

        A cache that was made from any text outside the cube is left out.

        Raises:
            StoreUnavailableError: the disk is full, permission was denied. The earlier dump is unchanged.
        """
        texts = self.get_all()
        write_dump(dir, CubeDump(self.namespace, self.memory.instruction, texts, self._items_of(live_of(texts))))

    def load(self, dir: str | PathLike[str]) -> None:
        """Add the texts and caches of a dump. A text replaces one with the same id. `texts` gets what it lacks.

        Caches of this cube's model are used. If another model made the caches, one `CacheWarning` says so, and texts
        are encoded again when they are first needed, or by `encode`. Everything is read and verified first: if this
        raises, the cube is unchanged.

        Raises:
            StoreUnavailableError: there is no dump, or it cannot be read.
            CorruptItemError: a file was cut, changed or is missing; the error names the file.
            FormatError: a newer release wrote the dump, or the folder holds something else.
            InvalidInputError: the dump belongs to another namespace.
        """
        self._load(dir, read_dump(dir))

    def _load(self, dir: str | PathLike[str], dumped: CubeDump) -> None:
        theirs = dumped.namespace
        if theirs != self.namespace:
            raise InvalidInputError(
                f"{dir} holds the cube of namespace {theirs!r}; the namespace of this cube is {self.namespace!r}. "
                f"Load it into a MemoryCube(..., namespace={theirs!r})."
            )
        with self._lock:
            if isinstance(self.texts, RetrieverTexts):  # which cannot be written to
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
        """`stream`, in worker threads; leaving the loop stops the model."""
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
        """Find texts and prepare their context; the answer is generated as `chunks` are read."""
        messages, settings = as_messages(question), self.memory.engine.sampling(**sampling)
        strategy = strategy or self.strategy
        while True:
            sources = self.search(_question_of(messages), k)
            with self._lock:  # so that no text is deleted while its cache is made
                if not self._are_current(sources):
                    continue
                prompt = self._prompt(sources, messages, strategy)
                held = self._held(prompt)
                try:
                    chunks = self.memory.stream(
                        prompt,
                        strategy="full" if strategy == "exact" else strategy,  # the texts are one document then
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
        """Messages behind the texts, of which each is a document, or under `exact` all are one.

        Each text ends with a blank line, as in the prompts of the adapters.
        """
        documents = [f"{text.memory}\n\n" for text in texts]
        if strategy == "exact" and documents:
            documents = ["".join(documents)]
        behind = insert_documents(self.memory.instruction or "", documents, messages)
        return self.memory.engine.template.prompt(behind)

    def _held(self, prompt: Prompt) -> list[bool]:
        """For each document of a prompt, whether the model need not read it."""
        engine, documents = self.memory.engine, self.memory.documents
        known = engine.known_prefix(prompt.context_ids, self.namespace)
        if engine.merges and known < len(prompt.context_ids):
            return [documents.contains(prompt.head_ids, token_ids) for token_ids in prompt.kept_ids]
        return [place.stop <= known for place in prompt.document_places]

    def _encode(self, texts: Sequence[TextualMemoryItem]) -> bool:
        """Encode texts as one document, if they have no cache and did not change meanwhile. Whether it was done."""
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
        """Follow a place whose texts others may change."""
        with self._lock:
            if isinstance(self.texts, ListedTexts):
                listed = self.texts.listed()
                ids = {text.id for text in listed}
                self._follow(listed, gone=[id for id in self._known if id not in ids])

    def _follow(self, texts: Iterable[TextualMemoryItem], gone: Iterable[str] = ()) -> DeletionReport:
        """Add or change texts, forget those that are gone, and delete the caches of what no text says any more."""
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
        """Delete what was made from texts that are gone, alone or with others, from every tier.

        `KVCacheMemory.purge` finds the caches of one text alone. This also finds the text within larger ones, such as
        a document that a framework rendered, and keeps the caches of live texts. All recent contexts of the namespace
        are dropped, because any of them may hold such a text.

        Args:
            gone: texts.
            live: the texts that the cube holds, as `stripped`.
        """
        gone = gone | self._undeleted
        if not gone:
            return DeletionReport()
        found = {stripped(text) for text in gone}
        template, documents = self.memory.engine.template, self.memory.documents
        keys = [documents.key(template.encode_text(f"{text}\n\n")) for text in gone]  # also where it is damaged

        def is_stale(item: Described) -> bool:
            text = _text_of(item)
            return text not in live and any(one in text for one in found)

        report = self._erase(is_stale, keys)
        self.memory.store.forget(gone)
        self._undeleted = gone if report.failed else set()
        return report

    def _erase(self, is_stale: Callable[[Described], bool], keys: Iterable[str] = ()) -> DeletionReport:
        """Delete the caches that are stale, those that cannot be read, and those of `keys`."""
        store = self.memory.store
        return self.memory.erased(lambda: store.erase(keys) + store.erase_where(is_stale, unreadable=True))

    # --- items of a dump -----------------------------------------------------------------------------------------

    def _items_of(self, live: set[str]) -> Iterator[KVCacheItem]:
        """The items made from live texts alone, behind the instruction's own cache, so that none is encoded on load.

        A damaged item is left out, with a `CacheWarning`.
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
        """Keep the items of this cube's model. Returns how the model of another item differs, if texts need it."""
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
            elif engine.merges:  # the instruction's own cache belongs to the recent contexts
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
