"""What an engine is, and what it gives back while it generates, whatever it runs on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from transformers.cache_utils import Cache

from kvcag.cache.layers import ContextCache
from kvcag.chat_template import ChatTemplate, Message, Prompt, as_messages
from kvcag.core import Chunk, ContextPrompt, MergedContext, Usage
from kvcag.engines.constrain import ConstraintLike
from kvcag.engines.sampling import DEFAULT_MAX_NEW_TOKENS, Sampling
from kvcag.errors import ContextLengthError, EmptyPromptError, TokenMismatchError
from kvcag.fingerprint import ModelFingerprint


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


class Serving(Generating):
    """What `KVCacheMemory` needs of a server: that it can be sent prompts ahead of the questions."""

    @property
    @abstractmethod
    def fingerprint(self) -> ModelFingerprint:
        """Which model this is."""

    @abstractmethod
    def preload(self, prompt: Prompt | ContextPrompt, *, tenant: str = "") -> Usage:
        """Have the server encode a prompt, so that what begins with it is answered sooner."""

    @abstractmethod
    def preloaded(self, token_ids: Sequence[int], *, tenant: str = "") -> int:
        """How many tokens at the beginning of these were sent ahead."""

    @abstractmethod
    def forget(self, tenant: str = "") -> None:
        """Send nothing of a tenant's ahead again."""

    @abstractmethod
    def prompt_of(self, token_ids: Sequence[int], messages: list[dict[str, Any]] | None = None) -> ContextPrompt:
        """Tokens as the text of a prompt that knows them."""


def context_ids(
    template: ChatTemplate, prompt: str | Sequence[str] | Sequence[Message]
) -> tuple[tuple[int, ...], list[dict[str, Any]] | None]:
    """The tokens of a context to be continued, and the messages whose closed turns it is.

    Args:
        template: the model's chat template.
        prompt: a str is an open system turn; a list of str is joined into one by blank lines; chat messages are taken
            as they are, as closed turns.

    Raises:
        EmptyPromptError: there is nothing to encode.
    """
    parts: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if all(isinstance(part, str) for part in parts):
        text = "\n\n".join(part for part in parts if part.strip())
        if not text:
            raise EmptyPromptError("the prompt is empty: there is nothing to encode")
        return template.around(None, [_PLACEHOLDER]).head_ids + template.encode(text), None
    messages = [dict(message) for message in parts]
    return template.prompt(messages, add_generation_prompt=False).token_ids, messages


def plan(
    template: ChatTemplate,
    messages: str | Sequence[Message] | None,
    past_key_values: Cache | MergedContext | ContextPrompt | None,
) -> Prompt:
    """The whole prompt that asks `messages`, the context's tokens included.

    Raises:
        TokenMismatchError: the context does not say which tokens it holds.
        EmptyPromptError: there is nothing to ask.
    """
    asked = as_messages(messages) if messages else []
    if isinstance(past_key_values, MergedContext):
        context = tuple(past_key_values.token_ids.tolist())
        if not asked:
            return Prompt(context, (), tuple(past_key_values.tail_ids.tolist()))
        framed = template.around(None, asked)
    elif past_key_values is None or _is_empty(past_key_values):
        return template.prompt(asked)
    else:
        cached = past_key_values if isinstance(past_key_values, ContextPrompt) else known(past_key_values)
        context = tuple(cached.token_ids.tolist())
        if cached.messages is not None:
            return _continued(template, context, cached.messages, asked)
        framed = template.around(None, asked)
    return Prompt(context, (), framed.tail_ids, framed.thinking)


def _continued(
    template: ChatTemplate, context: tuple[int, ...], cached: list[dict[str, Any]], asked: list[Message]
) -> Prompt:
    """The prompt that continues closed turns. `asked` are the new messages, or the conversation as a whole."""
    everything = asked if asked[: len(cached)] == cached else [*cached, *asked]
    closed = template.render(cached, add_generation_prompt=False)
    text = template.render(everything)
    if not text.startswith(closed):  # the template rewrites history; what agrees is found by its ids
        return template.prompt(everything)
    tail = template.encode(text[len(closed) :])
    return Prompt(context, (), tail, thinking=text.rstrip().endswith("<think>"))


def _is_empty(context: Cache | ContextPrompt) -> bool:
    return not (context if isinstance(context, ContextPrompt) else context.get_seq_length())


def known(cache: Cache) -> ContextCache:
    """The cache, if it says which tokens it holds.

    Raises:
        TokenMismatchError: it does not.
    """
    if isinstance(cache, ContextCache):
        return cache
    raise TokenMismatchError(
        f"a {type(cache).__name__} does not say which tokens it holds, so its answer could be wrong and nobody would "
        "know. Pass a cache from build_kv_cache or get_cache, a MergedContext, or wrap it: "
        "ContextCache.of(layers, token_ids, engine.fingerprint)."
    )


_PLACEHOLDER: Message = {"role": "user", "content": "…"}
