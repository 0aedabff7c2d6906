"""Compares answers from caches with answers after a full prefill: one corpus, one model, one process."""

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
    """One side of the race, with its own clock, which runs only while this side answers.

    Attributes:
        name: the name that is shown.
        text: the answer so far.
        first_s: time to the first word in seconds; for an empty answer, time to its end. None before that.
        total_s: time to the end of the answer in seconds; None before that.
    """

    name: str
    text: str = ""
    first_s: float | None = None
    total_s: float | None = None
    _started: float | None = field(default=None, repr=False)

    @property
    def clock_s(self) -> float:
        """Seconds since the turn of this side began, until it ended; 0 before the turn."""
        if self._started is None:
            return 0.0
        return time.perf_counter() - self._started if self.total_s is None else self.total_s

    def run(self, chunks: Iterator[Chunk], on_piece: OnPiece) -> Answer:
        """Take a turn: start the clock, and read the answer. Reading the first chunk starts the model."""
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
    """One question and its two answers, given one after the other. Counts are in tokens, times in seconds.

    Attributes:
        question: the question.
        answer: the answer from the caches.
        answer_full: the answer from a full prefill of the same tokens.
        ttft_full_s: time to the first word without caches.
        ttft_cached_s: time to the first word from the caches, merging included.
        context_tokens: tokens of the instruction and the documents.
        encoded_tokens: context tokens that were encoded for this question.
        reused_tokens: context tokens that were taken from caches unchanged.
        recomputed_tokens: context tokens that the merge recomputed.
        same_answer: whether both answers have the same text.
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
        """The time to the first word without caches, divided by the time with caches."""
        return self.ttft_full_s / self.ttft_cached_s


class Demonstration:
    """A model and a corpus, with and without caches.

    Args:
        model: a Hugging Face hub id or a folder.
        documents: the corpus, in the order in which the model reads it.
        strategy: `"exact"` encodes the corpus as one context. The other strategies encode its documents one by one, and
            merge them for each question, as `KVCacheMemory.merge` does.
        ratio: the recompute ratio of a merge, 0 to 1.
        max_new_tokens: the maximum number of tokens in an answer.
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
        """Check that each question and its answer fit into the model's context. Call it before `encode`.

        Raises:
            ContextLengthError: corpus, question and answer exceed the model's context.
        """
        for question in questions:
            self.cached.check_fits(len(self._prompt(question).token_ids), self.sampling.max_new_tokens)

    def encode(self) -> Iterator[int]:
        """Encode the corpus. After each document, yields the document's number of tokens."""
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
        """The size of the corpus's keys and values in bytes."""
        return self.corpus_tokens * self.cached.bytes_per_token

    def ask(self, question: str, full: Runner, cached: Runner, on_piece: OnPiece) -> Comparison:
        """Answer a question after a full prefill, then from the caches, with the same model, tokens and decoding.

        The sides run one after the other, since they would slow each other down.

        Args:
            question: the question.
            full: the side with a full prefill.
            cached: the side that answers from the caches.
            on_piece: called after each chunk of an answer, with the side and the chunk.
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
