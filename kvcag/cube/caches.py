"""The activation side of a cube: caches that follow its texts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, cast

from kvcag.cache.layers import layers_of
from kvcag.chat_template import Message, Prompt
from kvcag.core import EncodedItem, KVCacheItem, KVCacheRecords
from kvcag.cube.texts import made_of, said
from kvcag.documents import segment
from kvcag.engines.hf import HFEngine
from kvcag.errors import CacheWarning, CorruptItemError, FormatError
from kvcag.memory import KVCacheMemory, insert_documents
from kvcag.scheduler.store import ScheduledStore
from kvcag.stores.format import Manifest

_PLACEHOLDER: Message = {"role": "user", "content": "…"}


class Caches:
    """What a memory keeps of a cube's texts. Over an engine that keeps no caches, it holds none.

    Args:
        memory: keeps and merges them.
    """

    def __init__(self, memory: KVCacheMemory) -> None:
        self.memory = memory

    def prompt(self, segments: Sequence[str]) -> Prompt:
        """The prompt in which segments stand behind the memory's instruction, with nothing asked yet."""
        messages = insert_documents(self.memory.instruction or "", segments, [_PLACEHOLDER])
        return self.memory.engine.template.prompt(messages)

    def held(self, prompt: Prompt) -> list[bool]:
        """Which documents of a prompt need not be read: their caches are kept, or the context was read as it is."""
        engine = self.memory.engine
        known = engine.known_prefix(prompt.context_ids, self.memory.namespace)
        ends = list(accumulate(map(len, prompt.document_ids), initial=len(prompt.head_ids)))[1:]
        if engine.merges and known < len(prompt.context_ids):
            return [self.memory.documents.contains(prompt.head_ids, token_ids) for token_ids in prompt.document_ids]
        return [end <= known for end in ends]

    def encode(self, document: str, metadata: dict[str, Any]) -> bool:
        """Encode a document, if it is not kept yet. Says whether it was encoded now."""
        prompt = self.prompt([document])
        if self.memory.documents.contains(prompt.head_ids, prompt.document_ids[0]):
            return False
        self.memory.keep(insert_documents(self.memory.instruction or "", [document], [_PLACEHOLDER]), [metadata])
        return True

    def drop(self, gone: set[str], live: set[str]) -> None:
        """Delete what was made from texts that are gone, alone or with others, from every tier.

        Recent contexts leave as a whole, since any of them may hold such a text. What was made from a live text alone
        stays.

        Args:
            gone: texts, as they were given.
            live: what the cube's texts say (`said`).
        """
        if not gone:
            return
        store, engine = self.memory.store, self.memory.engine
        said_then = {said(text) for text in gone}
        stale = [key for key in list(store.keys()) if self._holds(key, said_then, live)]
        # also where a damaged file no longer says what it was made from
        prompts = [self.prompt([segment(text)]) for text in gone]
        stale += [self.memory.documents.key(one.document_ids[0]) for one in prompts]
        store.delete(stale)
        if isinstance(store, ScheduledStore):  # which would remember the texts, and encode them ahead again
            for text in gone:
                store.purge(text)
        engine.forget(self.memory.namespace)

    def keep_only(self, live: set[str]) -> None:
        """Delete what was made from anything but live texts."""
        store = self.memory.store
        store.delete([key for key in list(store.keys()) if not self._is_made_of(key, live)])

    def made_of(self, live: set[str]) -> Iterator[KVCacheItem]:
        """The items that were made from live texts and nothing else, one after another.

        One that cannot be read is left out, with a `CacheWarning`.
        """
        store = self.memory.store
        for key in list(store.keys()):
            try:
                manifest = store.manifest(key)
                item = store.get(key) if manifest and made_of(_text(manifest), live) else None
                if item is not None:
                    layers_of(item.memory)  # a store may read them now, and find them damaged
                    yield item
            except (CorruptItemError, FormatError) as damaged:
                warnings.warn(f"a cache was left out of the dump: {damaged}", CacheWarning, stacklevel=5)

    def instruction(self) -> KVCacheItem | None:
        """The instruction's own cache: with it, a first question elsewhere encodes nothing but its tail."""
        engine, head_ids = self.memory.engine, self.prompt(["…"]).head_ids
        if not engine.merges or not head_ids:
            return None
        context = engine.exact_context(head_ids, (), self.memory.namespace)
        text = self.memory.instruction or ""
        return KVCacheItem(
            memory=context.cache,
            records=KVCacheRecords(text_memories=[text], composed_text_memory=text),
            token_ids=context.token_ids,
            fingerprint=engine.fingerprint,
        )

    def take(self, items: Iterable[KVCacheItem], head_id: str | None) -> dict[str, list[str]]:
        """Keep the items that this model made. Returns the texts whose items others made, and how these differ."""
        fingerprint, keeps = self.memory.engine.fingerprint, self.memory.engine.item_type is not EncodedItem
        foreign, taken = dict[str, list[str]](), set[str]()
        for item in items:
            text = item.records.composed_text_memory
            ours = keeps and item.fingerprint is not None and fingerprint.matches(item.fingerprint)
            if ours and item.id == head_id:
                self._seed(item)
            elif ours:
                self.memory.store.put(item)
                taken.add(text)
            elif item.id != head_id and item.fingerprint is not None:
                foreign[text] = fingerprint.differences(item.fingerprint)
        return {text: differences for text, differences in foreign.items() if text not in taken}

    def _seed(self, instruction: KVCacheItem) -> None:
        """Put the instruction's cache among the recent contexts, where the engine looks for it."""
        engine = self.memory.engine
        assert engine.merges
        engine = cast("HFEngine", engine)
        layers = [(keys.to(engine.device), values.to(engine.device)) for keys, values in layers_of(instruction.memory)]
        engine.prefixes.insert(instruction.token_ids.tolist(), layers, self.memory.namespace)

    def _holds(self, key: str, gone: set[str], live: set[str]) -> bool:
        """Whether an item was made from what is gone, or can no longer say what it was made from."""
        try:
            manifest = self.memory.store.manifest(key)
        except (CorruptItemError, FormatError):
            return True
        text = "" if manifest is None else said(_text(manifest))
        return text not in live and any(one in text for one in gone)

    def _is_made_of(self, key: str, live: set[str]) -> bool:
        try:
            manifest = self.memory.store.manifest(key)
        except (CorruptItemError, FormatError):
            return False
        return manifest is not None and made_of(_text(manifest), live)


def _text(manifest: Manifest) -> str:
    return manifest.records.composed_text_memory
