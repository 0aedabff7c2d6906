"""What an engine is, and what it gives back while it generates, whatever it runs on."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from transformers.cache_utils import Cache

from kvcag.context import MergedContext, MergeReport
from kvcag.engines.constrain import ConstraintLike
from kvcag.engines.sampling import Sampling
from kvcag.fingerprint import ModelFingerprint
from kvcag.prompt import ChatTemplate, Prompt

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


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. The last one has `finish_reason` and `usage`, and whatever text was held back."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Engine(Protocol):
    """Answers prompts. `KVCacheMemory` and the adapters need no more of an engine than this.

    Three are here: `HFEngine`, whose caches can be kept and merged; `VLLMEngine`, a server that keeps its caches to
    itself and is given whole prompts and no context; and `EchoEngine`, which has no weights.
    """

    @property
    def model_name(self) -> str:
        """What people call the model."""

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Which model this is."""

    @property
    def template(self) -> ChatTemplate:
        """Makes prompts of messages."""

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and answer together."""

    def sampling(self, **given: Any) -> Sampling:
        """The settings of one call: what is given, else the engine's defaults. Unknown names are refused."""

    def check_fits(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """How many tokens may be generated. Raises `ContextLengthError`."""

    def constrain(self, constraint: ConstraintLike, max_new_tokens: int, thinking: bool = False) -> ConstraintLike:
        """A constraint, ready for `stream`, and checked as far as can be. Raises `ConstraintError`."""

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        past_key_values: Cache | MergedContext | None = None,
        *,
        constraint: ConstraintLike | None = None,
        tenant: str = "",
        started: float | None = None,
    ) -> Generator[Chunk, None, None]:
        """Answer. Arguments are checked at once, the work is done as the stream is read, and closing stops it."""
