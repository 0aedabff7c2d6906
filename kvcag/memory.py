"""KVCacheMemory: MemOS's activation memory over an engine and a store, and the front door of kvcag."""

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

from kvcag.cache.attention import check_mergeable
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
    """Texts that are encoded once each and put together per question.

    Each text is encoded behind the instruction, so that the instruction's tokens stand before it as they will in the
    prompt, and only the text's own keys and values are kept. Put together, they are re-rotated to their true
    positions. Safe to use from several threads.

    ```python
    memory = KVCacheMemory("Qwen/Qwen3-0.6B", store="kv/")
    memory.add(["The library opens at nine.", "It is in Harbour Street."])
    print(memory.ask("When does it open?"))
    ```

    Args:
        engine: the model that encodes and answers: a hub id, a folder, or an engine. A `VLLMEngine` is sent documents
            ahead and keeps their keys and values itself: its items are prompts, and a merge is the prompt of all of
            them, in order.
        store: where items live: a store, an address such as `s3://bucket/kv`, or a folder, which then holds 64 GiB at
            most. In memory by default.
        instruction: stands before the documents, in the system turn.
        namespace: separates what this memory encodes from other namespaces' recent contexts, and its files where
            `store` is a folder.
        memory_filename: the name of the manifest that `dump` writes.

    Raises:
        InvalidInputError: `engine` is neither a name nor an engine.
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
        self.watchers: list[Callable[[Prompt], None]] = []  # told of each prompt whose documents are looked for
        self.documents = DocumentCache(engine, opened, namespace)
        self._contexts: dict[str, str] = {}
        self._contexts_at: Hashable = 0

    @property
    def store(self) -> KVStore:
        """Where items live. Another store may be set at any time."""
        return self.documents.store

    @store.setter
    def store(self, store: KVStore) -> None:
        self.documents = replace(self.documents, store=store, instructions=set())
        self._contexts.clear()

    @classmethod
    def from_config(cls, config: KVCacheMemoryConfig | dict[str, Any]) -> KVCacheMemory:
        """From a MemOS-shaped configuration. Loads the model."""
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
        """Encode a text. The item is not added. Its id is its content key: the same text has the same id.

        Args:
            text: a str; a list of str, which is joined into one; or chat messages, which become a transcript.

        Raises:
            EmptyPromptError: there is nothing to encode.
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
        """Encode a str, a LangChain `Document`, a LlamaIndex node, or anything with `.memory` and `.metadata`.

        The item has the memory's metadata, and is not added. `behind` is a document that stands before it while it is
        encoded, as with `context` of `add`.
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
        """Keep items, or encode documents and keep them. A document that the memory has is not encoded again.

        With `context`, each document is encoded behind another one, so that its keys and values are nearer to what
        they are behind the other documents of a prompt: merged answers are nearer to a full prefill's, and encoding
        takes twice as long. The first document of a prompt is then computed behind the instruction when it is needed,
        and stays among the recent contexts. Documents that were encoded behind something else are encoded again.

        Args:
            documents: an item, a text, a LangChain `Document`, a LlamaIndex node, or several of them. A str is one
                document.
            context: `"previous"`: the document before it of the same source, for chunks of longer texts. A retriever,
                or a function from a text to documents: the first other document that it finds, for short texts that
                are independent of each other.

        Returns:
            The ids, in order.

        Raises:
            FingerprintMismatchError: an item was made by another model. Nothing was added.
            InvalidInputError: something of which no text can be read. Nothing was added.
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
        """The item, or None. It is to be read; generating with its `memory` leaves the stored item as it is."""
        return self.documents.get(id)

    def get_by_ids(self, ids: Iterable[str]) -> list[Item | None]:
        """The items in the order of `ids`, None for each that is missing."""
        return [self.get(id) for id in _as_list(ids)]

    def get_all(self) -> list[Item]:
        """Every item, oldest first."""
        keys = [key for key in iter(self.store.keys()) if not is_instruction(key)]
        items = [item for key in keys if (item := self.get(key)) is not None]
        return sorted(items, key=lambda item: (item.records.timestamp, item.id))

    def delete(self, ids: str | Iterable[str]) -> DeletionReport:
        """Delete items, and forget this namespace's recent contexts, which may hold them. Missing ids are ignored.

        Returns:
            What was deleted where, and what could not be. Nothing is raised for a store that fails.
        """
        listed = _as_list(ids)
        return self.erased(lambda: self.store.erase(listed))

    def delete_all(self) -> DeletionReport:
        """Delete every item, also those that cannot be read, and forget this namespace's recent contexts."""
        return self.erased(self.store.clear) + self._forget_drift(None)

    def dump(self, dir: str | PathLike[str]) -> None:
        """Write every item to a folder. What stood there before is replaced in one step, or not at all."""
        stored = (item for key in list(self.store.keys()) if (item := self.store.get(key)) is not None)
        write_dump(dir, self.memory_filename, stored)

    def load(self, dir: str | PathLike[str]) -> None:
        """Add every item of a folder that `dump` wrote. A folder that holds nothing adds nothing.

        Everything is read and checked first: when this raises, the memory is as it was.

        Raises:
            CorruptItemError: a file was cut, changed or is missing.
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
        """Encode the documents of messages before a question comes, and return their ids, in order.

        Args:
            messages: as for `stream`.
            metadata: one for each document, for what is encoded now.
            context: as for `add`.
        """
        self.documents.check_context(context)
        prompt = self.engine.template.prompt(messages)
        about = metadata or [{}] * len(prompt.documents)
        reads = in_context(list(map(Read, prompt.kept_ids, prompt.documents, about)), context, self.read)
        with self.documents.instruction(prompt.instruction_ids):
            for read in reads:
                if not self.documents.contains(prompt.head_ids, read.token_ids, read.behind):
                    self.documents.find_or_encode(prompt.head_ids, *read)
        return [self.documents.key(token_ids) for token_ids in prompt.kept_ids]

    def sync(
        self, documents: Iterable[object], corpus: str = "default", *, context: Context | None = None
    ) -> SyncReport:
        """Make the items match a corpus: encode new texts, keep unchanged ones, delete removed ones.

        Args:
            documents: whatever `from_textual_memory` takes. Two with the same text are one. A str is one document.
            corpus: its name. What other corpora brought here stays as it is.
            context: as for `add`. A document before which another one stands now is encoded again.

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
        """Learn how these documents change behind each other, so that merged answers are nearer to a full prefill's.

        All that `contexts` hold is encoded twice. What was learned is kept for this model and namespace, also for later
        processes, and used until it is learned again: call this after a corpus has changed much. Recent contexts are
        forgotten. `MergeReport.drift` is its digest.

        Args:
            documents: as for `add`, at least ten; None: what the memory holds.
            contexts: how many contexts to learn from.
            documents_per_context: how many documents stand in one.
            seed: which documents are drawn. Those that are most similar to one stand behind it, as they are found.
            progress: called as `progress(done, total)` after each context.

        Raises:
            InvalidInputError: fewer than ten documents.
            StoreError: one of them was purged meanwhile, so nothing is kept.
            UnsupportedModelError: the engine merges no caches, or cannot merge this model's.
        """
        if not self.engine.merges:
            raise UnsupportedModelError("a server merges no caches, so there is no drift to learn. Use an HFEngine.")
        engine = cast("HFEngine", self.engine)
        with engine.exclusive() as model:
            check_mergeable(model)
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
        """The digest of what was learned of these documents; empty if nothing was. It changes merged answers."""
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
        """Delete everything made from one text, for a request to delete.

        From every tier of the store, and this namespace's recent contexts as a whole, since they may hold it too. What
        is being encoded from it does not come back; contexts by id, and a drift that was learned from it, are
        forgotten. It goes on past what it cannot read or delete: the report names that, and so does a `CacheWarning`.

        Args:
            source: the text itself, or what an item's metadata names as its source: a path, a URL, a document's id.
                Of more than two words, it is also found within larger texts.
            dumps: folders that `dump` of a memory or of a cube wrote, to delete it there too.
        """
        keys = self._keys_of(source)
        report = self.erased(lambda: self.store.erase(keys) + self.store.purge(source))
        report += self._forget_drift({*keys, *report.ids})
        return sum((purge_dump(folder, source) for folder in _folders(dumps)), report)

    def erased(self, erase: Callable[[], DeletionReport]) -> DeletionReport:
        """Delete from the store by calling `erase`, and drop copies outside the store before and after."""
        self._forget()
        report = erase()
        report += self.store.erase(report.ids)  # what was put in the meantime
        self._forget()  # what a question that ran meanwhile has left
        if report.failed:
            warnings.warn(f"not everything could be deleted: {report}", CacheWarning, stacklevel=3)
        return report

    def _keys_of(self, text: str) -> list[str]:
        """The ids that a text has here: by them, a file is found that is too damaged to say what it holds."""
        if not self.engine.merges:
            return []
        forms = dict.fromkeys([text, segment(text)])
        return [self.documents.key(self.engine.template.encode_text(form)) for form in forms]

    # --- putting together --------------------------------------------------------------------------------------

    def get_cache(self, ids: str | Iterable[str], *, skip_missing: bool = False) -> ContextCache | ContextPrompt | None:
        """Instruction and items as one cache, the caller's own, re-rotated, nothing recomputed; or a server's prompt.

        Continue it by `engine.generate(messages, past_key_values=cache)`. None if there are no items.

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
        """Put items together for a question.

        Args:
            items: items or their ids, in the order in which they shall stand, best first.
            query: the question, or chat messages that end with it.
            strategy: `"auto"` reuses a known context exactly, encodes documents as a whole when they are asked for
                together again, and merges by what `kvcag.calibrate` found, or by `"query"`; `"exact"` encodes
                instruction and documents in this order; `"rotate"` recomputes nothing; `"anchor"`, `"deviation"` and
                `"query"` recompute `ratio` of the tokens, chosen by that criterion; `"full"` recomputes all.
            ratio: the recompute ratio, recomputed over context tokens, in [0, 1].
            max_kl: what `"auto"` allows, in nats per token.
            canonical: put the items into an order of their own, so that the same items are the same context every
                time, whatever order they were retrieved in.
            skip_missing: leave unknown ids out.

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
        """The context of a prompt with documents: reused, merged from stored items, or encoded and stored.

        Documents are found by their content. One that cannot be read is encoded again, with a `CacheWarning`. Of
        questions that are asked at once, the first encodes what they share.

        Args:
            prompt: from `engine.template.prompt`, of messages that hold documents.
            settings: how documents are put together; by default as by `stream`.

        Raises:
            ContextLengthError: the prompt exceeds the model's context; nothing was encoded.
            UnsupportedModelError: the model's keys cannot be re-rotated.
        """
        self.engine.check_fits(len(prompt.token_ids), 1)
        with self.engine.begun(self.namespace):
            return context_of_prompt(self.documents, prompt, settings or MergeSettings())

    # --- answering ---------------------------------------------------------------------------------------------

    def ask(self, messages: str | Sequence[Message], ids: Iterable[str] | None = None, **answering: Any) -> Answer:
        """Answer from the items. `str(answer)` is the text; `.report` and `.usage` say how it was made.

        Arguments and errors are those of `stream`.
        """
        return Answer.of(self.stream(messages, ids, **answering))

    def ask_all(
        self,
        questions: Iterable[str | Sequence[Message]],
        ids: Iterable[str] | None = None,
        **answering: Any,
    ) -> list[Answer]:
        """`ask` several questions at a time, and return the answers in order.

        The answers take their steps together, which is faster than one after another. On a GPU, a context that they
        share is held once and read once a step for all of them.

        Args:
            questions: as `messages` of `stream`.
            ids: as for `stream`, the same for all.
            **answering: as for `stream`.

        Raises:
            KVCAGError: the first error of one of them; the others stop.
        """
        wanted = None if ids is None else list(ids)
        streams = [partial(self.stream, question, wanted, **answering) for question in questions]
        if not streams:
            return []
        first = streams[0]()
        begun = next(first)  # the others find the context that it made
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
        """Answer piece by piece; `str(chunk)` is its text. What both adapters call.

        Without documents, the longest prefix that was encoded before is reused.

        Args:
            messages: a question, or chat messages, whose content may hold `kvcag.Document` parts; or a prompt.
            ids: the items to answer from, in this order. None: the documents in the messages, or every item if there
                are none. An empty list: no items.
            strategy: how documents are put together, as for `merge`; so are `ratio` and `max_kl`.
            ratio: the recompute ratio, in [0, 1].
            max_kl: what `"auto"` allows, in nats per token.
            tools: shown by the chat template, if it shows tools.
            sampling: from `engine.sampling(…)`; the engine's defaults where None.
            constraint: what the answer must be.
            **settings: settings of `Sampling`, such as `max_new_tokens`, where `sampling` is not given.

        Raises:
            UnknownItemError: an id is not in the memory.
            ContextLengthError: the prompt and the answer exceed the model's context; nothing was encoded.
            ConstraintError: the constraint cannot be used, or does not fit the budget; nothing was encoded.
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
        """The answer to a prompt, over its context."""
        context: MergedContext | None = None
        known: Mode | None = None  # the engine finds the longest known prefix by itself
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
        """`stream`, in worker threads: the event loop keeps ticking, and leaving the loop stops the model."""
        async for chunk in iterate(lambda: self.stream(messages, ids, **answering)):
            yield chunk

    aask = async_twin(ask)
    aask_all = async_twin(ask_all)
    aadd = async_twin(add)
    amerge = async_twin(merge)
    apurge = async_twin(purge)

    # --- a corpus by a short name ------------------------------------------------------------------------------

    def create_context(self, texts: Iterable[str], instruction: str = "", sources: Iterable[str] = ()) -> str:
        """Encode an instruction and texts, in this order, as one document, and return its id, `kv:sha256:…`.

        The id is short, so it can stand in bound arguments, traces and checkpoints, like the `cached_content` of hosted
        models. It changes with the instruction, the texts and the model. The store holds text and caches, so the id
        can be used after a restart.

        Args:
            texts: joined by blank lines. A str is one text.
            instruction: stands before them, in the same system turn.
            sources: paths or URLs of the texts. `purge` finds the context by each source and by each text.

        Raises:
            InvalidInputError: a text or the instruction is not a str.
            EmptyPromptError: there is nothing to encode.
            ContextLengthError: they do not fit into the model's context.
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
        """Messages behind a context. A system message at their start stands after it, in the same turn.

        Args:
            id: from `create_context`, or the id of any item.
            messages: the conversation.

        Raises:
            InvalidInputError: no such context, here or in the store.
        """
        if (deletions := self.store.deletions()) != self._contexts_at:  # by another memory over the store, too
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
                f"there is no context {id!r}, here or in the store: it was never made, or it left the store. "
                "Make it with create_context(documents), which returns its id."
            )
        own = self.engine.fingerprint
        if manifest.fingerprint is not None and not own.matches(manifest.fingerprint):
            differences = "; ".join(own.differences(manifest.fingerprint))
            warnings.warn(
                f"context {id!r} was made by another model ({differences}): its text is encoded again for this one. "
                "Make a context with each model.",
                CacheWarning,
                stacklevel=5,
            )
        self._contexts[id] = segment(manifest.records.composed_text_memory)
        return self._contexts[id]

    # --- inside ------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Forget everything outside the store: recent contexts, work under way, and the texts of contexts by id."""
        self.engine.forget(self.namespace)
        self._contexts.clear()

    @property
    def _instruction_ids(self) -> Ids:
        return self.engine.template.instruction_ids(self.instruction)

    def read(self, document: object) -> Read:
        """A document's tokens, text and metadata."""
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
        """The texts of every document."""
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
    """A store as it is; one at a path or an address; for None one in memory, for all of a namespace's over this engine.

    At a path it holds `FOLDER_BYTES` (64 GiB), in memory `DEFAULT_STORE_BYTES` (4 GiB), and forgets what was not used
    for longest; pass a `DiskStore` or a `MemoryStore` for another budget.
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
    """Messages behind documents, each of which ends with a blank line.

    What a system message at the start of `messages` says stands after the documents, in the same turn.
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
    """The texts of the documents in messages."""
    parts = (content for message in messages if isinstance(content := message.get("content"), list | tuple))
    return {str(part) for part in chain.from_iterable(parts) if isinstance(part, Document)}


def _folders(dumps: Iterable[str | PathLike[str]]) -> list[str | PathLike[str]]:
    return [dumps] if isinstance(dumps, str | PathLike) else list(dumps)


def _as_list(texts: str | Iterable[str]) -> list[str]:
    """A str is one text or id, and not its characters.

    Raises:
        InvalidInputError: neither a str nor several.
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
