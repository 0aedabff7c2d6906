"""One generation: prefill what is not cached, then one token a step into a cache of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from kvcag.context import MergeReport
from kvcag.engines.base import Chunk, FinishReason, Usage
from kvcag.engines.sampling import Sampler
from kvcag.engines.text import Detokenizer, StopStrings, ThinkingFilter
from kvcag.prompt import Prompt

Forward = Callable[[Sequence[int], Cache], torch.Tensor]
"""Runs tokens over a cache, which grows by them, and returns the logits after the last, `(1, vocabulary)`."""


@dataclass(frozen=True, slots=True)
class Account:
    """What is known of a generation's cost before it starts.

    Attributes:
        started: `time.perf_counter()` of the call.
        cached_tokens: prompt tokens whose keys and values are reused.
        created_tokens: prompt tokens that are encoded and kept.
        context: how the documents' context was made.
    """

    started: float
    cached_tokens: int
    created_tokens: int
    context: MergeReport | None = None

    @classmethod
    def of(cls, prompt: Prompt, report: MergeReport | None, reused: int, kept: int, started: float) -> Account:
        """Of a prompt that needs not run `reused` of its tokens, and `kept` others of which are encoded and kept.

        Making the context may have paid for some of the reused ones. Where there is no report and the prompt has
        documents, they are read in this order, or were before: that is exact.
        """
        if report is not None:
            return cls(started, reused - report.paid_tokens, report.encoded_tokens + kept, report)
        if prompt.document_ids:
            size = len(prompt.context_ids)
            found = min(reused, size)
            report = MergeReport("exact" if found else "encoded", "exact", size, found, 0, size - found)
        return cls(started, reused, kept, report)


class Decoding:
    """The state of one generation.

    Args:
        forward: the model.
        cache: the generation's own cache; it holds the first `cache.get_seq_length()` tokens of the prompt.
        prompt_ids: the whole prompt.
        max_new_tokens: when to stop.
        eos_ids: the tokens that end an answer.
        sampler: chooses each token.
        account: what it reuses.
    """

    def __init__(
        self,
        forward: Forward,
        cache: Cache,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        sampler: Sampler,
        account: Account,
    ) -> None:
        self._forward = forward
        self.cache = cache
        self.prompt_ids = list(prompt_ids)
        self.answer_ids: list[int] = []
        self._max_new_tokens = max_new_tokens
        self._eos_ids = eos_ids
        self._sampler = sampler
        self._account = account
        self._first_token_at: float | None = None
        self._logits: torch.Tensor | None = None

    @property
    def cached_ids(self) -> list[int]:
        """The tokens that are in the cache now: all of the prompt once it is prefilled, and the answer but its last."""
        return [*self.prompt_ids, *self.answer_ids][: self.cache.get_seq_length()]

    def prefill(self) -> torch.Tensor:
        """Run what the cache lacks of the prompt; logits after its last token."""
        self._logits = self._forward(self.prompt_ids[self.cache.get_seq_length() :], self.cache)
        return self._logits

    def tokens(self) -> Iterator[int]:
        """Generate until an end-of-sequence token, which is the last one given, a constraint's or the budget's end."""
        logits = self.prefill() if self._logits is None else self._logits
        while len(self.answer_ids) < self._max_new_tokens:
            if self.answer_ids:
                logits = self._forward(self.answer_ids[-1:], self.cache)
            token = self._sampler.choose(logits, self.prompt_ids + self.answer_ids)
            self.answer_ids.append(token)
            self._first_token_at = self._first_token_at or time.perf_counter()
            yield token
            if token in self._eos_ids or self._sampler.complete:
                return

    def chunks(self, detokenizer: Detokenizer, stop: StopStrings, thinking: ThinkingFilter | None) -> Iterator[Chunk]:
        """The answer as text, a chunk a token; the last chunk says why it ended and what it took."""

        def visible(text: str) -> str:
            return thinking.push(text) if thinking else text

        finish: FinishReason = "length"
        for token in self.tokens():
            if token in self._eos_ids:
                finish = "stop"
                break
            text = stop.push(visible(detokenizer.push(token)))
            if stop.found:
                yield Chunk(text, (token,), "stop", self.usage())
                return
            yield Chunk(text, (token,))
            finish = "stop" if self._sampler.complete else "length"
        rest = visible(detokenizer.flush()) + (thinking.flush() if thinking else "")
        text = stop.push(rest)
        text += "" if stop.found else stop.flush()
        yield Chunk(text, (), "stop" if stop.found else finish, self.usage())

    def usage(self) -> Usage:
        """What it took so far."""
        now = time.perf_counter()
        account = self._account
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=account.cached_tokens,
            created_tokens=account.created_tokens,
            completion_tokens=len(self.answer_ids),
            ttft_s=(self._first_token_at or now) - account.started,
            total_s=now - account.started,
            context=account.context,
        )
