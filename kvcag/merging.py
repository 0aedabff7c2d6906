"""Documents put together for one question after another, over a model of this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from kvcag.cache.hf import ContextCache, layers_of, share
from kvcag.compose import MAX_KL, Strategy, compose, exact_context
from kvcag.context import MergedContext
from kvcag.corpus import Counter
from kvcag.items import KVCacheItem
from kvcag.keeping import Ids, Keeper
from kvcag.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Merging(Keeper):
    """A keeper that also puts together what it keeps.

    Attributes:
        promote_after: see `KVCacheMemory`.
        asked: how often each combination was asked for.
        encoding: of questions that are asked at once, one encodes.
    """

    promote_after: int | None = None
    asked: Counter = field(default_factory=Counter)
    encoding: threading.Lock = field(default_factory=threading.Lock)

    def put(self, item: KVCacheItem) -> None:
        """Keep an item. Its owner may go on writing into it."""
        self.store.put(item.model_copy(update={"memory": share(item.memory)}))

    def get(self, id: str) -> KVCacheItem | None:
        """The item; generating with its `memory` leaves what is stored as it is."""
        item = self.store.get(id)
        return None if item is None else item.model_copy(update={"memory": share(item.memory)})

    def clear(self) -> None:
        """Forget this tenant's recent contexts."""
        self.engine.prefixes.clear(self.tenant)

    def known(self, prompt: Prompt) -> int:
        """How many of the context's tokens were read before, in this order."""
        return self.engine.prefixes.match(prompt.context_ids, self.tenant)[0]

    def cache(self, head_ids: Ids, items: Sequence[KVCacheItem]) -> ContextCache:
        """Head and items as one cache, re-rotated and with nothing recomputed."""
        context = self._compose(head_ids, items, (), "rotate", 0.0)
        exact = context.report.mode == "exact"
        return ContextCache.of(layers_of(context.cache), context.token_ids, context.fingerprint, exact=exact)

    def merge(
        self,
        head_ids: Ids,
        items: Sequence[KVCacheItem],
        tail_ids: Ids,
        strategy: Strategy,
        ratio: float,
        max_kl: float = MAX_KL,
    ) -> MergedContext:
        """Head and items as one context, for the question in `tail_ids`; see `kvcag.compose.compose`."""
        if strategy == "auto" and (hot := self._hot(head_ids, items, tail_ids)):
            return hot
        return self._compose(head_ids, items, tail_ids, strategy, ratio, max_kl=max_kl)

    def context_for(self, prompt: Prompt, strategy: Strategy, ratio: float, max_kl: float) -> MergedContext:
        """The context of a prompt with documents; see `KVCacheMemory.context_for`."""
        with self.encoding:
            known = self.known(prompt)
            if strategy == "exact" or known == len(prompt.context_ids):
                return exact_context(self.engine, prompt.context_ids, prompt.tail_ids, self.tenant)
            self.store.prefetch(self.key(prompt.head_ids, token_ids) for token_ids in prompt.document_ids)
            kept = [
                self.keep(prompt.head_ids, token_ids, text)
                for token_ids, text in zip(prompt.document_ids, prompt.documents, strict=True)
            ]
        items = [one.item for one in kept]
        encoded = sum(len(one.item.token_ids) for one in kept if one.created)
        if encoded:  # and the head with the first of them
            encoded += max(0, len(prompt.head_ids) - known)
        if strategy == "auto" and (hot := self._hot(prompt.head_ids, items, prompt.tail_ids)):
            return hot
        context = self._compose(
            prompt.head_ids, items, prompt.tail_ids, strategy, ratio, max_kl=max_kl, encoded=encoded
        )
        reasons = "; ".join(dict.fromkeys(one.reason for one in kept if one.reason))
        if reasons:
            reasons = "; ".join(filter(None, (context.report.reason, reasons)))
            context = replace(context, report=replace(context.report, reason=reasons))
        return context

    def _compose(
        self,
        head_ids: Ids,
        items: Sequence[KVCacheItem],
        tail_ids: Ids,
        strategy: Strategy,
        ratio: float,
        *,
        max_kl: float = MAX_KL,
        encoded: int = 0,
    ) -> MergedContext:
        return compose(
            self.engine,
            head_ids,
            items,
            tail_ids,
            strategy,
            ratio,
            max_kl=max_kl,
            encoded=encoded,
            tenant=self.tenant,
        )

    def _hot(self, head_ids: Ids, items: Sequence[KVCacheItem], tail_ids: Ids) -> MergedContext | None:
        """The exact context, where it is known, or is asked so often in this order that it is worth encoding."""
        context_ids = (*head_ids, *chain.from_iterable(item.token_ids.tolist() for item in items))
        if self.engine.prefixes.match(context_ids, self.tenant)[0] == len(context_ids):
            return exact_context(self.engine, context_ids, tail_ids, self.tenant)
        if self.promote_after is None or not self.engine.keeps(len(context_ids)) or len(items) < 2:
            return None
        if self.asked.count(context_ids) <= self.promote_after:
            return None
        reason = f"merged {self.promote_after} times in this order, so encoded as a whole"
        return exact_context(self.engine, context_ids, tail_ids, self.tenant, reason)
