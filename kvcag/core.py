"""The data that flows: items, contexts, reports and answers. Read this first."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, SerializeAsAny, model_validator
from transformers import DynamicCache
from typing_extensions import Self

from kvcag.errors import InvalidInputError
from kvcag.fingerprint import KVCacheRecords, ModelFingerprint

_Memory = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())


def _new_id() -> str:
    return str(uuid.uuid4())


def ids_digest(token_ids: Iterable[int]) -> str:
    """SHA-256, in hex, of a sequence of token ids."""
    return hashlib.sha256(b"".join(int(i).to_bytes(4, "little") for i in token_ids)).hexdigest()


class ActivationMemoryItem(BaseModel):
    """A memory in the form in which a model uses it."""

    model_config = _Memory

    id: str = Field(default_factory=_new_id)
    memory: Any = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class EncodedItem(ActivationMemoryItem):
    """One text as a model keeps it. `id` is the content key unless another id is given.

    Attributes:
        records: the texts it was made from.
        token_ids: 1-D int64, the text's tokens, in order.
        fingerprint: the model that made it; None for an empty item.
        base_position: the position of its first token: how many tokens stood before it.
        prefix_digest: `ids_digest` of those tokens. Behind the same prefix, the first document of a context is exact.
    """

    records: KVCacheRecords = Field(default_factory=KVCacheRecords)
    token_ids: torch.Tensor = Field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    fingerprint: ModelFingerprint | None = None
    base_position: int = 0
    prefix_digest: str = Field(default_factory=lambda: ids_digest(()))

    @model_validator(mode="after")
    def _check_tokens_and_id(self) -> Self:
        if self.token_ids.ndim != 1 or self.token_ids.dtype != torch.long:
            raise ValueError("token_ids must be a 1-D int64 tensor")
        if "id" not in self.model_fields_set and self.fingerprint is not None:
            self.id = self.content_key
        return self

    @property
    def content_key(self) -> str:
        """`content_key` of its tokens under its model."""
        return content_key(self.fingerprint.digest if self.fingerprint else "", self.token_ids.tolist())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {len(self.token_ids)} tokens of {_shortened(self._text)}>"

    __str__ = __repr__

    @property
    def _text(self) -> str:
        return self.records.composed_text_memory


class KVCacheItem(EncodedItem):
    """One text's keys and values.

    Attributes:
        memory: the keys and values of the text alone, `(1, kv_heads, seq_len, head_dim)` a layer, in the model's
            dtype. What stood before it while it was encoded is not in it.
        is_exact: `memory` is bit for bit what the model computed; False once it was quantised at rest.
    """

    memory: DynamicCache = Field(default_factory=DynamicCache)
    is_exact: bool = True

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        length = self.memory.get_seq_length()
        if length != len(self.token_ids):
            raise ValueError(f"memory holds {length} tokens and token_ids {len(self.token_ids)}: they must agree")
        return self


class VLLMKVCacheItem(EncodedItem):
    """One text whose keys and values a server keeps: what is needed to send it again.

    Attributes:
        memory: the prompt that the server was sent: what stood before the text, and the text.
    """

    memory: str = ""


Item: TypeAlias = KVCacheItem | VLLMKVCacheItem
"""One text, encoded by an engine of this process or by a server."""


class TextualMemoryItem(BaseModel):
    """A memory as plain text: what caches are made from, and what they go back to."""

    model_config = _Memory

    id: str = Field(default_factory=_new_id)
    memory: str
    metadata: dict[str, Any] | SerializeAsAny[InstanceOf[BaseModel]] = Field(default_factory=dict)


def content_key(model_digest: str, token_ids: Iterable[int]) -> str:
    """`kv:sha256:…`: the same for the same tokens under the same model, whatever stood before them.

    What stood before them is in `prefix_digest`, which decides whether a use of the item is exact. Leaving it out of
    the key lets every door find what another one encoded (`benchmarks/instruction_key.py` has what that costs).
    """
    return "kv:sha256:" + hashlib.sha256(f"{model_digest}{ids_digest(token_ids)}".encode()).hexdigest()


def _shortened(text: str, length: int = 40) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= length else f"{line[: length - 1]}…")


MergeStrategy: TypeAlias = Literal["rotate", "anchor", "deviation", "query", "full"]
"""Which tokens a merge recomputes. `rotate`: none. `anchor`: the first ones of each document. `deviation`: those whose
keys and values change most. `query`: those that the question attends to most. `full`: all."""

Strategy: TypeAlias = Literal["auto", "exact"] | MergeStrategy
"""How documents are put together: see `KVCacheMemory.merge`."""

STRATEGIES: tuple[str, ...] = ("auto", "exact", *get_args(MergeStrategy))

DEFAULT_RATIO = 0.2
"""The recompute ratio of `query`: the share of context tokens that a merge computes again."""

MAX_KL = 0.05
"""Nats per token that `auto` lets a merged context be off, on the calibration's probes."""


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """How the documents of a question are to be put together.

    Attributes:
        strategy: see `KVCacheMemory.merge`.
        ratio: the recompute ratio, in [0, 1].
        max_kl: what `auto` allows, in nats per token.

    Raises:
        InvalidInputError: an unknown strategy, or a value out of range.
    """

    strategy: Strategy = "auto"
    ratio: float = DEFAULT_RATIO
    max_kl: float = MAX_KL

    def __post_init__(self) -> None:
        """Check the values."""
        if self.strategy not in STRATEGIES:
            raise InvalidInputError(f"unknown strategy {self.strategy!r}. Use one of {', '.join(STRATEGIES)}.")
        if not (isinstance(self.ratio, int | float) and 0 <= self.ratio <= 1):
            raise InvalidInputError(f"ratio is {self.ratio!r}; it is the share of tokens to recompute, from 0 to 1.")
        if not (isinstance(self.max_kl, int | float) and self.max_kl >= 0):
            raise InvalidInputError(f"max_kl is {self.max_kl!r}; it is in nats per token, 0 or more.")


