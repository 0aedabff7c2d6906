"""Documents by their content: found where they are kept, or encoded and kept."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain
from typing import Any, TypeAlias

import torch
from transformers import DynamicCache

from kvcag.cache.layers import LayerKV, cache_of, layers_of
from kvcag.chat_template import Prompt
from kvcag.core import (
    ContextPrompt,
    KVCacheItem,
    KVCacheRecords,
    MergedContext,
    MergeReport,
    ServedContext,
    VLLMKVCacheItem,
    content_key,
    ids_digest,
)
from kvcag.engines.base import Serving
from kvcag.engines.hf import HFEngine
from kvcag.errors import CacheWarning, EmptyPromptError, FingerprintMismatchError, InvalidInputError, StoreError
from kvcag.stores.base import KVStore
from kvcag.stores.format import Manifest
from kvcag.stores.planner import Planner

Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """A document's item, whether it was encoded just now, and the planner's reason if one was asked."""

    item: KVCacheItem
    created: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Keeper:
    """Finds, encodes and keeps documents for one tenant.

    Attributes:
        engine: the model that encodes.
        store: where items live.
        tenant: whose recent contexts the engine may reuse.
        planner: whether loading is quicker than encoding; None always loads.
    """

    engine: HFEngine
    store: KVStore
    tenant: str = ""
    planner: Planner | None = None

    def key(self, head_ids: Ids, token_ids: Ids) -> str:
        """The id under which a document is kept after a head."""
        return content_key(self.engine.fingerprint.digest, ids_digest(head_ids), token_ids)

    def keys(self, head_ids: Ids, token_ids: Ids) -> list[str]:
        """The ids under which it may be found: what was encoded after this head comes first, then after none."""
        no_head = self.engine.template.around(None, [{"role": "user", "content": "…"}]).head_ids
        return list(dict.fromkeys((self.key(head_ids, token_ids), self.key(no_head, token_ids))))

    def at_hand(self, head_ids: Ids, token_ids: Ids) -> bool:
        """Whether a document need not be encoded to be kept."""
        return self.store.contains(self.key(head_ids, token_ids))

    def encode(self, head_ids: Ids, token_ids: Ids, text: str) -> KVCacheItem:
        """A document encoded after a head; it is not kept."""
        return self.item(self.engine.encode_after(head_ids, token_ids, tenant=self.tenant), head_ids, token_ids, text)

    def item(self, layers: Sequence[LayerKV], head_ids: Ids, token_ids: Ids, text: str) -> KVCacheItem:
        """The item of a document whose keys and values, encoded after a head, are `layers`."""
        return KVCacheItem(
            memory=cache_of(layers),
            records=KVCacheRecords(text_memories=[text], composed_text_memory=text),
            metadata={"source_text": text, "extracted_at": datetime.now(timezone.utc).isoformat()},
            token_ids=torch.tensor(token_ids, dtype=torch.long),
            fingerprint=self.engine.fingerprint,
            base_position=len(head_ids),
            prefix_digest=ids_digest(head_ids),
        )

    def keep(self, head_ids: Ids, token_ids: Ids, text: str, metadata: Mapping[str, Any] | None = None) -> Kept:
        """A document as it is kept after this head or after none, or encoded and kept now.

        What is damaged or cannot be read is encoded again, and what cannot be kept is used all the same, each with a
        `CacheWarning`.
        """
        load, reason = True, ""
        for known in self.keys(head_ids, token_ids):
            try:
                load, reason = self._worth_loading(known, len(token_ids))
                item = self.store.get(known) if load else None
                if item is not None:
                    self.check(item)
                    layers_of(item.memory)  # a store may read them now, and find them damaged
                    return Kept(item, created=False, reason=reason)
            except (StoreError, FingerprintMismatchError) as damaged:
                warnings.warn(f"encoding a document again: {damaged}", CacheWarning, stacklevel=4)
            if not load:
                break
        item = self.encode(head_ids, token_ids, text)
        item.id = self.key(head_ids, token_ids)
        item.metadata.update(metadata or {})
        if not load:  # it is kept already
            return Kept(item, created=True, reason=reason)
        try:
            self.store.put(item)
        except StoreError as full:
            warnings.warn(f"a document was encoded and not kept: {full}", CacheWarning, stacklevel=4)
        return Kept(item, created=True, reason=reason)

    def check(self, item: KVCacheItem) -> None:
        """Refuse what this engine did not make.

        Raises:
            InvalidInputError: it is no item, or does not say which model made it.
            FingerprintMismatchError: another model made it.
        """
        if not isinstance(item, KVCacheItem):
            raise InvalidInputError(f"an item is a KVCacheItem, not {type(item).__name__}: make one with extract()")
        if item.fingerprint is None:
            raise InvalidInputError(f"item {item.id!r} does not say which model made it: make it with extract()")
        if not self.engine.fingerprint.matches(item.fingerprint):
            raise FingerprintMismatchError(f"item {item.id!r}", self.engine.fingerprint.differences(item.fingerprint))

    def _worth_loading(self, key: str, tokens: int) -> tuple[bool, str]:
        """Whether to load an item rather than to encode it, and the reason, if a planner is asked and it is there."""
        place = self.store.place_of(key) if self.planner else None
        if self.planner is None or place is None:
            return True, ""
        plan = self.planner.plan(tokens, tokens * self.engine.bytes_per_token, place)
        return plan.load, plan.reason


_SERVED = "served"
"""In the metadata of a stored item: its prompt and its tokens. A store keeps it as an item without tensors."""


@dataclass(frozen=True, slots=True)
class Served:
    """Sends, keeps and puts together documents for one tenant. What `kvcag.contexts.Merging` is for an `HFEngine`.

    Attributes:
        engine: the server.
        store: where prompts are kept.
        tenant: whose.
    """

    engine: Serving
    store: KVStore
    tenant: str = ""

    # --- documents, one by one ---------------------------------------------------------------------------------

    def key(self, head_ids: Ids, token_ids: Ids) -> str:
        """The id under which a document is kept after a head."""
        return content_key(self.engine.fingerprint.digest, ids_digest(head_ids), token_ids)

    def at_hand(self, head_ids: Ids, token_ids: Ids) -> bool:
        """Whether a document is kept, and was sent by this engine."""
        whole = (*head_ids, *token_ids)
        sent = self.engine.preloaded(whole, tenant=self.tenant) == len(whole)
        return sent and self.store.contains(self.key(head_ids, token_ids))

    def encode(self, head_ids: Ids, token_ids: Ids, text: str) -> VLLMKVCacheItem:
        """Have the server read a document behind a head; it is not kept here."""
        whole = (*head_ids, *token_ids)
        self.engine.preload(Prompt(whole, (), ()), tenant=self.tenant)
        return VLLMKVCacheItem(
            memory=str(self.engine.prompt_of(whole)),
            records=KVCacheRecords(text_memories=[text], composed_text_memory=text),
            metadata={"source_text": text, "extracted_at": datetime.now(timezone.utc).isoformat()},
            token_ids=torch.tensor(token_ids, dtype=torch.long),
            fingerprint=self.engine.fingerprint,
            base_position=len(head_ids),
            prefix_digest=ids_digest(head_ids),
        )

    def keep(
        self, head_ids: Ids, token_ids: Ids, text: str, metadata: Mapping[str, Any] | None = None
    ) -> VLLMKVCacheItem:
        """Send a document and keep its prompt."""
        item = self.encode(head_ids, token_ids, text)
        item.id = self.key(head_ids, token_ids)
        item.metadata.update(metadata or {})
        self.put(item)
        return item

    def check(self, item: object) -> None:
        """Refuse what is not this model's. Raises `InvalidInputError`, `FingerprintMismatchError`."""
        if not isinstance(item, VLLMKVCacheItem):
            raise InvalidInputError(
                f"an item of a server is a VLLMKVCacheItem, not {type(item).__name__}: make one with extract()"
            )
        if item.fingerprint is None:
            raise InvalidInputError(f"item {item.id!r} does not say which model it is for: make it with extract()")
        if not self.engine.fingerprint.matches(item.fingerprint):
            raise FingerprintMismatchError(f"item {item.id!r}", self.engine.fingerprint.differences(item.fingerprint))

    def put(self, item: VLLMKVCacheItem) -> None:
        """Keep an item."""
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

    def get(self, id: str) -> KVCacheItem | VLLMKVCacheItem | None:
        """The item; as it is, where it is not a server's."""
        stored = self.store.get(id)
        if stored is None or _SERVED not in stored.metadata:
            return stored
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

    def clear(self) -> None:
        """Send nothing of this tenant's again. The server drops its blocks when it needs the room."""
        self.engine.forget(self.tenant)

    # --- several together --------------------------------------------------------------------------------------

    def cache(self, head_ids: Ids, items: Sequence[KVCacheItem | VLLMKVCacheItem]) -> ContextPrompt:
        """Head and items as one prompt: all of them, in order."""
        return self.engine.prompt_of(self._together(head_ids, items))

    def merge(
        self, head_ids: Ids, items: Sequence[KVCacheItem | VLLMKVCacheItem], tail_ids: Ids, *_: object, **__: object
    ) -> MergedContext:
        """Head and items as one prompt, for the question in `tail_ids`. It is read in order, whatever the strategy."""
        return self._context(self._together(head_ids, items), tail_ids)

    def context_for(self, prompt: Prompt, *_: object) -> MergedContext:
        """The context of a prompt with documents."""
        return self._context(prompt.context_ids, prompt.tail_ids)

    def _together(self, head_ids: Ids, items: Sequence[KVCacheItem | VLLMKVCacheItem]) -> Ids:
        for item in items:
            self.check(item)
        return (*head_ids, *chain.from_iterable(item.token_ids.tolist() for item in items))

    def _context(self, context_ids: Ids, tail_ids: Ids) -> ServedContext:
        size = len(context_ids)
        sent = min(self.engine.preloaded(context_ids, tenant=self.tenant), size)
        return ServedContext(
            cache=DynamicCache(),
            token_ids=torch.tensor(context_ids, dtype=torch.long),
            tail_ids=torch.tensor(tail_ids, dtype=torch.long),
            report=MergeReport(
                mode="exact" if sent else "encoded",
                strategy="exact",
                context_tokens=size,
                reused_tokens=sent,
                recomputed_tokens=0,
                encoded_tokens=size - sent,
                reason="a server reads a prompt in order, and reuses what it knows of its beginning: see the usage",
            ),
            fingerprint=self.engine.fingerprint,
            prompt=str(self.engine.prompt_of(context_ids)),
        )


