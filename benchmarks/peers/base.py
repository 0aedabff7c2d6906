"""The interface of a compared system: it reads documents, and answers questions about them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from geometry import HEAD

from kvcag import HFEngine
from kvcag.chat_template import as_messages

TOKENS = 32
"""Of each answer."""


@dataclass(frozen=True)
class Answer:
    """An answer, and the seconds from the question to its first piece and to its end."""

    text: str
    ttft_s: float
    total_s: float


class Peer(Protocol):
    """All are given the same weights, documents, instruction and questions; each answer is greedy, `TOKENS` long."""

    name: str

    def prepare(self, documents: Sequence[str]) -> None:
        """Read the documents, as far as this can be done before a question is asked."""

    def ask(self, question: str) -> Answer:
        """Answer, timed."""

    @property
    def bytes_held(self) -> int:
        """Keys and values kept between questions."""


def timed(pieces: Iterable[str], started: float) -> Answer:
    """Of a stream, whose first piece is what its user sees first."""
    first, text = 0.0, ""
    for piece in pieces:
        if piece:
            first = first or time.perf_counter() - started
            text += piece
    return Answer(text, first, time.perf_counter() - started)


def context_ids(engine: HFEngine, documents: Sequence[str]) -> tuple[int, ...]:
    """Instruction and documents in the system turn, each tokenised by itself: the ids of the full prefill."""
    head = engine.template.split_system(HEAD, as_messages("…")).head_ids
    return (*head, *chain.from_iterable(map(engine.template.encode, documents)))


def prompt_ids(engine: HFEngine, context: tuple[int, ...], question: str) -> torch.Tensor:
    """The whole prompt. `(1, tokens)`"""
    tail = engine.template.split_system(HEAD, as_messages(question)).tail_ids
    return torch.tensor([context + tail], device=engine.device)
