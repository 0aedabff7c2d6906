"""`generate` for people who hold messages, over the `stream` that an engine has for prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from transformers.cache_utils import Cache

from kvcag.context import ContextPrompt, MergedContext
from kvcag.engines.base import Chunk
from kvcag.engines.constrain import ConstraintLike
from kvcag.engines.continuation import plan
from kvcag.engines.sampling import DEFAULT_MAX_NEW_TOKENS, Sampling
from kvcag.errors import ContextLengthError
from kvcag.prompt import ChatTemplate, Message, Prompt


class Generating(ABC):
    """MemOS's `generate` and `generate_stream`, and what every engine with a fixed context does alike.

    Attributes:
        template: makes prompts of messages.
        defaults: settings of every call that gives no others.
    """

    template: ChatTemplate
    defaults: Mapping[str, Any]

    @property
    @abstractmethod
    def context_length(self) -> int:
        """The most tokens, prompt and answer together."""

    @abstractmethod
    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        past_key_values: Any = None,
        *,
        constraint: ConstraintLike | None = None,
        tenant: str = "",
        started: float | None = None,
    ) -> Generator[Chunk, None, None]:
        """Answer a prompt."""

    def sampling(self, **given: Any) -> Sampling:
        """The settings of one call: what is given, else the engine's defaults."""
        return Sampling.over(self.defaults, given)

    def check_fits(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """How many tokens may be generated.

        Raises:
            ContextLengthError: the prompt and `max_new_tokens` exceed the model's context.
        """
        room = self.context_length - prompt_tokens
        wanted = min(DEFAULT_MAX_NEW_TOKENS, max(room, 1)) if max_new_tokens is None else max_new_tokens
        if wanted > room:
            raise ContextLengthError(prompt_tokens, wanted, self.context_length)
        return wanted

    def generate(
        self,
        messages: str | Sequence[Message] | None = None,
        past_key_values: Cache | MergedContext | ContextPrompt | None = None,
        *,
        constraint: ConstraintLike | None = None,
        **sampling: Any,
    ) -> str:
        """Answer messages, optionally over a cached context.

        Args:
            messages: chat messages, or a str for one user message. Over a context they continue it; None, over a
                `MergedContext`, asks the question it was merged for.
            past_key_values: what `build_kv_cache` (a server's `build_vllm_kv_cache`) or `KVCacheMemory.get_cache` gave,
                or a `MergedContext`. It is read, never written.
            constraint: what the answer must be: a pydantic model, a JSON schema, `Regex`, `Choices` or `Grammar`.
            **sampling: see `Sampling`.

        Raises:
            ConstraintError: the constraint cannot be used, or nothing that satisfies it fits `max_new_tokens`.
            ContextLengthError: the prompt with `max_new_tokens` exceeds the model's context; nothing was prefilled.
            CacheMismatchError: the cache is another model's, or does not say which tokens it holds.
        """
        return "".join(self.generate_stream(messages, past_key_values, constraint=constraint, **sampling))

    def generate_stream(
        self,
        messages: str | Sequence[Message] | None = None,
        past_key_values: Cache | MergedContext | ContextPrompt | None = None,
        *,
        constraint: ConstraintLike | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """`generate`, piece by piece. Arguments are checked at once; closing the stream stops the model."""
        settings = self.sampling(**sampling)
        prompt = self.plan(messages, past_key_values)
        chunks = self.stream(prompt, settings, past_key_values, constraint=constraint)
        return (chunk.text for chunk in chunks if chunk.text)

    def plan(
        self,
        messages: str | Sequence[Message] | None,
        past_key_values: Cache | MergedContext | ContextPrompt | None = None,
    ) -> Prompt:
        """The whole prompt, the context's tokens included, as `stream` takes it."""
        return plan(self.template, messages, past_key_values)
