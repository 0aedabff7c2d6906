"""Documents by their content: found where they are kept, or encoded and kept."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import islice
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch

from kvcag.cache.layers import share
from kvcag.core import Item, KVCacheItem, KVCacheRecords, VLLMKVCacheItem, content_key
from kvcag.engines.base import Engine
from kvcag.errors import CacheWarning, EmptyPromptError, FingerprintMismatchError, InvalidInputError, StoreError
from kvcag.stores.base import KVStore
from kvcag.stores.format import Manifest
from kvcag.streams import holding

Ids: TypeAlias = tuple[int, ...]

_SERVED = "served"
"""In the metadata of a stored `VLLMKVCacheItem`: its prompt and its tokens. A store keeps it without tensors."""
_CORPUS = "corpus"
_guard = threading.Lock()


@dataclass(frozen=True, slots=True)
class DocumentCache:
    """Finds, encodes and keeps the documents of one namespace. An item's id is its content key.

    Attributes:
        engine: the model that encodes.
        store: where items live.
        namespace: whose recent contexts the engine may reuse.
        encoding: a lock for each document that is being looked up or encoded, by its id.
    """

    engine: Engine
    store: KVStore
    namespace: str = ""
    encoding: WeakValueDictionary[str, threading.Lock] = field(default_factory=WeakValueDictionary)

    def key(self, token_ids: Iterable[int]) -> str:
        """The id under which a document is kept."""
        return content_key(self.engine.fingerprint.digest, token_ids)

    def contains(self, head_ids: Ids, token_ids: Ids) -> bool:
        """Whether a document can be used without encoding it."""
        kept = self.store.contains(self.key(token_ids))
        return kept and self.engine.still_holds((*head_ids, *token_ids), self.namespace)

    def encode(self, head_ids: Ids, token_ids: Ids, text: str, metadata: Mapping[str, Any] | None = None) -> Item:
        """Encode a document behind `head_ids`. It is not kept."""
        item = self.engine.encode_item(head_ids, token_ids, namespace=self.namespace)
        item.records = KVCacheRecords(text_memories=[text], composed_text_memory=text)
        item.metadata = {
            "source_text": text,
            "extracted_at": datetime.now(timezone.utc).isoformat(),
            **(metadata or {}),
        }
        return item

    def find_or_encode(
        self, head_ids: Ids, token_ids: Ids, text: str, metadata: Mapping[str, Any] | None = None
    ) -> tuple[Item, bool]:
        """The document's item, and whether this call encoded and kept it.

        Of several threads that need a document at once, the first encodes it. An item that is damaged, foreign or out
        of reach is encoded again, and one that cannot be stored is used all the same, each with a `CacheWarning`.
        """
        key = self.key(token_ids)
        with holding(self._lock_of(key)):
            try:
                item = self.get(key) if self.contains(head_ids, token_ids) else None
                if item is not None:
                    self.engine.check_item(item)
                    return item, False
            except (StoreError, FingerprintMismatchError, InvalidInputError) as damaged:
                warnings.warn(f"encoding a document again: {damaged}", CacheWarning, stacklevel=4)
            item = self.encode(head_ids, token_ids, text, metadata)
            try:
                self.put(item)
            except StoreError as full:
                warnings.warn(f"a document was encoded and not kept: {full}", CacheWarning, stacklevel=4)
            return item, True

    def _lock_of(self, key: str) -> threading.Lock:
        with _guard:
            return self.encoding.setdefault(key, threading.Lock())

    def put(self, item: Item) -> None:
        """Keep an item. Its owner may go on writing to it."""
        if isinstance(item, KVCacheItem):
            self.store.put(item.model_copy(update={"memory": share(item.memory)}))
            return
        served = {"prompt": item.memory, "token_ids": item.token_ids.tolist()}
        self.store.put(
            KVCacheItem(
                id=item.id,
                records=item.records,
                metadata={**item.metadata, _SERVED: served},
                fingerprint=item.fingerprint,
                base_position=item.base_position,
                prefix_digest=item.prefix_digest,
            )
        )

    def get(self, id: str) -> Item | None:
        """The item, or None. Generating with its `memory` leaves the stored item as it is."""
        stored = self.store.get(id)
        if stored is None:
            return None
        if _SERVED not in stored.metadata:
            return stored.model_copy(update={"memory": share(stored.memory)})
        metadata = dict(stored.metadata)
        served = metadata.pop(_SERVED)
        return VLLMKVCacheItem(
            id=stored.id,
            memory=served["prompt"],
            records=stored.records,
            metadata=metadata,
            token_ids=torch.tensor(served["token_ids"], dtype=torch.long),
            fingerprint=stored.fingerprint,
            base_position=stored.base_position,
            prefix_digest=stored.prefix_digest,
        )

    def warn_if_foreign(self) -> None:
        """Warn if another model made what the store holds: it stays as it is and is not used.

        Looks at a few items, and is silent where one of them fits: models may share a store.
        """
        own = self.engine.fingerprint
        try:
            made_by = [found.fingerprint for _, found in islice(self.store.manifests(), 8) if found.fingerprint]
        except StoreError as gone:
            warnings.warn(f"the store cannot be read, so documents are encoded: {gone}", CacheWarning, stacklevel=3)
            return
        if made_by and not any(own.matches(other) for other in made_by):
            warnings.warn(
                f"the store's items were made by another model ({'; '.join(own.differences(made_by[0]))}). They stay "
                "as they are and are not used. Give each model a store of its own, or load the model that made them.",
                CacheWarning,
                stacklevel=3,
            )


Read: TypeAlias = tuple[Ids, str, dict[str, Any]]
"""Token ids, text and metadata of a document."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What `KVCacheMemory.sync` did: how many documents, and the ids of all that are kept, in the corpus's order."""

    encoded: int
    kept: int
    dropped: int
    ids: list[str]


