"""KVCacheMemory: MemOS's activation memory over an engine and a store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, TypeAlias

from kvcag.cache.hf import ContextCache
from kvcag.compose import MAX_KL, Strategy
from kvcag.config import KVCacheMemoryConfig, parse
from kvcag.context import ContextPrompt, MergedContext
from kvcag.corpus import Counter, SyncReport, sync
from kvcag.engines.base import Chunk, Engine
from kvcag.engines.constrain import ConstraintLike
from kvcag.engines.hf import HFEngine
from kvcag.engines.sampling import Sampling
from kvcag.engines.serving import Serving
from kvcag.errors import (
    EmptyPromptError,
    InvalidInputError,
    UnknownItemError,
    UnsupportedModelError,
)
from kvcag.items import ActivationMemoryItem, KVCacheItem, VLLMKVCacheItem
from kvcag.keeping import Ids
from kvcag.merging import Merging
from kvcag.prompt import Message, Prompt, as_messages
from kvcag.served import Served
from kvcag.stores.base import KVStore
from kvcag.stores.folder import dump_items, load_items
from kvcag.stores.memory import MemoryStore
from kvcag.stores.planner import Planner
from kvcag.texts import Texts, text_and_metadata, texts_of

Item: TypeAlias = KVCacheItem | VLLMKVCacheItem
"""A text's keys and values, or, over a server, its prompt."""


