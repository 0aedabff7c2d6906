"""Documents on a server that has the connector: encoded there once, put together there in any order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

from kvcag.chat_template import Prompt
from kvcag.core import content_key, ids_digest
from kvcag.engines.vllm.blocks import FIELD, merged_salt
from kvcag.engines.vllm.client import HTTPClient

Ids = Sequence[int]


class Said(BaseModel):
    """What the connector says of a request: see `KVCAGConnector.request_finished`."""

    model: str
    learned: bool
    missing: list[str]


class Transfer(BaseModel):
    """The answer's `kv_transfer_params`."""

    kvcag: Said | None = None


class Completed(BaseModel):
    """An answer that is not streamed."""

    kv_transfer_params: Transfer | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """How a prompt is sent: its salt, and the spans of its documents."""

    salt: str
    params: dict[str, Any]


class ServedDocuments:
    """The documents that this engine had a server keep. Safe to use from several threads.

    Args:
        http: the server.
        body: the body of a request for one token behind a prompt of a namespace.
        salt_of: the salt of a namespace.
    """

    MOST = 1 << 16
    """Documents that are remembered; of others the server is asked."""

    def __init__(
        self, http: HTTPClient, body: Callable[[Ids, str], dict[str, Any]], salt_of: Callable[[str], str | None]
    ) -> None:
        self._http, self._body, self._salt_of = http, body, salt_of
        self._lock = threading.RLock()
        self.forget()

    def forget(self, namespace: str | None = None) -> None:
        """Ask the server again; of one namespace, or of all and whether it has the connector."""
        with self._lock:
            if namespace is None:
                self._model: str | None = None  # what the connector calls the model; empty without a connector
                self._kept: OrderedDict[tuple[str, str], None] = OrderedDict()
                self._learned: dict[str, bool] = {}
                return
            for key in [key for key in self._kept if key[0] == namespace]:
                del self._kept[key]
            self._learned.pop(namespace, None)

    def erase(self, namespace: str) -> None:
        """Have the connector delete all that it keeps of a namespace."""
        with self._lock:
            if self._model:
                self._ask([0], namespace, forget=True)
            self.forget(namespace)

    @property
    def is_available(self) -> bool:
        """Whether the server has the connector. Asked once, by a request for one token to a server that may have it."""
        with self._lock:
            if self._model is None:
                said = self._ask([0], "", has=[]) if self._http.counts_transfers() else None
                self._model = said.model if said else ""
            return bool(self._model)

    def has_learned(self, namespace: str) -> bool:
        """Whether documents can be put together: the connector has learned what they usually drift by."""
        with self._lock:
            if not self._learned.get(namespace):
                said = self._ask([0], namespace, has=[])
                self._learned[namespace] = said is not None and said.learned
            return self._learned[namespace]

    def learn(self, head_ids: Ids, passages: Sequence[Ids], namespace: str) -> bool:
        """Have the connector learn from passages, alone and together; whether it did."""
        with self._lock:
            for passage in passages:
                self.keep(head_ids, passage, namespace)
            spans, whole = _spans(len(head_ids), passages), [*head_ids, *(token for ids in passages for token in ids)]
            self._ask(whole, namespace, learn=spans)
            return self.has_learned(namespace)

    def keep(self, head_ids: Ids, token_ids: Ids, namespace: str) -> None:
        """Have the server encode a document behind `head_ids`, and keep both."""
        spans = [[0, len(head_ids)]] * bool(head_ids) + _spans(len(head_ids), [token_ids])
        self._ask([*head_ids, *token_ids], namespace, keep=spans)
        self._remember(namespace, head_ids, token_ids)

    def holds(self, token_ids: Ids, namespace: str) -> bool:
        """Whether a document with all that stands before it was kept."""
        with self._lock:
            return (namespace, ids_digest(token_ids)) in self._kept

    def merging(self, prompt: Prompt, namespace: str) -> tuple[Served, int]:
        """How a prompt with documents is sent, and how many of its tokens were encoded for that.

        What the server does not keep is encoded, each document behind the instruction. Documents behind a text that
        stands between two are read in place.
        """
        head = prompt.head_ids
        count = 1 + next((at for at, ids in enumerate(prompt.between_ids) if ids), len(prompt.document_ids))
        documents, places = prompt.kept_ids[:count], prompt.document_places[:count]
        unknown = [ids for ids in dict.fromkeys(documents) if not self.holds((*head, *ids), namespace)]
        encoded = 0
        if unknown:
            keys = {content_key(self._model or "", ids): ids for ids in ([head] * bool(head) + unknown)}
            said = self._ask([0], namespace, has=list(keys))
            missing = {keys[key] for key in said.missing if key in keys} if said else set(unknown)
            for ids in unknown:
                if ids in missing or head in missing:
                    self.keep(head, ids, namespace)
                    missing.discard(head)
                    encoded += len(ids)
                else:
                    self._remember(namespace, head, ids)
        begins: list[list[int]] = [[]] * bool(head)
        spans = [[0, len(head)]] * bool(head) + [[place.start, place.stop] for place in places]
        endings = begins + [list(ids[len(place) :]) for ids, place in zip(documents, places, strict=True)]
        salt = merged_salt(prompt.token_ids[: places[-1].stop], self._salt_of(namespace))
        return Served(salt, {FIELD: {"merge": spans, "endings": endings if any(endings) else []}}), encoded

    def missed(self, prompt: Prompt, namespace: str) -> None:
        """The server had less of these documents than expected: ask it again."""
        with self._lock:
            for ids in prompt.kept_ids:
                self._kept.pop((namespace, ids_digest((*prompt.head_ids, *ids))), None)

    def _remember(self, namespace: str, head_ids: Ids, token_ids: Ids) -> None:
        with self._lock:
            self._kept[namespace, ids_digest((*head_ids, *token_ids))] = None
            if len(self._kept) > self.MOST:
                self._kept.popitem(last=False)

    def _ask(self, token_ids: Ids, namespace: str, **asked: Any) -> Said | None:
        body: Mapping[str, Any] = {**self._body(token_ids, namespace), "kv_transfer_params": {FIELD: asked}}
        completed = self._http.json(Completed, "/v1/completions", body)
        transfer = completed and completed.kv_transfer_params
        return transfer.kvcag if transfer else None


def _spans(start: int, texts: Sequence[Ids]) -> list[list[int]]:
    """The spans of texts that stand one behind another."""
    edges = [start]
    for ids in texts:
        edges.append(edges[-1] + len(ids))
    return [list(span) for span in pairwise(edges)]
