"""The data types: items, contexts, reports and answers. Read this first."""

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
    """Return the SHA-256, in hex, of a sequence of token ids."""
    return hashlib.sha256(b"".join(int(i).to_bytes(4, "little") for i in token_ids)).hexdigest()


class ActivationMemoryItem(BaseModel):
    """The base of items, named after MemOS's class: a memory in the form in which a model uses it.

    Attributes:
        id: a UUID, unless another id is given.
        memory: the form for the model, such as a cache.
        metadata: free, and must be JSON to be stored.
    """

    model_config = _Memory

    id: str = Field(default_factory=_new_id)
    memory: Any = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class EncodedItem(ActivationMemoryItem):
    """One encoded text. `id` is the content key unless another id is given.

    Attributes:
        records: the texts that the item was made from.
        token_ids: the text's tokens, int64 `(seq_len,)`.
        fingerprint: the model that made the item; None for an empty item.
        base_position: the position of the first token, which is the length of the prefix.
        prefix_digest: `ids_digest` of the prefix, the tokens before the text while it was encoded. The first document
            of a context is exact if the context has the same prefix.
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
        """`content_key` of the item's tokens and model."""
        return content_key(self.fingerprint.digest if self.fingerprint else "", self.token_ids.tolist())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {len(self.token_ids)} tokens of {_shortened(self._text)}>"

    __str__ = __repr__

    @property
    def _text(self) -> str:
        return self.records.composed_text_memory


class KVCacheItem(EncodedItem):
    """The keys and values of one text.

    Attributes:
        memory: the keys and values of the text, without its prefix: `(1, kv_heads, seq_len, head_dim)` per layer, in
            the model's dtype.
        is_exact: `memory` is bit for bit what the model computed; False if a store quantised it.
    """

    memory: DynamicCache = Field(default_factory=DynamicCache)
    is_exact: bool = True

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        length = self.memory.get_seq_length()
        if length != len(self.token_ids):
            raise ValueError(f"memory has {length} tokens and token_ids {len(self.token_ids)}: they must be equal")
        return self


class VLLMKVCacheItem(EncodedItem):
    """One text whose keys and values a server has. The item has the prompt, to send it again.

    Attributes:
        memory: the prompt that was sent to the server: the prefix and the text.
    """

    memory: str = ""


Item: TypeAlias = KVCacheItem | VLLMKVCacheItem
"""One text, encoded by an engine of this process or by a server."""


class TextualMemoryItem(BaseModel):
    """A memory as plain text, named after MemOS's class: the source of an item.

    Attributes:
        id: a UUID, unless another id is given.
        memory: the text.
        metadata: a dict or a pydantic model. The item takes it over.
    """

    model_config = _Memory

    id: str = Field(default_factory=_new_id)
    memory: str
    metadata: dict[str, Any] | SerializeAsAny[InstanceOf[BaseModel]] = Field(default_factory=dict)


def content_key(model_digest: str, token_ids: Iterable[int]) -> str:
    """Return `kv:sha256:…`, which depends on the model and the tokens, and not on the prefix.

    The prefix is in `prefix_digest`, which decides whether a use of the item is exact. Without it in the key, all
    entry points find each other's items (`benchmarks/instruction_key.py` measures what that costs in accuracy).
    """
    return "kv:sha256:" + hashlib.sha256(f"{model_digest}{ids_digest(token_ids)}".encode()).hexdigest()


def _shortened(text: str, length: int = 40) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= length else f"{line[: length - 1]}…")


MergeStrategy: TypeAlias = Literal["rotate", "anchor", "deviation", "query", "full"]
"""Which tokens a merge recomputes. `rotate`: none. `anchor`: the first tokens of each document (as in EPIC).
`deviation`: the tokens whose keys and values change most (as in CacheBlend). `query`: the tokens that the question
attends to most. `full`: all."""

Strategy: TypeAlias = Literal["auto", "exact"] | MergeStrategy
"""How documents are merged: see `KVCacheMemory.merge`."""

STRATEGIES: tuple[str, ...] = ("auto", "exact", *get_args(MergeStrategy))

DEFAULT_RATIO = 0.2
"""The default recompute ratio: the share of context tokens that a merge recomputes."""