class KVCacheMemory:
    """Texts, encoded once each and put together per question.

    Each text is encoded after the head, so that the head's tokens stand before every document as they will in the
    prompt, and only the text's own keys and values are kept. Put together, they are re-rotated to their true
    positions. Safe to use from several threads.

    Args:
        engine: the model that encodes and answers. A server (`VLLMEngine`) is sent documents ahead and keeps their keys
            and values itself: items are prompts then, and a merge is the prompt of all of them, in order. One that
            keeps nothing (`EchoEngine`) answers messages with documents by reading them.
        store: where items live; in memory by default.
        head: the instruction that stands before the documents, in the system turn.
        separator: put after a text that does not end with a line break, so that documents do not run together.
        tenant: keeps what this memory encodes apart from other tenants' in the engine's recent contexts.
        memory_filename: the name of the manifest that `dump` writes.
        promote_after: under `"auto"`, documents that were merged this often in the same order are encoded as a whole
            the next time, where recent contexts have room for it, and are exact from then on. None: never. Other
            strategies do what their name says every time, so that equal questions have equal answers.
        planner: decides per document whether loading is quicker than encoding, and says so in the report; see
            `kvcag.stores.planner.measure`. By default what is kept is loaded.
    """

    def __init__(
        self,
        engine: Engine,
        store: KVStore | None = None,
        head: str | None = None,
        *,
        separator: str = "\n\n",
        tenant: str = "",
        memory_filename: str = "kv_cache_memories.json",
        promote_after: int | None = 2,
        planner: Planner | None = None,
    ) -> None:
        self.engine = engine
        self.store: KVStore = MemoryStore() if store is None else store
        self.head = head
        self.separator = separator
        self.tenant = tenant
        self.memory_filename = memory_filename
        self.promote_after = promote_after
        self.planner = planner
        self.watchers: list[Callable[[Prompt], None]] = []  # told of each prompt whose documents are looked for
        self._asked = Counter()
        self._encoding = threading.Lock()

    @classmethod
    def from_config(cls, config: KVCacheMemoryConfig | dict[str, Any]) -> KVCacheMemory:
        """From a MemOS-shaped configuration. Loads the model."""
        parsed = parse(config)
        return cls(parsed.extractor_llm.engine(), head=parsed.head, memory_filename=parsed.memory_filename)

    # --- encoding ----------------------------------------------------------------------------------------------

    def extract(self, text: Texts) -> Item:
        """Encode a text. The item is not added.

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
        head_ids = self.engine.template.around(self.head, _PLACEHOLDER).head_ids
        item = self._contexts.encode(head_ids, self._segment(composed), composed)
        item.records.text_memories = texts
        return item

    def from_textual_memory(self, memory: object) -> Item:
        """Encode a str, a LangChain `Document`, a LlamaIndex node, or anything with `.memory` and `.metadata`.

        The item has the memory's metadata, and is not added.
        """
        text, metadata = text_and_metadata(memory)
        item = self.extract(text)
        item.metadata = metadata
        return item

    # --- keeping -----------------------------------------------------------------------------------------------

    def add(self, items: Item | Iterable[Item]) -> None:
        """Keep items; one with the same id is replaced.

        Raises:
            FingerprintMismatchError: an item was made by another model. Nothing was added.
        """
        new: list[Any] = [items] if isinstance(items, ActivationMemoryItem) else list(items)
        contexts = self._contexts
        for item in new:
            contexts.check(item)
        for item in new:
            contexts.put(item)

    def get(self, id: str) -> Item | None:
        """The item, or None. It is to be read; generating with its `memory` leaves what is stored as it is."""
        return self._contexts.get(id)

    def get_by_ids(self, ids: Iterable[str]) -> list[Item | None]:
        """The items in the order of `ids`, None for each that is missing."""
        return [self.get(id) for id in ids]

    def get_all(self) -> list[Item]:
        """Every item."""
        return [item for key in list(self.store.keys()) if (item := self.get(key)) is not None]

    def delete(self, ids: str | Iterable[str]) -> None:
        """Forget items; ids that are missing are ignored."""
        self.store.delete([ids] if isinstance(ids, str) else list(ids))

    def delete_all(self) -> None:
        """Forget every item."""
        self.store.delete(list(self.store.keys()))

    def dump(self, dir: str | PathLike[str]) -> None:
        """Write every item to a folder. What stood there before is replaced in one step, or not at all."""
        stored = [item for key in list(self.store.keys()) if (item := self.store.get(key)) is not None]
        dump_items(dir, self.memory_filename, stored)

    def load(self, dir: str | PathLike[str]) -> None:
        """Add every item of a folder that `dump` wrote. A folder that holds nothing adds nothing.

        Everything is read and checked first: when this raises, the memory is as it was.

        Raises:
            CorruptItemError: a file was cut, changed or is missing.
            FormatError: the manifest is missing, is a pickle, or is of a newer version.
            FingerprintMismatchError: the items were made by another model.
        """
        for item in load_items(dir, self.memory_filename, self.engine.fingerprint):
            self.store.put(item)

    # --- putting together --------------------------------------------------------------------------------------

    def get_cache(self, ids: str | Iterable[str], *, skip_missing: bool = False) -> ContextCache | ContextPrompt | None:
        """Head and items as one cache, the caller's own, re-rotated, nothing recomputed; or as a server's prompt.

        To be continued by `engine.generate(messages, past_key_values=cache)`. None if there are no items.

        Raises:
            UnknownItemError: an id is not in the memory, unless it may be skipped.
        """
        items = self._items(ids, skip_missing)
        if not items:
            return None
        prompt = self.engine.template.around(self.head, _PLACEHOLDER)
        return self._contexts.cache(prompt.head_ids, items)

    def merge(
        self,
        ids: str | Iterable[str],
        query: str | Sequence[Message],
        strategy: Strategy = "query",
        ratio: float = 0.2,
        *,
        max_kl: float = MAX_KL,
        canonical: bool = False,
        skip_missing: bool = False,
    ) -> MergedContext:
        """Put items together for a question.

        Args:
            ids: in the order in which they shall stand; best first.
            query: the question, or chat messages that end with it.
            strategy: `"exact"` encodes head and documents in this order; `"rotate"` recomputes nothing; `"anchor"`,
                `"deviation"` and `"query"` recompute `ratio` of the tokens, chosen by that criterion; `"full"`
                recomputes all; `"auto"` takes the cheapest that `engine.calibrate` found to be within `max_kl`, or
                encodes all, and takes what was encoded in this order before.
            ratio: the recompute ratio, recomputed over context tokens, in [0, 1].
            max_kl: what `"auto"` allows, nats a token.
            canonical: put the items into an order of their own, whatever the order of `ids`, so that the same ones
                are the same context every time.
            skip_missing: leave unknown ids out.

        Raises:
            InvalidInputError: no ids, or a ratio out of range.
            UnknownItemError: an id is not in the memory, unless it may be skipped.
            ContextLengthError: head, documents and question exceed the model's context.
            UnsupportedModelError: the model's keys cannot be re-rotated.
        """
        prompt = self.engine.template.around(self.head, as_messages(query))
        items = self._items(ids, skip_missing)
        if not items:
            raise InvalidInputError("there is nothing to merge: pass at least one id of an item in the memory")
        tokens = len(prompt.head_ids) + sum(len(item.token_ids) for item in items) + len(prompt.tail_ids)
        self.engine.check_fits(tokens, 1)
        if canonical:
            items.sort(key=lambda item: item.content_key)
        return self._contexts.merge(prompt.head_ids, items, prompt.tail_ids, strategy, ratio, max_kl)

    def context_for(
        self, prompt: Prompt, strategy: Strategy = "query", ratio: float = 0.2, max_kl: float = MAX_KL
    ) -> MergedContext:
        """The context of a prompt with documents: reused as it is, merged from what is kept, or encoded and kept.

        Documents are found by their content. One that cannot be read is encoded again, with a `CacheWarning`. Of
        questions that are asked at once, the first encodes what they share.

        Args:
            prompt: from `engine.template.prompt`, of messages that hold documents.
            strategy: as for `merge`; so are `ratio` and `max_kl`.
            ratio: the recompute ratio, in [0, 1].
            max_kl: what `"auto"` allows, nats a token.

        Raises:
            ContextLengthError: the prompt exceeds the model's context; nothing was encoded.
            UnsupportedModelError: the model's keys cannot be re-rotated.
        """
        self.engine.check_fits(len(prompt.token_ids), 1)
        return self._contexts.context_for(prompt, strategy, ratio, max_kl)

    def keep(self, messages: Sequence[Message], metadata: Sequence[Mapping[str, Any]] | None = None) -> list[str]:
        """Encode the documents of messages before anybody asks, and return their ids, in order.

        Args:
            messages: as for `stream`. What is kept without a head is found after any head; else after the same.
            metadata: one for each document, for what is encoded now.
        """
        prompt = self.engine.template.prompt(messages)
        contexts = self._contexts
        for at, token_ids in enumerate(prompt.document_ids):
            if not contexts.at_hand(prompt.head_ids, token_ids):
                known = metadata[at] if metadata else {}
                contexts.keep(prompt.head_ids, token_ids, prompt.documents[at], known)
        return [contexts.key(prompt.head_ids, token_ids) for token_ids in prompt.document_ids]

    def sync(self, documents: Iterable[object], corpus: str = "default") -> SyncReport:
        """Bring what is kept in step with a corpus: encode what is new, keep what is the same, drop what is gone.

        Args:
            documents: whatever `from_textual_memory` takes. Two that say the same are one.
            corpus: its name. What other corpora, or nobody, brought here stays as it is.

        Raises:
            EmptyPromptError: a document is empty. Nothing was changed.
        """
        head_ids = self.engine.template.around(self.head, _PLACEHOLDER).head_ids
        read = [(self._segment(text), text, metadata) for text, metadata in map(text_and_metadata, documents)]
        return sync(self._contexts, head_ids, read, corpus)

    def purge(self, source: str) -> list[str]:
        """Delete everything made from one text, for a request to delete, and return the ids.

        From every tier of the store, and this tenant's recent contexts as a whole, since they may hold it too.

        Args:
            source: the text itself, or what an item's metadata names as its source: a path, a URL, a document's id.
        """
        self._contexts.clear()
        return self.store.purge(source)

    def stream(
        self,
        messages: str | Sequence[Message] | Prompt,
        *,
        strategy: Strategy = "query",
        ratio: float = 0.2,
        max_kl: float = MAX_KL,
        tools: Sequence[Mapping[str, Any]] | None = None,
        sampling: Sampling | None = None,
        constraint: ConstraintLike | None = None,
    ) -> Generator[Chunk, None, None]:
        """Answer messages whose documents (`kvcag.prompt.Document`) come from caches. What both adapters call.

        Without documents, the longest prefix that was encoded before is reused.

        Args:
            messages: chat messages, whose content may hold `Document` parts; a str for one user message; or a prompt.
            strategy: how documents are put together, as for `merge`; so are `ratio` and `max_kl`.
            ratio: the recompute ratio, in [0, 1].
            max_kl: what `"auto"` allows, nats a token.
            tools: shown by the chat template, if it shows tools.
            sampling: from `engine.sampling(…)`; the engine's defaults where None.
            constraint: what the answer must be.

        Raises:
            ContextLengthError: the prompt and the answer exceed the model's context; nothing was encoded.
            ConstraintError: the constraint cannot be used, or does not fit the budget; nothing was encoded.
        """
        started = time.perf_counter()
        settings = sampling or self.engine.sampling()
        template = self.engine.template
        prompt = messages if isinstance(messages, Prompt) else template.prompt(as_messages(messages), tools=tools)
        budget = self.engine.check_fits(len(prompt.token_ids), settings.max_new_tokens)
        if constraint is not None:
            constraint = self.engine.constrain(constraint, budget, prompt.thinking)
        context = None  # read, or read before, in this order: the engine finds the longest prefix by itself
        if prompt.document_ids and isinstance(self.engine, HFEngine) and strategy != "exact":
            for watch in self.watchers:
                watch(prompt)
            if self._merging(self.engine).known(prompt) < len(prompt.context_ids):
                context = self.context_for(prompt, strategy, ratio, max_kl)
        return self.engine.stream(prompt, settings, context, constraint=constraint, tenant=self.tenant, started=started)

    # --- inside ------------------------------------------------------------------------------------------------

    def _segment(self, text: str) -> Ids:
        return self.engine.template.encode(text if text.endswith("\n") else text + self.separator)

    @property
    def _contexts(self) -> Merging | Served:
        """What encodes, keeps and puts together over this engine."""
        if isinstance(self.engine, HFEngine):
            return self._merging(self.engine)
        if isinstance(self.engine, Serving):
            return Served(self.engine, self.store, self.tenant)
        raise UnsupportedModelError(
            f"{type(self.engine).__name__} keeps no caches that could be taken out: use an HFEngine to encode, keep "
            "and merge. stream() answers with either."
        )

    def _merging(self, engine: HFEngine) -> Merging:
        settings = self.planner, self.promote_after, self._asked, self._encoding
        return Merging(engine, self.store, self.tenant, *settings)

    def _items(self, ids: str | Iterable[str], skip_missing: bool) -> list[Any]:
        wanted = [ids] if isinstance(ids, str) else list(ids)
        found = [self._contexts.get(id) for id in wanted]
        missing = [id for id, item in zip(wanted, found, strict=True) if item is None]
        if missing and not skip_missing:
            raise UnknownItemError(dict.fromkeys(missing))
        return [item for item in found if item is not None]


_PLACEHOLDER: list[Message] = [{"role": "user", "content": "…"}]