@dataclass(frozen=True, slots=True)
class SyncDiff:
    """What has to be done to bring a store in step with a corpus.

    Attributes:
        wanted: id → token ids, text and metadata of each document, in the corpus's order.
        new: ids that are not kept yet.
        gone: ids of what is kept of this corpus and no longer wanted.
    """

    wanted: dict[str, Read]
    new: list[str]
    gone: list[str]


def diff(
    documents: DocumentCache, head_ids: Ids, corpus: Iterable[Read], is_mine: Callable[[Manifest], bool]
) -> SyncDiff:
    """Compare a corpus with what is kept. Nothing is changed.

    Args:
        documents: where documents are kept.
        head_ids: the tokens that stand before them.
        corpus: token ids, text and metadata of each document. Two with the same text are one.
        is_mine: whether an item that is kept belongs to this corpus; no others are dropped.

    Raises:
        EmptyPromptError: a document is empty.
    """
    wanted: dict[str, Read] = {}
    for number, (token_ids, text, metadata) in enumerate(corpus, start=1):
        if not text.strip():
            raise EmptyPromptError(f"document {number} of the corpus is empty: leave it out")
        wanted[documents.key(token_ids)] = (token_ids, text, metadata)
    store = documents.store
    new = [key for key, (token_ids, *_) in wanted.items() if not documents.contains(head_ids, token_ids)]
    gone = [key for key, manifest in store.manifests() if key not in wanted and is_mine(manifest)]
    return SyncDiff(wanted, new, gone)


def sync(documents: DocumentCache, head_ids: Ids, corpus: Iterable[Read], name: str) -> SyncReport:
    """Encode what is new, keep what is the same, drop what is gone.

    Args:
        documents: where documents are kept.
        head_ids: the tokens that stand before them.
        corpus: token ids, text and metadata of each document.
        name: the corpus's name; no other corpus's documents are dropped.

    Raises:
        EmptyPromptError: a document is empty. Nothing was changed.
    """
    named = ((ids, text, {**metadata, _CORPUS: name}) for ids, text, metadata in corpus)
    found = diff(documents, head_ids, named, lambda manifest: manifest.metadata.get(_CORPUS) == name)
    for key in found.new:
        documents.find_or_encode(head_ids, *found.wanted[key])
    documents.store.delete(found.gone)
    return SyncReport(len(found.new), len(found.wanted) - len(found.new), len(found.gone), list(found.wanted))


def same_ids(items: Sequence[Item]) -> Ids:
    """The items' tokens, one after another."""
    return tuple(token for item in items for token in item.token_ids.tolist())
