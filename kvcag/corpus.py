"""What a memory knows of a corpus: which documents are in it, and which combinations are asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvcag.errors import EmptyPromptError
from kvcag.keeping import Ids, Keeper

_CORPUS = "corpus"


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What `KVCacheMemory.sync` did: how many documents, and the ids of all that are kept, in the corpus's order."""

    encoded: int
    kept: int
    dropped: int
    ids: list[str]


def sync(
    keeper: Keeper, head_ids: Ids, documents: Iterable[tuple[Ids, str, dict[str, Any]]], corpus: str
) -> SyncReport:
    """Encode what is new, keep what is the same, drop what is gone.

    Args:
        keeper: where documents are kept.
        head_ids: what stands before them.
        documents: token ids, text and metadata of each.
        corpus: whose documents these are; no others are dropped.

    Raises:
        EmptyPromptError: a document is empty. Nothing was changed.
    """
    wanted: dict[str, tuple[Ids, str, dict[str, Any]]] = {}
    for number, (token_ids, text, metadata) in enumerate(documents, start=1):
        if not text.strip():
            raise EmptyPromptError(f"document {number} of the corpus is empty: leave it out")
        wanted[keeper.key(head_ids, token_ids)] = (token_ids, text, {**metadata, _CORPUS: corpus})
    store = keeper.store
    new = [key for key in wanted if not store.contains(key)]
    for key in new:
        keeper.keep(head_ids, *wanted[key])
    manifests = ((key, store.manifest(key)) for key in iter(store.keys()))
    mine = [key for key, manifest in manifests if manifest and manifest.metadata.get(_CORPUS) == corpus]
    gone = [key for key in mine if key not in wanted]
    store.delete(gone)
    return SyncReport(len(new), len(wanted) - len(new), len(gone), list(wanted))


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
