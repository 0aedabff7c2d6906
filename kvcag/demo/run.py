"""Races an answer from caches against one that reads everything: one corpus, one model, one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TypeAlias

from kvcag.chat_template import Prompt
from kvcag.core import DEFAULT_RATIO, Answer, Chunk, Strategy
from kvcag.demo.corpus import Topic
from kvcag.engines.base import Sampling
from kvcag.engines.hf import HFEngine
from kvcag.memory import KVCacheMemory, insert_documents

INSTRUCTION = "You are a helpful assistant. Answer the question using only the passages below."

OnPiece: TypeAlias = "Callable[[Runner, Chunk], None]"


@dataclass(slots=True)
class Runner:
    """One side of the race, with a clock of its own that runs only while this side answers.

    Attributes:
        name: for people.
        text: what it has said so far.
        first_s: seconds until its first word, or until its end if it says nothing; None before.
        total_s: seconds until its end; None before.
    """

    name: str
    text: str = ""
    first_s: float | None = None
    total_s: float | None = None
    _started: float | None = field(default=None, repr=False)

    @property
    def clock_s(self) -> float:
        """Seconds since its turn began, until it ended; 0 before."""
        if self._started is None:
            return 0.0
        return time.perf_counter() - self._started if self.total_s is None else self.total_s

    def run(self, chunks: Iterator[Chunk], on_piece: OnPiece) -> Answer:
        """Take a turn: read an answer whose making begins when its first piece is asked for."""
        self._started = time.perf_counter()
        pieces = []
        for chunk in chunks:
            pieces.append(chunk)
            self.text += chunk.text
            if self.first_s is None and (self.text.strip() or chunk.finish_reason):
                self.first_s = self.clock_s
            if chunk.finish_reason:
                self.total_s = self.clock_s
            on_piece(self, chunk)
        return Answer.of(pieces)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One question, answered twice, one answer after the other. Counts are tokens; times are seconds.

    Attributes:
        question: the question.
        answer: the answer from the caches.
        answer_full: the answer from a full prefill of the same tokens.
        ttft_full_s: time to the first word without caches.
        ttft_cached_s: time to the first word from the caches, merging included.
        context_tokens: tokens of instruction and documents.
        encoded_tokens: those encoded for this question.
        reused_tokens: those taken from caches unchanged.
        recomputed_tokens: those computed again by the merge.
        same_answer: whether the two answers are the same text.
    """

    question: str
    answer: str
    answer_full: str
    ttft_full_s: float
    ttft_cached_s: float
    context_tokens: int
    encoded_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    same_answer: bool

    @property
    def speedup(self) -> float:
        """Time to the first word without caches, over the time with them."""
        return self.ttft_full_s / self.ttft_cached_s


class Demonstration:
    """A model and a corpus, cached and not cached.

    Args:
        model: a hub id or a folder.
        documents: the corpus, in the order in which the model reads it.
        strategy: `"exact"` encodes the corpus as one context. The others encode its documents one by one and put them
            together for each question, as `KVCacheMemory.merge` does.
        ratio: the recompute ratio of a merge, in [0, 1].
        max_new_tokens: the most tokens of an answer.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        documents: Sequence[Topic],
        *,
        strategy: Strategy = "exact",
        ratio: float = DEFAULT_RATIO,
        max_new_tokens: int = 48,
    ) -> None:
        self.uncached = HFEngine.from_pretrained(model, prefix_cache_bytes=0)
        self.texts = [f"{document.text}\n\n" for document in documents]
        self.strategy: Strategy = strategy
        self.ratio = ratio
        self.sampling = Sampling(max_new_tokens=max_new_tokens)
        prompt = self._prompt("?")
        self.corpus_tokens = len(prompt.context_ids)
        # Room for the corpus, and for every question and answer after it.
        budget = 2 * self.uncached.context_length * self.uncached.bytes_per_token
        self.cached = HFEngine(self.uncached.model, self.uncached.tokenizer, prefix_cache_bytes=budget)
        self.memory = KVCacheMemory(self.cached, instruction=INSTRUCTION)

    def check(self, questions: Sequence[str]) -> None:
        """Check that every question and its answer fit, before anything is encoded.

        Raises:
            ContextLengthError: corpus, question and answer exceed the model's context.
        """
        for question in questions:
            self.cached.check_fits(len(self._prompt(question).token_ids), self.sampling.max_new_tokens)

    def encode(self) -> Iterator[int]:
        """Encode the corpus. Yields the number of tokens of each document after it was encoded."""
        prompt = self._prompt("?")
        context = list(prompt.head_ids)
        for text, token_ids in zip(self.texts, prompt.document_ids, strict=True):
            if self.strategy == "exact":
                context += token_ids
                self.cached.prefill(context)
            else:
                self.memory.add(text)
            yield len(token_ids)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the corpus's keys and values."""
        return self.corpus_tokens * self.cached.bytes_per_token

    def ask(self, question: str, full: Runner, cached: Runner, on_piece: OnPiece) -> Comparison:
        """Answer a question by a full prefill, then from the caches: the same model, tokens and decoding.

        Each side has the machine to itself while its clock runs: at the same time, each would slow the other down.

        Args:
            question: the question.
            full: reads everything.
            cached: answers from the caches.
            on_piece: called after each piece of an answer, with the side that said it.
        """
        read = full.run(self._read(question), on_piece)
        recalled = cached.run(self._recall(question), on_piece)
        report = recalled.report
        assert report is not None  # the prompt has documents
        assert full.first_s is not None
        assert cached.first_s is not None
        return Comparison(
            question=question,
            answer=recalled.text.strip(),
            answer_full=read.text.strip(),
            ttft_full_s=full.first_s,
            ttft_cached_s=cached.first_s,
            context_tokens=report.context_tokens,
            encoded_tokens=report.encoded_tokens,
            reused_tokens=report.reused_tokens,
            recomputed_tokens=report.recomputed_tokens,
            same_answer=recalled.text == read.text,
        )

    def _read(self, question: str) -> Iterator[Chunk]:
        yield from self.uncached.stream(self._prompt(question), self.sampling)

    def _recall(self, question: str) -> Iterator[Chunk]:
        prompt = self._prompt(question)
        yield from self.memory.stream(prompt, strategy=self.strategy, ratio=self.ratio, sampling=self.sampling)

    def _prompt(self, question: str) -> Prompt:
        messages = insert_documents(INSTRUCTION, self.texts, [{"role": "user", "content": question}])
        return self.uncached.template.prompt(messages)
