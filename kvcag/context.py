"""A context ready to be continued: the cache, the tokens in it, and an account of how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache
from typing_extensions import Self

from kvcag.fingerprint import ModelFingerprint

Mode = Literal["exact", "merged", "encoded"]
"""`exact`: an encoded prefix was found, in this order. `merged`: documents encoded one by one were put together.
`encoded`: nothing could be reused."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was reused and what was paid for. All counts are tokens of the context (head and documents, not the tail).

    `reused_tokens + recomputed_tokens + encoded_tokens == context_tokens`.
    """

    mode: Mode
    strategy: str
    context_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    encoded_tokens: int
    reason: str = ""
    """Why this strategy was taken, where it was not simply asked for."""

    @property
    def paid_tokens(self) -> int:
        """Tokens that went through the model."""
        return self.recomputed_tokens + self.encoded_tokens


@dataclass(frozen=True, slots=True)
class MergedContext:
    """Head and documents as one cache, and what remains to be prefilled.

    Attributes:
        cache: keys and values of head + documents; the caller's own, it shares no memory with what is stored.
        token_ids: 1-D int64, every token in `cache`, in order.
        tail_ids: 1-D int64, the rest of the template: it closes the documents' turn and holds the question and the
            generation prompt.
        report: how it was made.
        fingerprint: the model it belongs to.
    """

    cache: DynamicCache
    token_ids: torch.Tensor
    tail_ids: torch.Tensor
    report: MergeReport
    fingerprint: ModelFingerprint


@dataclass(frozen=True, slots=True)
class ServedContext(MergedContext):
    """Head and documents as the prompt of a server, which keeps the keys and values itself: `cache` is empty.

    Attributes:
        prompt: the text of `token_ids`: head and documents, all of them, in order.
    """

    prompt: str = ""


class ContextPrompt(str):
    """A context as text, for a server that keeps its keys and values. It knows its tokens, as a `ContextCache` does.

    Attributes:
        token_ids: 1-D int64, the tokens that the server is sent; the text is for people.
        fingerprint: the model it belongs to.
        messages: the chat messages it is the closed turns of; None where its last turn is open.
    """

    token_ids: torch.Tensor
    fingerprint: ModelFingerprint
    messages: list[dict[str, Any]] | None

    @classmethod
    def of(
        cls,
        text: str,
        token_ids: Sequence[int],
        fingerprint: ModelFingerprint,
        messages: list[dict[str, Any]] | None = None,
    ) -> Self:
        """A text with its tokens."""
        made = cls(text)
        made.token_ids = torch.tensor(token_ids, dtype=torch.long)
        made.fingerprint = fingerprint
        made.messages = messages
        return made