_CORPUS = "corpus"

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
class SyncPlan:
    """What would have to be done to bring a store in step with a corpus.

    Attributes:
        wanted: id → token ids, text and metadata of each document, in the corpus's order.
        new: ids that are not kept yet.
        gone: ids of what is kept of this corpus and not wanted any more.
    """

    wanted: dict[str, Read]
    new: list[str]
    gone: list[str]


def plan(
    keeper: Keeper | Served, head_ids: Ids, documents: Iterable[Read], mine: Callable[[Manifest], bool]
) -> SyncPlan:
    """Compare a corpus with what is kept. Nothing is changed.

    Args:
        keeper: where documents are kept.
        head_ids: what stands before them.
        documents: token ids, text and metadata of each. Two that say the same are one.
        mine: whether an item that is kept belongs to this corpus; no others are dropped.

    Raises:
        EmptyPromptError: a document is empty.
    """
    wanted: dict[str, Read] = {}
    for number, (token_ids, text, metadata) in enumerate(documents, start=1):
        if not text.strip():
            raise EmptyPromptError(f"document {number} of the corpus is empty: leave it out")
        wanted[keeper.key(head_ids, token_ids)] = (token_ids, text, metadata)
    store = keeper.store
    new = [key for key, (token_ids, *_) in wanted.items() if not keeper.at_hand(head_ids, token_ids)]
    manifests = ((key, store.manifest(key)) for key in iter(store.keys()) if key not in wanted)
    return SyncPlan(wanted, new, [key for key, manifest in manifests if manifest and mine(manifest)])


