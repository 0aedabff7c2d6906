"""What an engine gives back while it generates, whatever it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvcag.context import MergeReport

FinishReason = Literal["stop", "length"]
"""`stop`: an end-of-sequence token or a stop string. `length`: `max_new_tokens` were generated."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer took. Counts are tokens; times are seconds.

    Attributes:
        prompt_tokens: the whole logical prompt, cached or not.
        cached_tokens: those whose keys and values were reused.
        created_tokens: those encoded in this call and kept for the next.
        completion_tokens: generated, with the end-of-sequence token.
        ttft_s: from the call to the first token.
        total_s: from the call to the end.
        context: how the documents' context was made, where there were documents.
    """

    prompt_tokens: int
    cached_tokens: int
    created_tokens: int
    completion_tokens: int
    ttft_s: float
    total_s: float
    context: MergeReport | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. The last one has `finish_reason` and `usage`, and whatever text was held back."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
