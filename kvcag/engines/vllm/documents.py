"""Documents on a server with the connector, which encodes them once and merges them in any order."""

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
    """The connector's fields in a response: see `KVCAGConnector.request_finished`."""

    model: str
    learned: bool
    missing: list[str]


class Transfer(BaseModel):
    """The response's `kv_transfer_params`."""

    kvcag: Said | None = None


class Completed(BaseModel):
    """A response that is not streamed."""

    kv_transfer_params: Transfer | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """The fields of a request that merges: its salt and its `kv_transfer_params`."""

    salt: str
    params: dict[str, Any]


class ServedDocuments:
    """The documents that this engine sent to a server's store. Safe to use from several threads.

    Args:
        http: the server.
        body: returns the body of a request for one token after a prompt of a namespace.
        salt_of: returns the salt of a namespace.
    """

    MOST = 1 << 16
    """The most documents that are remembered. For others, the server is asked whether it has them."""

    def __init__(
        self, http: HTTPClient, body: Callable[[Ids, str], dict[str, Any]], salt_of: Callable[[str], str | None]
    ) -> None:
        self._http, self._body, self._salt_of = http, body, salt_of
        self._lock = threading.RLock()
        self.forget()

    def forget(self, namespace: str | None = None) -> None:
        """Drop the facts about a namespace; None means all facts, including whether the server has the connector."""
        with self._lock:
            if namespace is None:
                self._model: str | None = None  # the digest of the connector's model; empty without a connector
                self._kept: OrderedDict[tuple[str, str], None] = OrderedDict()
                self._learned: dict[str, bool] = {}
                return
            for key in [key for key in self._kept if key[0] == namespace]:
                del self._kept[key]
            self._learned.pop(namespace, None)

    def erase(self, namespace: str) -> None:
        """Let the connector delete a namespace from its store."""
        with self._lock:
            if self._model:
                self._ask([0], namespace, forget=True)
            self.forget(namespace)

    @property
    def is_available(self) -> bool:
        """Whether the server has the connector. Found out once, by a request for one token if it is a vLLM server."""
        with self._lock:
            if self._model is None:
                said = self._ask([0], "", has=[]) if self._http.counts_transfers() else None
                self._model = said.model if said else ""
            return bool(self._model)

    def has_learned(self, namespace: str) -> bool:
        """Whether the connector can merge documents, because it has learned their usual drift."""
        with self._lock:
            if not self._learned.get(namespace):
                said = self._ask([0], namespace, has=[])
                self._learned[namespace] = said is not None and said.learned
            return self._learned[namespace]

    def learn(self, head_ids: Ids, passages: Sequence[Ids], namespace: str) -> bool:
        """Let the connector learn the usual drift from passages. Returns whether it did."""
        with self._lock:
            for passage in passages:
                self.keep(head_ids, passage, namespace)
            spans, whole = _spans(len(head_ids), passages), [*head_ids, *(token for ids in passages for token in ids)]
            self._ask(whole, namespace, learn=spans)
            return self.has_learned(namespace)

    def keep(self, head_ids: Ids, token_ids: Ids, namespace: str) -> None:
        """Let the server encode a document after `head_ids`, and store both."""
        spans = [[0, len(head_ids)]] * bool(head_ids) + _spans(len(head_ids), [token_ids])
        self._ask([*head_ids, *token_ids], namespace, keep=spans)
        self._remember(namespace, head_ids, token_ids)

    def holds(self, token_ids: Ids, namespace: str) -> bool:
        """Whether this engine stored a document; `token_ids` are its tokens, after those before it."""
        with self._lock:
            return (namespace, ids_digest(token_ids)) in self._kept

    def merging(self, prompt: Prompt, namespace: str) -> tuple[Served, int]:
        """Return the fields of a request that merges, and how many tokens were encoded for it.

        Documents that the server's store lacks are encoded first, each after the instruction. If there is other text
        between two documents, those after the text are not merged, but read in place.
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
        """Forget that the server has these documents, after it reused fewer tokens of them than expected."""
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
    """Return the spans of adjacent texts, from `start` on."""
    edges = [start]
    for ids in texts:
        edges.append(edges[-1] + len(ids))
    return [list(span) for span in pairwise(edges)]