def sync(keeper: Keeper | Served, head_ids: Ids, documents: Iterable[Read], corpus: str) -> SyncReport:
    """Encode what is new, keep what is the same, drop what is gone.

    Args:
        keeper: where documents are kept.
        head_ids: what stands before them.
        documents: token ids, text and metadata of each.
        corpus: whose documents these are; no others are dropped.

    Raises:
        EmptyPromptError: a document is empty. Nothing was changed.
    """
    named = ((ids, text, {**metadata, _CORPUS: corpus}) for ids, text, metadata in documents)
    planned = plan(keeper, head_ids, named, lambda manifest: manifest.metadata.get(_CORPUS) == corpus)
    for key in planned.new:
        keeper.keep(head_ids, *planned.wanted[key])
    keeper.store.delete(planned.gone)
    kept = len(planned.wanted) - len(planned.new)
    return SyncReport(len(planned.new), kept, len(planned.gone), list(planned.wanted))


class Counter:
    """Counts how often combinations of documents are asked for; forgets the ones that were not asked for longest."""

    def __init__(self, remembered: int = 256) -> None:
        self._remembered = remembered
        self._counts: OrderedDict[Ids, int] = OrderedDict()
        self._lock = threading.Lock()

    def count(self, context_ids: Ids) -> int:
        """How often a context was asked for, now included."""
        with self._lock:
            self._counts[context_ids] = asked = self._counts.pop(context_ids, 0) + 1
            if len(self._counts) > self._remembered:
                self._counts.popitem(last=False)
            return asked
