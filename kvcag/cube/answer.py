"""What a cube answers, and which side of it the answer came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvcag.core import FinishReason, MergeReport, TextualMemoryItem, Usage

Side: TypeAlias = Literal["exact", "merged", "encoded"]
"""`exact`: from caches, as the model made them, in this order. `merged`: from caches that were put together, a share of
their tokens recomputed. `encoded`: a text, or more, had no cache, and the model read it."""


@dataclass(frozen=True, slots=True)
class AnswerReport:
    """How a question was answered.

    Attributes:
        side: which side of the cube answered.
        cached: ids of the texts whose caches were there.
        encoded: ids of the texts that the model had to read.
        report: how the context was made, in tokens. None where there were no texts, or the engine keeps no caches.
    """

    side: Side
    cached: tuple[str, ...]
    encoded: tuple[str, ...]
    report: MergeReport | None


@dataclass(frozen=True, slots=True)
class CubeAnswer:
    """An answer, what it was given, and what it took.

    Attributes:
        text: what the model said.
        sources: the texts that stood in the prompt, in their order.
        plan: which side of the cube answered.
        usage: tokens and seconds.
        finish_reason: why it ended.
    """

    text: str
    sources: list[TextualMemoryItem]
    plan: AnswerReport
    usage: Usage
    finish_reason: FinishReason
