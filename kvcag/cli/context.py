"""The context that `ask` and `chat` answer from: all of a store as one exact context, or chosen items, merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer

from kvcag.chat_template import Document, Message, Prompt
from kvcag.cli import output
from kvcag.cli.entries import CONTEXT_OF, Entry, choose, find, open_existing, read_entries
from kvcag.cli.group import NEGATIVE, say
from kvcag.cli.loading import load_engine
from kvcag.cli.options import AnyStrategy, default_store
from kvcag.core import KVCacheItem, MergedContext, MergeReport
from kvcag.document_cache import DocumentCache
from kvcag.documents import segment
from kvcag.engines.hf import HFEngine
from kvcag.errors import ContextLengthError, FingerprintMismatchError, InvalidInputError, StoreError
from kvcag.memory import KVCacheMemory
from kvcag.stores.disk import DiskStore


@dataclass(frozen=True, slots=True)
class Corpus:
    """A model, and the items of a store that it shall answer from.

    Attributes:
        engine: the model.
        store: where the items live.
        entries: the chosen ones, in the order in which they are read.
        chosen: whether a person chose them; else they are all there are.
        instruction: the instruction before them.
        namespace: whose they are.
    """

    engine: HFEngine
    store: DiskStore
    entries: list[Entry]
    chosen: bool
    instruction: str
    namespace: str

    def context(self, question: str, strategy: AnyStrategy | None, ratio: float) -> MergedContext:
        """What the question is answered from.

        Args:
            question: what `query` chooses tokens by.
            strategy: None: the whole store exactly, chosen items by `query`.
            ratio: the recompute ratio of a merge.

        Raises:
            InvalidInputError: it does not fit into the model's context.
        """
        try:
            if not self.chosen and strategy in (None, AnyStrategy.exact):
                return self._whole(question)
            memory = KVCacheMemory(self.engine, self.store, instruction=self.instruction, namespace=self.namespace)
            how = strategy or AnyStrategy.query
            return memory.merge([entry.id for entry in self.entries], question, how.value, ratio)
        except ContextLengthError as long:
            raise InvalidInputError(
                f"{output.counted(len(self.entries), 'item')} with the question are {long.prompt_tokens:,} tokens, and "
                f"the model's context is {long.limit:,}: choose fewer with --id or --source."
            ) from long

    def _whole(self, question: str) -> MergedContext:
        """All items as one context: encoded in this order once, and kept as an item of its own."""
        prompt = self._prompt(question)
        self.engine.check_fits(len(prompt.token_ids), 1)
        keeper = DocumentCache(self.engine, self.store, self.namespace)
        key = keeper.key(prompt.context_ids)
        kept = self._kept(key)
        if kept is not None:
            return exact(kept, prompt.tail_ids)
        size = f"{output.counted(len(self.entries), 'item')}, {len(prompt.context_ids):,} tokens"
        with output.stderr().status(f"reading {size}, once"):
            item = self.engine.encode_item((), prompt.context_ids)
        item.records.composed_text_memory = "".join(prompt.documents)
        self._keep(item)
        return exact(item, prompt.tail_ids, encoded=True)

    def _kept(self, key: str) -> KVCacheItem | None:
        try:
            return self.store.get(key)
        except StoreError as damaged:
            say(f"warning: the context is encoded again: {damaged}")
            return None

    def _keep(self, item: KVCacheItem) -> None:
        """Keep a context in the place of those that this model made of the store before it changed."""
        item.records.text_memories = [entry.manifest.records.composed_text_memory for entry in self.entries]
        known = (entry.manifest.metadata.get("source") for entry in self.entries)
        sources = list(dict.fromkeys(source for source in known if isinstance(source, str)))
        item.metadata = {CONTEXT_OF: [entry.id for entry in self.entries], "source": sources}
        stale = [entry.id for entry in read_entries(self.store)[0] if entry.members and _made_by(self.engine, entry)]
        try:
            self.store.put(item)
            self.store.delete(id for id in stale if id != item.id)
        except StoreError as full:
            say(f"warning: the context was encoded and not kept, so the next question waits again: {full}")

    def _prompt(self, question: str) -> Prompt:
        documents = [Document(segment(entry.manifest.records.composed_text_memory)) for entry in self.entries]
        opening = [f"{self.instruction}\n\n"] if self.instruction else []
        system: Message = {"role": "system", "content": [*opening, *documents]}
        return self.engine.template.prompt([system, {"role": "user", "content": question}])


def exact(item: KVCacheItem, tail_ids: Sequence[int], *, encoded: bool = False) -> MergedContext:
    """An item that holds a whole context, instruction and documents, as a context to be continued by `tail_ids`.

    Args:
        item: made by `DocumentCache.encode` after no prefix.
        tail_ids: what follows the documents.
        encoded: it was encoded just now; else it is reused.
    """
    assert item.fingerprint is not None
    count = len(item.token_ids)
    reused = 0 if encoded else count
    report = MergeReport("encoded" if encoded else "prefix", "exact", count, reused, 0, count - reused)
    tail = torch.tensor(tail_ids, dtype=torch.long)
    return MergedContext(item.memory, item.token_ids, tail, report, item.fingerprint)


def open_corpus(
    model: str | None,
    store: Path | None,
    namespace: str,
    instruction: str,
    ids: Sequence[str] | None,
    sources: Sequence[str] | None,
) -> Corpus:
    """Choose items, then load the model.

    Raises:
        UnknownItemError: no item has such an id.
        FingerprintMismatchError: another model made them.
    """
    opened = open_existing(store, namespace)
    entries = [entry for entry in read_entries(opened)[0] if not entry.members]
    chosen = sorted(entries, key=_place)
    if ids or sources:
        from_sources = choose(chosen, sources, None) if sources else []
        chosen = list({entry.id: entry for entry in [*find(entries, ids or []), *from_sources]}.values())
    if not chosen or opened is None:
        what = "nothing has this source" if entries else "nothing is kept"
        say(f"{what} in {store or default_store()}. `kvcag ls` lists what is; `kvcag encode PATH` keeps more.")
        raise typer.Exit(NEGATIVE)
    engine = load_engine(model)
    own = [entry for entry in chosen if _made_by(engine, entry)]
    if not own or (ids and len(own) < len(chosen)):
        other = next(entry for entry in chosen if entry not in own)
        made_by = other.manifest.fingerprint
        differences = engine.fingerprint.differences(made_by) if made_by else ["it names no model"]
        named = made_by.model_name if made_by else "?"
        raise FingerprintMismatchError(f"item {other.short} ({named})", differences)
    if len(own) < len(chosen):
        say(f"{output.counted(len(chosen) - len(own), 'item')} of other models left out")
    return Corpus(engine, opened, own, bool(ids or sources), instruction, namespace)


def _made_by(engine: HFEngine, entry: Entry) -> bool:
    made_by = entry.manifest.fingerprint
    return made_by is not None and engine.fingerprint.matches(made_by)


def _place(entry: Entry) -> tuple[str, int, str]:
    """Files by name, and the parts of one in their order: the same context whatever was encoded first."""
    metadata = entry.manifest.metadata
    return str(metadata.get("source", "")), int(metadata.get("part", 0)), entry.id
