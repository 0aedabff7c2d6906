"""Compares answers with caches and without: one corpus, one model, one process, so that times can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

from kvcag.chat_template import Prompt
from kvcag.core import DEFAULT_RATIO, Answer, Chunk, Strategy
from kvcag.demo.corpus import Topic
from kvcag.engines.hf import HFEngine
from kvcag.engines.sampling import Sampling
from kvcag.memory import KVCacheMemory, insert_documents

INSTRUCTION = "You are a helpful assistant. Answer the question using only the passages below."

OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One question, answered twice. Counts are tokens; times are seconds.

    Attributes:
        question: the question.
        answer: the answer from the caches.
        answer_full: the answer from a full prefill of the same tokens.
        ttft_full_s: time to first token without caches.
        ttft_cached_s: time to first token from the caches, merging included.
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
        """Time to first token without caches, over the time with them."""
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

    def ask(self, question: str, on_full: OnText, on_cached: OnText) -> Comparison:
        """Answer a question by a full prefill, then from the caches. Both answers are streamed to the callbacks."""
        prompt = self._prompt(question)
        full = Answer.of(_shown(self.uncached.stream(prompt, self.sampling), on_full))
        chunks = self.memory.stream(prompt, strategy=self.strategy, ratio=self.ratio, sampling=self.sampling)
        cached = Answer.of(_shown(chunks, on_cached))
        report = cached.report
        assert report is not None  # the prompt has documents
        return Comparison(
            question=question,
            answer=cached.text.strip(),
            answer_full=full.text.strip(),
            ttft_full_s=full.usage.ttft_s,
            ttft_cached_s=cached.usage.ttft_s,
            context_tokens=report.context_tokens,
            encoded_tokens=report.encoded_tokens,
            reused_tokens=report.reused_tokens,
            recomputed_tokens=report.recomputed_tokens,
            same_answer=cached.text == full.text,
        )

    def _prompt(self, question: str) -> Prompt:
        messages = insert_documents(INSTRUCTION, self.texts, [{"role": "user", "content": question}])
        return self.uncached.template.prompt(messages)


def _shown(chunks: Iterator[Chunk], on_text: OnText) -> Iterator[Chunk]:
    for chunk in chunks:
        on_text(chunk.text)
        yield chunk
