"""The order in which a prompt's documents are sent: a server reuses a beginning, so what comes first decides."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Literal, TypeAlias

from kvcag.chat_template import Prompt
from kvcag.core import ids_digest
from kvcag.errors import InvalidInputError

DocumentOrder: TypeAlias = Literal["given", "canonical", "frequent"]

_COUNTED = 1 << 16
"""Documents whose questions are counted; the one not asked for longest is forgotten first."""


class Ordering:
    """Puts documents into an order. Safe to use from several threads.

    Args:
        order: `"given"` leaves them as they are; `"canonical"` sorts them by their content, so that the same documents
            are the same prompt; `"frequent"` puts those first that were asked for most often, so that more prompts
            begin alike. Counts matter in powers of two, so that the order seldom changes.
    """

    def __init__(self, order: DocumentOrder) -> None:
        if order not in ("given", "canonical", "frequent"):
            raise InvalidInputError(f"document_order is 'given', 'canonical' or 'frequent', not {order!r}")
        self.order = order
        self._asked: OrderedDict[str, int] = OrderedDict()  # the one not asked for longest first
        self._lock = threading.Lock()

    def arrange(self, prompt: Prompt, *, count: bool = False) -> Prompt:
        """The prompt with its documents in order.

        Args:
            prompt: the prompt.
            count: it is a question, and counts.
        """
        if self.order == "given" or not prompt.document_ids:
            return prompt
        texts = prompt.documents or ("",) * len(prompt.document_ids)
        keyed = [(ids_digest(ids), ids, text) for ids, text in zip(prompt.document_ids, texts, strict=True)]
        with self._lock:
            keyed.sort(key=lambda entry: (-self._asked.get(entry[0], 0).bit_length(), entry[0]))
            if count and self.order == "frequent":
                self._count([digest for digest, _, _ in keyed])
        _, ids, documents = zip(*keyed, strict=True)
        return replace(prompt, document_ids=ids, documents=documents if prompt.documents else ())

    def _count(self, digests: list[str]) -> None:
        for digest in digests:
            self._asked[digest] = self._asked.pop(digest, 0) + 1
        while len(self._asked) > _COUNTED:
            self._asked.popitem(last=False)