Mode = Literal["prefix", "merged", "encoded"]
"""`prefix`: the context begins as an earlier one did, and that part was reused. `merged`: documents encoded one by one
were put together. `encoded`: nothing could be reused."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was reused and what was paid for. All counts are tokens of the context: instruction and documents.

    `reused_tokens + recomputed_tokens + encoded_tokens == context_tokens`.

    Attributes:
        mode: how the context was made.
        strategy: the strategy that was used.
        context_tokens: the length of the context.
        reused_tokens: taken from caches.
        recomputed_tokens: cached, and computed again for this question.
        encoded_tokens: not cached before.
        reason: why this strategy was used, if the caller did not ask for it.
        drift: the digest of the learned drift that was added (`KVCacheMemory.learn`); empty if none was.
        in_context_tokens: of documents that were encoded behind another document and could not stay exact.
    """

    mode: Mode
    strategy: str
    context_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    encoded_tokens: int
    reason: str = ""
    in_context_tokens: int = 0
    drift: str = ""

    @property
    def is_exact(self) -> bool:
        """The context is what a full prefill computes."""
        return self.mode != "merged"

    @property
    def paid_tokens(self) -> int:
        """Tokens that went through the model."""
        return self.recomputed_tokens + self.encoded_tokens

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON: its attributes and `is_exact`."""
        return {**asdict(self), "is_exact": self.is_exact}


@dataclass(frozen=True, slots=True, repr=False)
class ReadTail:
    """A question that was read behind a context.

    Attributes:
        cache: its keys and values alone, rotated to their positions.
        logits: after its last token, `(1, vocabulary)`.
    """

    cache: DynamicCache
    logits: torch.Tensor


@dataclass(frozen=True, slots=True, repr=False)
class MergedContext:
    """Instruction and documents as one cache, and what remains to be prefilled.

    Attributes:
        cache: keys and values of instruction and documents; the caller's own, it shares no memory with the store.
        token_ids: 1-D int64, every token in `cache`, in order.
        tail_ids: 1-D int64, the rest of the template: it closes the documents' turn and holds the question and the
            generation prompt.
        report: how it was made.
        fingerprint: the model it belongs to.
        read: `tail_ids` behind the context, where they were read when it was merged: then nothing remains.
    """

    cache: DynamicCache
    token_ids: torch.Tensor
    tail_ids: torch.Tensor
    report: MergeReport
    fingerprint: ModelFingerprint
    read: ReadTail | None = None

    def __repr__(self) -> str:
        made = self.report
        return (
            f"<{type(self).__name__} {made.mode} ({made.strategy}): {made.context_tokens} tokens, "
            f"{made.reused_tokens} reused, {made.recomputed_tokens} recomputed, {made.encoded_tokens} encoded>"
        )


@dataclass(frozen=True, slots=True, repr=False)
class ServedContext(MergedContext):
    """Instruction and documents as the prompt of a server, which keeps the keys and values itself: `cache` is empty.

    Attributes:
        prompt: the text of `token_ids`: instruction and documents, in order.
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


FinishReason = Literal["stop", "length"]
"""`stop`: an end-of-sequence token, a stop string or a constraint's end. `length`: `max_new_tokens` were generated."""


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

    @property
    def total_tokens(self) -> int:
        """Prompt and answer."""
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self) -> dict[str, Any]:
        """The usage for JSON: its attributes and `total_tokens`; `context` as `MergeReport.as_dict`."""
        context = self.context and self.context.as_dict()
        return {**asdict(self), "total_tokens": self.total_tokens, "context": context}


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's text and its log-probability."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. The last one has `finish_reason` and `usage`, and whatever text was held back.

    `thinking` is the piece of `<think>…</think>` that `strip_thinking` left out of the text. `scores` has the token's
    log-probability, and then those of the likeliest tokens at its place, if `Sampling.top_logprobs` asked for them.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    thinking: str = ""
    scores: tuple[TokenScore, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `str(answer)` is its text.

    Attributes:
        text: what the model said.
        usage: what it took.
        finish_reason: why it ended.
    """

    text: str
    usage: Usage
    finish_reason: FinishReason

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Answer:
        """The answer whose pieces these are."""
        text, last = "", None
        for last in chunks:
            text += last.text
        assert last is not None
        assert last.usage is not None
        assert last.finish_reason is not None
        return cls(text, last.usage, last.finish_reason)

    @property
    def report(self) -> MergeReport | None:
        """How the documents' context was made; None without documents."""
        return self.usage.context

    def __str__(self) -> str:
        return self.text
