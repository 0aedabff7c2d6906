"""What a memory knows of a corpus: which documents are in it, and which combinations are asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from kvcag.errors import EmptyPromptError
from kvcag.keeping import Ids, Keeper
from kvcag.served import Served
from kvcag.stores.manifest import Manifest

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
