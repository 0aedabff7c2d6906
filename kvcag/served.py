"""Documents of a server that keeps their keys and values itself: sent ahead, and put together as a prompt.

Nothing can be merged there: what a prompt has in common with an earlier one, from its first token on, is what the
server need not read. So a document is sent right behind the head, where it will be found when it comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain
from typing import Any

import torch
from transformers import DynamicCache

from kvcag.context import ContextPrompt, MergedContext, MergeReport, ServedContext
from kvcag.engines.serving import Serving
from kvcag.errors import FingerprintMismatchError, InvalidInputError
from kvcag.items import KVCacheItem, KVCacheRecords, VLLMKVCacheItem, content_key, ids_digest
from kvcag.keeping import Ids
from kvcag.prompt import Prompt
from kvcag.stores.base import KVStore

_SERVED = "served"
"""In the metadata of a stored item: its prompt and its tokens. A store keeps it as an item without tensors."""


@dataclass(frozen=True, slots=True)
class Served:
    """Sends, keeps and puts together documents for one tenant. What `kvcag.merging.Merging` is for an `HFEngine`.

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
