"""The demonstration's work: a corpus encoded once, each question answered without caches and with them.

Both answers come from one model in one process, one after the other, so their times can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

from kvcag.chat_template import Document, Message, Prompt
from kvcag.contexts import Strategy
from kvcag.core import Chunk, Usage
from kvcag.demo.corpus import CorpusDocument
from kvcag.engines.hf import HFEngine
from kvcag.engines.sampling import Sampling
from kvcag.memory import KVCacheMemory

INSTRUCTION = "You are a helpful assistant. Answer the question using only the passages below."

OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One question, answered twice. Counts are tokens; times are seconds.

    Attributes:
        question: as it was asked.
        answer: from the caches.
        answer_full: from a full prefill of the same token ids.
        ttft_full_s: time to first token without caches.
        ttft_cached_s: time to first token from the caches, merging included.
        context_tokens: instruction and documents.
        encoded_tokens: of those, encoded for this question.
        reused_tokens: of those, taken from caches as they are.
        recomputed_tokens: of those, computed again while merging.
        same_answer: whether the two answers agree to the letter.
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
        """How many times sooner the first token comes from the caches."""
        return self.ttft_full_s / self.ttft_cached_s


class Demonstration:
    """A model, a corpus in its caches, and questions.

    Args:
        model: a hub id or a folder.
        documents: the corpus, in the order in which the model reads it.
        strategy: `"exact"` encodes the corpus as one context; any other encodes its documents one by one and merges
            them for each question.
        ratio: the recompute ratio of a merge.
        max_new_tokens: the most tokens of an answer.

    Raises:
        ContextLengthError: the corpus, with a question and its answer, exceeds the model's context.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        documents: Sequence[CorpusDocument],
        *,
        strategy: Strategy = "exact",
        ratio: float = 0.2,
        max_new_tokens: int = 48,
    ) -> None:
        self.uncached = HFEngine.from_pretrained(model, prefix_cache_bytes=0)
        self.documents = [Document(f"{document.text}\n\n") for document in documents]
        self.strategy: Strategy = strategy
        self.ratio = ratio
        self.sampling = Sampling(max_new_tokens=max_new_tokens)
        prompt = self._prompt("?")
        self.document_tokens = [len(token_ids) for token_ids in prompt.document_ids]
        self.corpus_tokens = len(prompt.context_ids)
        # Room for the corpus and for every question's answer after it, whatever the model's size.
        budget = 2 * self.uncached.context_length * self.uncached.bytes_per_token
        self.cached = HFEngine(self.uncached.model, self.uncached.tokenizer, prefix_cache_bytes=budget)
        self.memory = KVCacheMemory(self.cached, instruction=INSTRUCTION)

    def check(self, questions: Sequence[str]) -> None:
        """Refuse questions that do not fit, before anything is encoded."""
        for question in questions:
            self.cached.check_fits(len(self._prompt(question).token_ids), self.sampling.max_new_tokens)

    def encode(self) -> Iterator[int]:
        """Encode the corpus; yields the number of tokens of each document when it is done."""
        prompt = self._prompt("?")
        context = list(prompt.head_ids)
        for document, token_ids in zip(self.documents, prompt.document_ids, strict=True):
            if self.strategy == "exact":
                context += token_ids
                self.cached.prefill(context)
            else:
                item = self.memory.extract(document)
                self.memory.add(item.model_copy(update={"id": item.content_key}))
            yield len(token_ids)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that the corpus takes."""
        return self.corpus_tokens * self.cached.bytes_per_token

    def ask(self, question: str, on_full: OnText, on_cached: OnText) -> Comparison:
        """Answer a question by a full prefill, then from the caches; both are streamed to the callbacks."""
        full, full_usage = _read(self.uncached.stream(self._prompt(question), self.sampling), on_full)
        chunks = self.memory.stream(
            self._messages(question), strategy=self.strategy, ratio=self.ratio, sampling=self.sampling
        )
        answer, usage = _read(chunks, on_cached)
        report = usage.context
        assert report is not None  # the prompt has documents
        return Comparison(
            question=question,
            answer=answer,
            answer_full=full,
            ttft_full_s=full_usage.ttft_s,
            ttft_cached_s=usage.ttft_s,
            context_tokens=report.context_tokens,
            encoded_tokens=report.encoded_tokens,
            reused_tokens=report.reused_tokens,
            recomputed_tokens=report.recomputed_tokens,
            same_answer=answer == full,
        )

    def _messages(self, question: str) -> list[Message]:
        return [
            {"role": "system", "content": [f"{INSTRUCTION}\n\n", *self.documents]},
            {"role": "user", "content": question},
        ]

    def _prompt(self, question: str) -> Prompt:
        return self.uncached.template.prompt(self._messages(question))


def _read(chunks: Iterator[Chunk], on_text: OnText) -> tuple[str, Usage]:
    """Pass an answer on as it comes; the whole of it, and what it took."""
    text, usage = "", None
    for chunk in chunks:
        text += chunk.text
        usage = chunk.usage or usage
        on_text(chunk.text)
    assert usage is not None  # the last chunk of every stream has it
    return text.strip(), usage
