"""Documents by their content: found where they are kept, or encoded and kept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeAlias

import torch

from kvcag.cache.hf import LayerKV, cache_of, layers_of
from kvcag.engines.hf import HFEngine
from kvcag.errors import FingerprintMismatchError, InvalidInputError, StoreError
from kvcag.items import KVCacheItem, KVCacheRecords, content_key, ids_digest
from kvcag.notices import CacheWarning
from kvcag.stores.base import KVStore
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
