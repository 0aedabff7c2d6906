"""`KVCacheMemory`, the main class of kvcag: MemOS's activation memory, over an engine and a store."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import (
    AsyncGenerator,
    Callable,
    Collection,
    Generator,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from functools import partial
from itertools import chain
from os import PathLike, fspath
from typing import Any, cast
from weakref import WeakKeyDictionary

from kvcag.cache.layers import ContextCache, layers_of
from kvcag.calibration import LearnedDrift, Progress, forget_drift, learn_drift, learn_on_server, learned_drift_of
from kvcag.chat_template import Document, Message, Prompt, as_messages, segment
from kvcag.concurrency import async_twin, at_once, iterate
from kvcag.config import KVCacheMemoryConfig, parse
from kvcag.contexts import (
    DocumentCache,
    Ids,
    Read,
    context_of_items,
    context_of_prompt,
    is_stored_whole,
    reusable,
    same_ids,
    with_kept_history,
    with_names,
)
from kvcag.core import (
    DEFAULT_RATIO,
    MAX_KL,
    Answer,
    Chunk,
    ContextPrompt,
    EncodedItem,
    Item,
    MergedContext,
    MergeSettings,
    Mode,
    Strategy,
)
from kvcag.documents import Texts, documents_of, text_and_metadata, texts_of
from kvcag.engines.base import Engine, Sampling
from kvcag.engines.constrain import ConstraintLike
from kvcag.engines.hf import HFEngine
from kvcag.errors import (
    CacheWarning,
    EmptyPromptError,
    InvalidInputError,
    StoreError,
    StoreUnavailableError,
    UnknownItemError,
    UnsupportedModelError,
)
from kvcag.fingerprint import KVCacheRecords
from kvcag.stores.base import MADE_OF, DeletionReport, KVStore
from kvcag.stores.dump import purge_dump, read_dump, write_dump
from kvcag.stores.files import is_instruction
from kvcag.stores.memory import MemoryStore
from kvcag.stores.remote import open_at
from kvcag.sync import Context, SyncReport, in_context, sync
from kvcag.telemetry import observed

DEFAULT_STORE_BYTES = 4 << 30
_INSTRUCTION = "instruction"


class KVCacheMemory:
    """Encodes each text once, and merges the encoded texts per question.

    Each text is encoded after the instruction, since the instruction precedes it in the prompt, and only the text's own
    keys and values are stored. A merge re-rotates them to their positions in the prompt. Safe to use from several
    threads.

    ```python
    memory = KVCacheMemory("Qwen/Qwen3-0.6B", store="kv/")
    memory.add(["The library opens at nine.", "It is in Harbour Street."])
    print(memory.ask("When does it open?"))
    ```

    Args:
        engine: the model that encodes and answers: a hub id, a folder, or an engine. With a `VLLMEngine`, the server
            has the keys and values: items are prompts, and a merge is the prompt of all items, in order.
        store: where items are stored: a store, an address such as `s3://bucket/kv`, or a folder, which is then limited
            to 64 GiB. In memory by default.
        instruction: a text before the documents, in the system turn.
        namespace: separates this memory's recent contexts, and its files if `store` is a folder, from those of other
            namespaces.
        memory_filename: the name of the manifest that `dump` writes.

    Raises:
        InvalidInputError: `engine` is neither a hub id, a folder nor an engine.
    """

    def __init__(
        self,
        engine: Engine | str | PathLike[str],
        store: KVStore | str | PathLike[str] | None = None,
        instruction: str | None = None,
        *,
        namespace: str = "",
        memory_filename: str = "kv_cache_memories.json",
    ) -> None:
        if isinstance(engine, str | PathLike):
            engine = HFEngine.from_pretrained(fspath(engine))
        if not isinstance(engine, Engine):
            raise InvalidInputError(
                f"engine is a {type(engine).__name__}: pass a hub id, a folder, or an engine such as HFEngine"
            )
        self.engine: Engine = engine
        opened = MemoryStore() if store is None else open_store(store, engine, namespace)
        self.instruction = instruction
        self.namespace = namespace
        self.memory_filename = memory_filename
        self.watchers: list[Callable[[Prompt], None]] = []  # called with each prompt whose documents are looked up
        self.documents = DocumentCache(engine, opened, namespace)
        self._contexts: dict[str, str] = {}
        self._contexts_at: Hashable = 0

    @property
    def store(self) -> KVStore:
        """Where items are stored. It may be set to another store at any time."""
        return self.documents.store

    @store.setter
    def store(self, store: KVStore) -> None:
        self.documents = replace(self.documents, store=store, instructions=set())
        self._contexts.clear()

    @classmethod
    def from_config(cls, config: KVCacheMemoryConfig | dict[str, Any]) -> KVCacheMemory:
        """Make a memory from a configuration of MemOS's form. Loads the model.

        Raises:
            pydantic.ValidationError: the configuration is invalid.
        """
        parsed = parse(config)
        return cls(
            parsed.extractor_llm.engine(), instruction=parsed.instruction, memory_filename=parsed.memory_filename
        )

    def __len__(self) -> int:
        return self.store.stats().items

    def __iter__(self) -> Iterator[Item]:
        return iter(self.get_all())

    def __repr__(self) -> str:
        try:
            return f"<KVCacheMemory of {len(self)} items over {self.engine!r} in {self.store!r}>"
        except StoreError as error:
            return f"<KVCacheMemory over {self.engine!r} in a store that fails: {error}>"

    # --- encoding ----------------------------------------------------------------------------------------------

    def extract(self, text: Texts) -> Item:
        """Encode a text as an item, without adding it. Its id is its content key: the same text has the same id.

        Args:
            text: a str; a list of str, which is joined by blank lines; or chat messages, which become a transcript.

        Raises:
            EmptyPromptError: the text is empty.
            ContextLengthError: the text does not fit into the model's context.
        """
        texts = texts_of(text)
        composed = "\n\n".join(texts)
        if not composed.strip():
            raise EmptyPromptError("the text is empty: there is nothing to encode")
        item = self.documents.encode(self._instruction_ids, self._segment(composed), composed)
        item.records.text_memories = texts
        return item

    def from_textual_memory(self, memory: object, behind: object = None) -> Item:
        """Encode a document as an item with the document's metadata, without adding it.

        Args:
            memory: a str, a LangChain `Document`, a LlamaIndex node, or an object with `.memory` and `.metadata`.
            behind: a document that precedes it while it is encoded, as `context` of `add` chooses one.

        Raises:
            InvalidInputError: `memory` has no text.
            EmptyPromptError: the text is empty.
            ContextLengthError: the text does not fit into the model's context.
        """
        read = self.read(memory)
        if behind is None:
            item = self.extract(read.text)
        else:
            read = read._replace(behind=[self.read(behind)])
            item = self.documents.encode(self._instruction_ids, *read)
        item.metadata = with_names(read.metadata, read.behind)
        return item

    # --- keeping -----------------------------------------------------------------------------------------------

    def add(self, documents: object, *, context: Context | None = None) -> list[str]:
        """Store items, or encode and store documents. A document that is stored already is not encoded again.

        With `context`, each document is encoded after another document. Its keys and values are then closer to those in
        a prompt with several documents, so merged answers are closer to those of a full prefill; encoding takes twice
        as long. The first document of a prompt is computed again, after the instruction only, and becomes a recent
        context. Stored documents that were encoded after something else are encoded again.

        Args:
            documents: an item, a text, a LangChain `Document`, a LlamaIndex node, or several of them. A str is one
                document.
            context: chooses the document after which each document is encoded. `"previous"`: the previous document of
                the same source, for chunks of longer texts. A retriever, or a function from a text to documents: the
                first other document that it returns, for short, independent texts.

        Returns:
            The ids, in order.

        Raises:
            FingerprintMismatchError: an item was made by another model. Nothing was added.
            InvalidInputError: a document has no text. Nothing was added.
            EmptyPromptError: a document is empty.
            UnsupportedModelError: `context` with a server, or with a model that has recurrent layers.
        """
        self.documents.check_context(context)
        given = documents_of(documents)
        texts = dict[int, Read]()
        for index, document in enumerate(given):
            if isinstance(document, EncodedItem):
                self.documents.check_item(document)
            else:
                texts[index] = self.read(document)
                if not texts[index].text.strip():
                    raise EmptyPromptError(f"document {index + 1} is empty: leave it out")
        reads = iter(in_context(list(texts.values()), context, self.read))
        ids = []
        with self.documents.instruction(self._instruction_ids if texts else ()):
            for index, document in enumerate(given):
                if index in texts:
                    item, _ = self.documents.find_or_encode(self._instruction_ids, *next(reads))
                else:
                    item = document
                    self.documents.put(item)
                ids.append(item.id)
        return ids

    def get(self, id: str) -> Item | None:
        """Return the item, or None if it is missing. Generating with its `memory` does not change the stored item."""
        return self.documents.get(id)

    def get_by_ids(self, ids: Iterable[str]) -> list[Item | None]:
        """Return the items in the order of `ids`, with None for each missing item."""
        return [self.get(id) for id in _as_list(ids)]

    def get_all(self) -> list[Item]:
        """Return every item, oldest first."""
        keys = [key for key in iter(self.store.keys()) if not is_instruction(key)]
        items = [item for key in keys if (item := self.get(key)) is not None]
        return sorted(items, key=lambda item: (item.records.timestamp, item.id))

    def delete(self, ids: str | Iterable[str]) -> DeletionReport:
        """Delete items, and drop this namespace's recent contexts, which may contain them. Missing ids are ignored.

        Returns:
            What was deleted, where, and what could not be deleted. A store that fails raises nothing.
        """
        listed = _as_list(ids)
        return self.erased(lambda: self.store.erase(listed))

    def delete_all(self) -> DeletionReport:
        """Delete every item, also unreadable ones, this namespace's recent contexts, and its learned drift."""
        return self.erased(self.store.clear) + self._forget_drift(None)

    def dump(self, dir: str | PathLike[str]) -> None:
        """Write every item to a folder, replacing an earlier dump atomically.

        Raises:
            StoreUnavailableError: the disk is full, or permission was denied.
        """
        stored = (item for key in list(self.store.keys()) if (item := self.store.get(key)) is not None)
        write_dump(dir, self.memory_filename, stored)

    def load(self, dir: str | PathLike[str]) -> None:
        """Add every item of a folder that `dump` wrote. An empty folder adds nothing.

        All files are read and checked first: after one of these errors, the memory is unchanged.

        Raises:
            CorruptItemError: a file was cut or changed, or is missing.
            FormatError: the manifest is missing, is a pickle, or is of a newer version.
            FingerprintMismatchError: the items were made by another model.
        """
        dump = read_dump(dir, self.memory_filename, expected=self.engine.fingerprint)
        for item in dump.items if dump else ():
            self.store.put(item)

    def keep(
        self,
        messages: Sequence[Message],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        context: Context | None = None,
    ) -> list[str]:
        """Encode and store the documents in messages ahead of a question, and return their ids, in order.

        Args:
            messages: as for `stream`.
            metadata: one mapping for each document. Documents that are stored already keep their own.
            context: as for `add`.

        Raises:
            ChatTemplateError: the chat template cannot render the messages.
            ContextLengthError: a document does not fit into the model's context.
            UnsupportedModelError: as for `add`.
        """
        self.documents.check_context(context)
        prompt = self.engine.template.prompt(messages)
        about = metadata or [{}] * len(prompt.documents)
        reads = in_context(list(map(Read, prompt.kept_ids, prompt.documents, about)), context, self.read)
        ids = [self.documents.key(token_ids) for token_ids in prompt.kept_ids]
        wanted = dict(zip(ids, reads, strict=True))
        with self.documents.instruction(prompt.instruction_ids):
            there = self.documents.containing(prompt.head_ids, wanted)
            for id, read in wanted.items():
                if id not in there:
                    self.documents.find_or_encode(prompt.head_ids, *read)
        return ids

    def sync(
        self, documents: Iterable[object], corpus: str = "default", *, context: Context | None = None
    ) -> SyncReport:
        """Make the items match a corpus: encode new texts, keep unchanged ones, delete removed ones.

        Args:
            documents: as for `add`, without items. Documents with the same text are one document.
            corpus: the corpus's name. The documents of other corpora are not changed.
            context: as for `add`. A document whose context changed is encoded again.

        Raises:
            EmptyPromptError: a document is empty. Nothing was changed.
            UnsupportedModelError: `context` with a server, or with a model that has recurrent layers.
        """
        self.documents.check_context(context)
        read = in_context(list(map(self.read, documents_of(documents))), context, self.read)
        with self.documents.instruction(self._instruction_ids):
            return sync(self.documents, self._instruction_ids, read, corpus)

    def learn(
        self,
        documents: object = None,
        *,
        contexts: int = 16,
        documents_per_context: int = 5,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> LearnedDrift:
        """Learn the drift of these documents, so that merged answers are closer to those of a full prefill.

        The drift is how keys and values of documents change after each other. It is saved for this model and namespace,
        for later processes too, and used until it is learned again: call this again when the corpus has changed much.
        All documents of the `contexts` are encoded twice. Recent contexts are dropped. `MergeReport.drift` has the
        digest of the drift.

        Args:
            documents: as for `add`, at least ten; None: all documents in the memory.
            contexts: how many contexts to learn from.
            documents_per_context: how many documents each context has.
            seed: seeds the random choice of each context's first document. The documents most similar to the first
                one follow it, as they would be retrieved together.
            progress: called as `progress(done, total)` after each context.

        Raises:
            InvalidInputError: fewer than ten documents.
            StoreError: a document was purged in the meantime, so the drift was not saved.
            UnsupportedModelError: the engine is a server, or the model's caches cannot be merged.
        """
        if not self.engine.merges:
            raise UnsupportedModelError("a server merges no caches, so there is no drift to learn. Use an HFEngine.")
        engine = cast("HFEngine", self.engine)
        engine.check_mergeable()
        if documents is None:
            texts = [records.composed_text_memory for records in self._kept()]
        else:
            texts = [text_and_metadata(document)[0] for document in documents_of(documents)]
        token_ids = {self.documents.key(ids): ids for ids in map(self._segment, texts)}
        learned = learn_drift(
            engine,
            self.namespace,
            self._instruction_ids,
            token_ids,
            contexts=contexts,
            documents_per_context=documents_per_context,
            seed=seed,
            progress=progress,
        )
        self.engine.forget(self.namespace)
        return learned

    @property
    def drift(self) -> str:
        """The digest of the drift that merges use, as learned by `learn`; empty if no drift was learned."""
        learned = learned_drift_of(cast("HFEngine", self.engine), self.namespace) if self.engine.merges else None
        return learned.digest if learned else ""

    def _forget_drift(self, ids: Collection[str] | None) -> DeletionReport:
        try:
            if self.engine.merges:
                forget_drift(cast("HFEngine", self.engine), self.namespace, ids)
        except StoreUnavailableError as error:
            return DeletionReport(failed={"the learned drift": str(error)})
        return DeletionReport()

    def purge(self, source: str, dumps: Iterable[str | PathLike[str]] = ()) -> DeletionReport:
        """Delete everything made from one text, for example after a request to erase personal data.

        Deletes items in every tier of the store, all recent contexts of this namespace, contexts made by
        `create_context`, and a drift that was learned from the text. An item that is being encoded from the text is not
        stored. Files that cannot be read or deleted do not stop the purge: the report and a `CacheWarning` name them.

        Args:
            source: the text itself, or the source that an item's metadata names: a path, a URL, a document's id. A
                source of more than two words is also found within larger texts.
            dumps: folders written by `dump` of a memory or of a cube, in which to delete too.

        Returns:
            What was deleted, where, and what could not be deleted.
        """
        keys = self._keys_of(source)
        report = self.erased(lambda: self.store.erase(keys) + self.store.purge(source))
        report += self._forget_drift({*keys, *report.ids})
        return sum((purge_dump(folder, source) for folder in _folders(dumps)), report)

    def erased(self, erase: Callable[[], DeletionReport]) -> DeletionReport:
        """Delete from the store by calling `erase`, and drop copies outside the store before and after.

        Returns:
            The report of `erase`. A `CacheWarning` names what could not be deleted.
        """
        self._forget()
        report = erase()
        report += self.store.erase(report.ids)  # items that another thread put back in the meantime
        self._forget()  # recent contexts that a concurrent question made in the meantime
        if report.failed:
            warnings.warn(f"not everything could be deleted: {report}", CacheWarning, stacklevel=3)
        return report

    def _keys_of(self, text: str) -> list[str]:
        """Return the ids that a text may have, to find also damaged files, whose texts cannot be read."""
        if not self.engine.merges:
            return []
        forms = dict.fromkeys([text, segment(text)])
        return [self.documents.key(self.engine.template.encode_text(form)) for form in forms]

    # --- merging -----------------------------------------------------------------------------------------------

    def get_cache(self, ids: str | Iterable[str], *, skip_missing: bool = False) -> ContextCache | ContextPrompt | None:
        """Return instruction and items as one cache, re-rotated without recomputing; for a server, as a prompt.

        The caller owns the cache. Continue it by `engine.generate(messages, past_key_values=cache)`.

        Args:
            ids: the items' ids, in the order of the context.
            skip_missing: leave out unknown ids.

        Returns:
            The cache, with keys and values `(1, kv_heads, seq_len, head_dim)` per layer; None if there are no items.

        Raises:
            UnknownItemError: an id is not in the memory, unless it may be skipped.
        """
        items = self._items(ids, skip_missing)
        if not items:
            return None
        head_ids = self._instruction_ids
        if not self.engine.merges:
            return self.engine.prompt_of((*head_ids, *same_ids(items)))
        context = context_of_items(self.documents, head_ids, items, (), MergeSettings("rotate"))
        return ContextCache.of(
            layers_of(context.cache), context.token_ids, context.fingerprint, is_exact=context.report.is_exact
        )

    def merge(
        self,
        items: str | Item | Iterable[str | Item],
        query: str | Sequence[Message],
        strategy: Strategy = "auto",
        ratio: float = DEFAULT_RATIO,
        *,
        max_kl: float = MAX_KL,
        canonical: bool = False,
        skip_missing: bool = False,
    ) -> MergedContext:
        """Merge items into one context for a question.

        Args:
            items: items or their ids, in the order of the context, best first.
            query: the question, or chat messages that end with it.
            strategy: `"auto"` reuses a known context exactly, merges documents by the strategy that `kvcag.calibrate`
                found (or by `"query"`), and encodes them as a whole when they are asked for together again. `"exact"`
                encodes instruction and documents in this order. `"rotate"` recomputes nothing. `"anchor"`,
                `"deviation"` and `"query"` recompute the share `ratio` of the tokens, chosen as `MergeStrategy` says.
                `"full"` recomputes all tokens.
            ratio: the recompute ratio: recomputed tokens divided by context tokens, in [0, 1].
            max_kl: the limit of `"auto"`: the largest KL divergence that calibration may have found, in nats per token.
            canonical: sort the items by their content keys, so that the same items always make the same context, in
                whatever order they were retrieved.
            skip_missing: leave out unknown ids.

        Raises:
            InvalidInputError: no items, an unknown strategy, or a ratio out of range.
            UnknownItemError: an id is not in the memory, unless it may be skipped.
            ContextLengthError: instruction, documents and question exceed the model's context.
            UnsupportedModelError: the model's keys cannot be re-rotated.
        """
        settings = MergeSettings(strategy, ratio, max_kl)
        prompt = self.engine.template.split_system(self.instruction, as_messages(query))
        found = self._items(items, skip_missing)
        if not found:
            raise InvalidInputError("there is nothing to merge: pass at least one item, or an id in the memory")
        self.engine.check_fits(len(prompt.head_ids) + len(same_ids(found)) + len(prompt.tail_ids), 1)
        if canonical:
            found.sort(key=lambda item: item.content_key)
        with self.engine.begun(self.namespace), self.documents.instruction(prompt.head_ids):
            return context_of_items(self.documents, prompt.head_ids, found, prompt.tail_ids, settings)

    def context_for(self, prompt: Prompt, settings: MergeSettings | None = None) -> MergedContext:
        """Return the context of a prompt with documents: reused, merged from stored items, or encoded and stored.

        Documents are found by their content. An unreadable item is encoded again, with a `CacheWarning`. If several
        questions are asked at once, each shared document is encoded once.

        Args:
            prompt: from `engine.template.prompt`, of messages with documents.
            settings: how to merge; the default is that of `stream`.

        Raises:
            ContextLengthError: the prompt exceeds the model's context; nothing was encoded.
            UnsupportedModelError: the model's keys cannot be re-rotated.
        """
        self.engine.check_fits(len(prompt.token_ids), 1)
        with self.engine.begun(self.namespace):
            return context_of_prompt(self.documents, prompt, settings or MergeSettings())

    # --- answering ---------------------------------------------------------------------------------------------

    def ask(self, messages: str | Sequence[Message], ids: Iterable[str] | None = None, **answering: Any) -> Answer:
        """Answer a question from the items. `str(answer)` is the text; `.report` and `.usage` describe its cost.

        Arguments and errors are those of `stream`.
        """
        return Answer.of(self.stream(messages, ids, **answering))

    def ask_all(
        self,
        questions: Iterable[str | Sequence[Message]],
        ids: Iterable[str] | None = None,
        **answering: Any,
    ) -> list[Answer]:
        """Answer several questions at the same time, and return the answers in order.

        The answers are decoded as a batch, which is faster than one after another. On a GPU, a context that they share
        is in memory once, and is read once per step for all answers.

        Args:
            questions: each as `messages` of `stream`.
            ids: as for `stream`, the same for all questions.
            **answering: as for `stream`.

        Raises:
            KVCAGError: the first error. The other answers stop.
        """
        wanted = None if ids is None else list(ids)
        streams = [partial(self.stream, question, wanted, **answering) for question in questions]
        if not streams:
            return []
        first = streams[0]()
        begun = next(first)  # the first answer makes the context, which the others then reuse
        calls = [lambda: Answer.of(chain([begun], first))]
        calls += [lambda stream=stream: Answer.of(stream()) for stream in streams[1:]]  # type: ignore[misc]
        return at_once(calls, self.engine.answers_at_once)

    def stream(
        self,
        messages: str | Sequence[Message] | Prompt,
        ids: Iterable[str] | None = None,
        *,
        strategy: Strategy = "auto",
        ratio: float = DEFAULT_RATIO,
        max_kl: float = MAX_KL,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: Sampling | None = None,
        constraint: ConstraintLike | None = None,
        **settings: Any,
    ) -> Generator[Chunk, None, None]:
        """Answer a question piece by piece; `str(chunk)` is a piece's text. Both adapters call this method.

        Without documents, the longest cached prefix of the prompt is reused.

        Args:
            messages: a question, or chat messages, whose content may include `kvcag.Document` parts; or a prompt.
            ids: the items to answer from, in this order. None: the documents in the messages, or every item if there
                are none. An empty list: no items.
            strategy: how documents are merged: see `merge`, also for `ratio` and `max_kl`.
            ratio: the recompute ratio, in [0, 1].
            max_kl: the limit of `"auto"`, in nats per token.
            tools: tool definitions, for chat templates that show tools.
            sampling: from `engine.sampling(…)`. None: the engine's defaults with `settings`.
            constraint: the form of the answer: a JSON schema, a regex, choices or a grammar.
            **settings: settings of `Sampling`, such as `max_new_tokens`, if `sampling` is None.

        Raises:
            InvalidInputError: an unknown setting, or a value out of range.
            UnknownItemError: an id is not in the memory.
            ChatTemplateError: the chat template cannot render the messages.
            ContextLengthError: the prompt and the answer exceed the model's context. Nothing was encoded.
            ConstraintError: the constraint cannot be used, or does not fit the budget. Nothing was encoded.
        """
        started = time.perf_counter()
        merging = MergeSettings(strategy, ratio, max_kl)
        if sampling is None:
            sampling = self.engine.sampling(**settings)
        elif settings:
            raise InvalidInputError(f"pass either sampling= or {', '.join(settings)}, not both")
        documents = self.documents
        if isinstance(messages, Prompt):
            prompt = messages
        else:
            asked = as_messages(messages)
            if ids or (ids is None and not any(map(_has_documents, asked))):
                documents = replace(documents, since=self.store.deletions())
            elif not _documents_in(asked).isdisjoint(self._contexts.values()):
                documents = replace(documents, since=self._contexts_at)
            prompt = self._prompt(asked, ids, tools, strategy)
        budget = self.engine.check_fits(len(prompt.token_ids), sampling.max_new_tokens)
        if constraint is not None:
            constraint = self.engine.constrain(constraint, budget, prompt.thinking)
        with self.engine.begun(self.namespace):
            chunks = self._opened(documents, prompt, sampling, constraint, merging, started)
            return observed(chunks, self.engine.model_name, sampling, started)

    def _opened(
        self,
        documents: DocumentCache,
        prompt: Prompt,
        sampling: Sampling,
        constraint: ConstraintLike | None,
        settings: MergeSettings,
        started: float,
    ) -> Generator[Chunk, None, None]:
        """Make or reuse the prompt's context, and start the answer."""
        context: MergedContext | None = None
        known: Mode | None = None  # None: the engine looks for the longest known prefix itself
        if settings.strategy == "exact":
            if is_stored_whole(documents, prompt):
                context = context_of_prompt(documents, prompt, settings)
        elif self.engine.merges:
            for watch in self.watchers if prompt.document_ids else ():
                watch(prompt)
            known = reusable(documents, prompt, settings)
            if known is None:
                context = context_of_prompt(documents, prompt, settings)
            accept = known == "merged"
            context = with_kept_history(documents, prompt, context, settings, accept_merged=accept) or context
        elif prompt.document_ids and self.engine.serves_merged(settings.strategy, self.namespace):
            learn_on_server(self.engine, self.namespace)
            known = "merged" if self.engine.serves_merged(settings.strategy, self.namespace) else None
        return self.engine.stream(
            prompt,
            sampling,
            context,
            constraint=constraint,
            namespace=self.namespace,
            started=started,
            accept_merged=known == "merged",
        )

    async def astream(
        self, messages: str | Sequence[Message], ids: Iterable[str] | None = None, **answering: Any
    ) -> AsyncGenerator[Chunk, None]:
        """`stream` in a worker thread, without blocking the event loop. Closing the generator stops the model."""
        async for chunk in iterate(lambda: self.stream(messages, ids, **answering)):
            yield chunk

    aask = async_twin(ask)
    aask_all = async_twin(ask_all)
    aadd = async_twin(add)
    amerge = async_twin(merge)
    apurge = async_twin(purge)

    # --- contexts with ids -------------------------------------------------------------------------------------

    def create_context(self, texts: Iterable[str], instruction: str = "", sources: Iterable[str] = ()) -> str:
        """Encode an instruction and texts as one document, and return its id, `kv:sha256:…`.

        The short id stands for the texts in bound arguments, traces and checkpoints, like `cached_content` of hosted
        models. It depends on the instruction, the texts and the model. The store has the texts and the caches, so the
        id is valid after a restart.

        Args:
            texts: joined by blank lines. A str is one text.
            instruction: the text before them, in the same system turn.
            sources: paths or URLs of the texts. `purge` finds the context by each source and by each text.

        Raises:
            InvalidInputError: a text or the instruction is not a str.
            EmptyPromptError: all texts are empty.
            ContextLengthError: the texts do not fit into the model's context.
        """
        if not isinstance(instruction, str):
            raise InvalidInputError(f"instruction is {instruction!r}: it must be a str. Leave it out for none.")
        shown = [text for text in _as_list(texts) if text.strip()]
        if not shown:
            raise EmptyPromptError("the corpus is empty: there is nothing to encode")
        context = "".join(map(segment, [instruction, *shown] if instruction else shown))
        metadata = {_INSTRUCTION: instruction, MADE_OF: [*shown, *sources]}
        [id] = self.keep(insert_documents("", [context], [_QUESTION]), [metadata])
        self._contexts[id] = context
        return id

    def with_context(self, id: str, messages: Sequence[Message]) -> list[Message]:
        """Return messages with a context before them, in the system turn. Their own system messages follow it.

        Args:
            id: from `create_context`, or the id of any item.
            messages: the conversation.

        Raises:
            InvalidInputError: the store has no such item, or it cannot be read.
        """
        if (deletions := self.store.deletions()) != self._contexts_at:  # another memory may delete from the store
            self._contexts.clear()
            self._contexts_at = deletions
        return insert_documents("", [self._contexts.get(id) or self._stored_context(id)], messages)

    def _stored_context(self, id: str) -> str:
        try:
            manifest = self.store.manifest(id)
        except StoreError as damaged:
            raise InvalidInputError(f"context {id!r} cannot be read: {damaged}") from damaged
        if manifest is None:
            raise InvalidInputError(
                f"there is no context {id!r} in the store: it was never made, or the store dropped it. "
                "Make it with create_context(documents), which returns its id."
            )
        own = self.engine.fingerprint
        if manifest.fingerprint is not None and not own.matches(manifest.fingerprint):
            differences = "; ".join(own.differences(manifest.fingerprint))
            warnings.warn(
                f"context {id!r} was made by another model ({differences}), so its text is encoded again. "
                "Make a context with each model.",
                CacheWarning,
                stacklevel=5,
            )
        self._contexts[id] = segment(manifest.records.composed_text_memory)
        return self._contexts[id]

    # --- inside ------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Drop all copies outside the store: recent contexts, work in progress, and the texts of `create_context`."""
        self.engine.forget(self.namespace)
        self._contexts.clear()

    @property
    def _instruction_ids(self) -> Ids:
        return self.engine.template.instruction_ids(self.instruction)

    def read(self, document: object) -> Read:
        """Return a document's tokens, text and metadata.

        Raises:
            InvalidInputError: the document has no text.
        """
        text, metadata = text_and_metadata(document)
        return Read(self._segment(text), text, metadata)

    def _segment(self, text: str) -> Ids:
        return self.engine.template.encode_text(segment(text))

    def _prompt(
        self,
        messages: list[Message],
        ids: Iterable[str] | None,
        tools: Sequence[Mapping[str, Any]] | None,
        strategy: Strategy,
    ) -> Prompt:
        if ids is None and not any(_has_documents(message) for message in messages):
            kept = sorted(self._kept(), key=lambda records: records.timestamp)
        else:
            kept = [item.records for item in self._items(ids or (), skip_missing=False)]
        if kept:
            texts = [segment(records.composed_text_memory) for records in kept]
            messages = insert_documents(self.instruction or "", texts, messages)
        engine, seams = self.engine, self.engine.seams
        one_by_one = strategy != "exact" and any(map(_has_documents, messages))
        if one_by_one and (engine.merges or engine.serves_merged(strategy, self.namespace)):
            seams = "documents"
        return engine.template.prompt(messages, tools=tools, seams=seams)

    def _kept(self) -> list[KVCacheRecords]:
        """Return the texts of all stored documents."""
        return [manifest.records for key, manifest in self.store.manifests() if not is_instruction(key)]

    def _items(self, given: str | Item | Iterable[str | Item], skip_missing: bool) -> list[Item]:
        wanted = [given] if isinstance(given, str | EncodedItem) or not isinstance(given, Iterable) else list(given)
        if wrong := [one for one in wanted if not isinstance(one, str | EncodedItem)]:
            raise InvalidInputError(f"pass items or their ids, not {wrong[0]!r:.80}")
        found = [self.documents.stored(one) if isinstance(one, str) else one for one in wanted]
        missing = [str(id) for id, item in zip(wanted, found, strict=True) if item is None]
        if missing and not skip_missing:
            raise UnknownItemError(dict.fromkeys(missing))
        return [item for item in found if item is not None]


def open_store(store: KVStore | str | PathLike[str] | None, engine: Engine, namespace: str = "") -> KVStore:
    """Return the store that is passed, a store at a path or an address, or for None a store in memory.

    The store in memory is shared by all callers with the same engine and namespace. A store at a path is limited to
    `FOLDER_BYTES` (64 GiB), one in memory to `DEFAULT_STORE_BYTES` (4 GiB); a full store evicts the least recently used
    items. Pass a `DiskStore` or a `MemoryStore` for another budget.
    """
    if isinstance(store, KVStore):
        return store
    if store is not None:
        return open_at(store, namespace)
    with _stores_lock:
        return _stores.setdefault(engine, {}).setdefault(namespace, MemoryStore(DEFAULT_STORE_BYTES))


def is_context(metadata: Mapping[str, Any]) -> bool:
    """Whether an item with this metadata was made by `KVCacheMemory.create_context`."""
    return _INSTRUCTION in metadata


def insert_documents(instruction: str, documents: Sequence[str], messages: Sequence[Message]) -> list[Message]:
    """Return messages after a system turn with an instruction and documents.

    System messages at the start of `messages` follow the documents, in the same turn. The instruction and each
    document end with a blank line.
    """
    if not instruction and not documents:
        return list(messages)
    rest = list(messages)
    system: list[object] = [f"{instruction}\n\n"] if instruction else []
    system += map(Document, documents)
    while rest and rest[0]["role"] == "system":
        said = rest.pop(0)["content"]
        system += [said] if isinstance(said, str) else said or []
    return [{"role": "system", "content": system}, *rest]


def _has_documents(message: Message) -> bool:
    return bool(_documents_in([message]))


def _documents_in(messages: Iterable[Message]) -> set[str]:
    """Return the texts of the documents in messages."""
    parts = (content for message in messages if isinstance(content := message.get("content"), list | tuple))
    return {str(part) for part in chain.from_iterable(parts) if isinstance(part, Document)}


def _folders(dumps: Iterable[str | PathLike[str]]) -> list[str | PathLike[str]]:
    return [dumps] if isinstance(dumps, str | PathLike) else list(dumps)


def _as_list(texts: str | Iterable[str]) -> list[str]:
    """Return one or several str as a list.

    Raises:
        InvalidInputError: `texts` is neither a str nor an iterable of str.
    """
    if isinstance(texts, str):
        return [texts]
    listed = list(texts) if isinstance(texts, Iterable) else [texts]
    if not all(isinstance(text, str) for text in listed):
        raise InvalidInputError(f"pass one str or several, not {texts!r:.80}")
    return listed


_QUESTION: Message = {"role": "user", "content": "…"}
_stores: WeakKeyDictionary[Engine, dict[str, MemoryStore]] = WeakKeyDictionary()
_stores_lock = threading.Lock()