MAX_KL = 0.05
"""The default limit of `auto`: the largest KL divergence from a full prefill on the calibration's probes, in nats per
token."""


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """How to merge the documents of a question.

    Attributes:
        strategy: see `KVCacheMemory.merge`.
        ratio: the recompute ratio, in [0, 1].
        max_kl: the limit of `auto`, in nats per token.

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
"""`prefix`: the longest known prefix was reused, exactly. `merged`: documents that were encoded separately were merged.
`encoded`: nothing could be reused."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """How a context was made. All counts are tokens of the context: instruction and documents.

    `reused_tokens + recomputed_tokens + encoded_tokens == context_tokens`.

    Attributes:
        mode: see `Mode`.
        strategy: the strategy that was used.
        context_tokens: the length of the context.
        reused_tokens: tokens taken from caches.
        recomputed_tokens: cached tokens that were computed again for this question.
        encoded_tokens: tokens that were not cached before.
        reason: why this strategy was used, if the caller did not ask for it.
        drift: the digest of the learned drift that was added (`KVCacheMemory.learn`); empty if none was.
        in_context_tokens: tokens of merged documents that were encoded after another document (`context` of
            `KVCacheMemory.add`).
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
        """Whether the context equals that of a full prefill."""
        return self.mode != "merged"

    @property
    def paid_tokens(self) -> int:
        """The tokens that the model computed."""
        return self.recomputed_tokens + self.encoded_tokens

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON: its attributes and `is_exact`."""
        return {**asdict(self), "is_exact": self.is_exact}


@dataclass(frozen=True, slots=True, repr=False)
class ReadTail:
    """The tail of a prompt, prefilled after a context.

    Attributes:
        cache: the tail's keys and values, without the context: `(1, kv_heads, tail_len, head_dim)` per layer.
        logits: the logits of the last token, `(1, vocabulary)`.
    """

    cache: DynamicCache
    logits: torch.Tensor


@dataclass(frozen=True, slots=True, repr=False)
class MergedContext:
    """Instruction and documents as one cache, and the tail of the prompt, which remains to be prefilled.

    Attributes:
        cache: keys and values of instruction and documents, `(1, kv_heads, seq_len, head_dim)` per layer, in the
            model's dtype. The caller owns it: it shares no memory with the store.
        token_ids: the tokens in `cache`, int64 `(seq_len,)`.
        tail_ids: the tokens after the documents, int64 `(tail_len,)`: the end of their turn, the question and the
            generation prompt.
        report: how the context was made.
        fingerprint: the model that made it.
        read: the prefilled tail, if the merge prefilled it; else None.
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
    """Instruction and documents as a prompt for a server, which has the keys and values. `cache` is empty.

    Attributes:
        prompt: the text of `token_ids`: instruction and documents, in order.
    """

    prompt: str = ""


class ContextPrompt(str):
    """A context as text, for a server that has its keys and values: a server's `ContextCache`.

    Attributes:
        token_ids: the tokens that are sent to the server, int64 `(seq_len,)`. The text is for people.
        fingerprint: the server's model.
        messages: the chat messages that make the context, if each of them is a complete turn; else None.
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
        """Make a context of a text and its tokens."""
        made = cls(text)
        made.token_ids = torch.tensor(token_ids, dtype=torch.long)
        made.fingerprint = fingerprint
        made.messages = messages
        return made


FinishReason = Literal["stop", "length"]
"""`stop`: an end-of-sequence token, a stop string or a constraint's end. `length`: `max_new_tokens` were generated."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens and the time of one answer. Counts are tokens; times are seconds.

    Attributes:
        prompt_tokens: tokens of the whole prompt, cached or not.
        cached_tokens: prompt tokens whose keys and values were reused.
        created_tokens: prompt tokens that were encoded in this call and cached for later calls.
        completion_tokens: generated tokens, including the end-of-sequence token.
        ttft_s: from the call to the first token.
        total_s: from the call to the end of the answer.
        context: how the documents' context was made; None without documents.
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
        """Tokens of prompt and answer."""
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self) -> dict[str, Any]:
        """Return the usage for JSON: its attributes and `total_tokens`; `context` as `MergeReport.as_dict`."""
        context = self.context and self.context.as_dict()
        return {**asdict(self), "total_tokens": self.total_tokens, "context": context}


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's text and its log-probability."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer.

    Attributes:
        text: the text of this piece. Text that may become a stop string is held back for a later piece.
        token_ids: the tokens that were generated for this piece.
        finish_reason: set in the last piece only.
        usage: set in the last piece only.
        thinking: the part of `<think>…</think>` that `strip_thinking` left out of `text`.
        scores: the log-probability of the token, then those of the likeliest tokens in its place, if
            `Sampling.top_logprobs` asks for them.
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
        text: the text that the model generated.
        usage: the tokens and the time of the answer.
        finish_reason: why the answer ended.
    """

    text: str
    usage: Usage
    finish_reason: FinishReason

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Answer:
        """Join the pieces of an answer."""
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
