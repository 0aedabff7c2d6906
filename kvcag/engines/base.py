"""The contract of an engine: a model that encodes text into caches and answers prompts, locally or on a server.

`Sampling` has the settings of an answer. `Engine` is the interface that memories and adapters use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from transformers.cache_utils import Cache

from kvcag.cache.layers import ContextCache
from kvcag.chat_template import ChatTemplate, Message, Prompt, Seams, as_messages, check_unicode
from kvcag.core import Chunk, ContextPrompt, EncodedItem, Item, MergedContext
from kvcag.engines.constrain import ConstraintLike
from kvcag.errors import (
    ContextLengthError,
    EmptyPromptError,
    InvalidInputError,
    TokenMismatchError,
    UnsupportedModelError,
)
from kvcag.fingerprint import ModelFingerprint

DEFAULT_MAX_NEW_TOKENS = 512

_FINE = 1e-6
"""The smallest temperature and penalty. Dividing float32 logits by less may make them infinite."""
_RANGE = "from 1e-6 to 1e6"


@dataclass(frozen=True, slots=True)
class Sampling:
    """The settings of one generation. Greedy unless `temperature` is above 0.

    Attributes:
        max_new_tokens: the most tokens to generate. None: 512, or as many as still fit the model's context.
        temperature: 0 decodes greedily.
        top_k: sample from the k likeliest tokens.
        top_p: sample from the likeliest tokens that together reach this probability.
        min_p: sample from tokens that are at least this likely, relative to the likeliest.
        repetition_penalty: values above 1 make tokens of the prompt and of the answer so far less likely.
        seed: makes a sampled answer repeatable. None: a new seed for each answer.
        stop: strings that end the answer; they are not part of it.
        strip_thinking: leave `<think>…</think>` out of the text.
        top_logprobs: return the log-probability of each token, and those of this many likeliest tokens in its place, as
            the model predicts them, before any of these settings applies. None: return none.

    Raises:
        InvalidInputError: a value is out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    strip_thinking: bool = False
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        _check("max_new_tokens", self.max_new_tokens, lambda v: v >= 1, "a whole number, at least 1", int)
        _check("temperature", self.temperature, lambda v: v == 0 or _FINE <= v <= 1 / _FINE, f"0 (greedy) or {_RANGE}")
        _check("top_k", self.top_k, lambda v: v >= 1, "a whole number, at least 1", int)
        _check("top_p", self.top_p, lambda v: 0 < v <= 1, "in (0, 1]")
        _check("min_p", self.min_p, lambda v: 0 <= v <= 1, "in [0, 1]")
        _check("repetition_penalty", self.repetition_penalty, lambda v: _FINE <= v <= 1 / _FINE, _RANGE)
        _check("top_logprobs", self.top_logprobs, lambda v: 0 <= v <= 20, "a whole number, 0 to 20", int)
        _check("seed", self.seed, lambda v: -(1 << 63) <= v < 1 << 64, "a whole number of 64 bits", int)
        if not all(isinstance(stop, str) and stop for stop in self.stop):
            raise InvalidInputError(f"stop must be one or more non-empty strings, not {self.stop!r}")
        for stop in self.stop:
            check_unicode(stop)

    @classmethod
    def of(cls, **given: Any) -> Sampling:
        """Make settings from keyword arguments, including the names of MemOS and transformers.

        `max_tokens` is `max_new_tokens`. `do_sample=False` sets the temperature to 0; `do_sample=True` sets it to 1
        unless a temperature above 0 is given. `stop` may be one string. None means unset.

        Raises:
            InvalidInputError: an unknown name, or a value out of range.
        """
        settings = {name: value for name, value in given.items() if value is not None}
        if "max_tokens" in settings:
            settings.setdefault("max_new_tokens", settings.pop("max_tokens"))
        do_sample = settings.pop("do_sample", None)
        if do_sample is not None:
            settings["temperature"] = (settings.get("temperature") or 1.0) if do_sample else 0.0
        if "stop" in settings:
            stop = settings["stop"]
            settings["stop"] = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
        known = {field.name for field in fields(cls)}
        unknown = sorted(settings.keys() - known)
        if unknown:
            raise InvalidInputError(
                f"unknown argument {', '.join(unknown)}. Known arguments: {', '.join(sorted(known))}"
            )
        return cls(**settings)

    @classmethod
    def over(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Sampling:
        """Make settings from keyword arguments, with defaults for arguments that are not given.

        Raises:
            InvalidInputError: an unknown name, or a value out of range.
        """
        settings = {name: value for name, value in given.items() if value is not None}
        remaining = dict(defaults)
        if "temperature" in settings:  # the call's temperature overrides the default's do_sample
            remaining.pop("do_sample", None)
        return cls.of(**{**remaining, **settings})

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest one."""
        return self.temperature == 0


def _check(name: str, value: Any, holds: Any, wanted: str, kinds: Any = int | float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, kinds) or not holds(value):
        raise InvalidInputError(f"{name} must be {wanted}, not {value!r}")


class Engine(ABC):
    """The interface that memories and adapters use.

    `HFEngine` runs a model in this process, and its caches can be stored and merged. `VLLMEngine` sends prompts to a
    server, which has the caches. `kvcag.testing.EchoEngine` has no weights. An operation that an engine does not
    support raises `UnsupportedModelError`.

    Attributes:
        merges: this engine's caches can be merged in any order. Such an engine is an `HFEngine` or behaves as one.
        has_logprobs: the engine knows the log-probabilities of an answer's tokens.
        seams: how documents are joined in a prompt that is read in order: see `ChatTemplate.prompt`.
        answers_at_once: how many answers to a list of questions are generated at the same time.
        item_type: the type of the result of `encode_item`.
        template: makes prompts of messages.
        defaults: `Sampling` settings for calls that do not give them.
    """

    merges: ClassVar[bool] = False
    answers_at_once: int = 32
    has_logprobs: ClassVar[bool] = False
    seams: Seams = "none"
    item_type: ClassVar[type[EncodedItem]]
    template: ChatTemplate
    defaults: Mapping[str, Any]

    # --- the model ---------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def model_name(self) -> str:
        """The model's name, for people."""

    @property
    @abstractmethod
    def fingerprint(self) -> ModelFingerprint:
        """The fingerprint of the model, which every cache carries."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """The most tokens, prompt and answer together."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model_name}>"

    # --- documents ---------------------------------------------------------------------------------------------

    def encode_item(self, head_ids: Sequence[int], token_ids: Sequence[int], *, namespace: str = "") -> Item:
        """Encode one document.

        Args:
            head_ids: the tokens before the document; may be empty.
            token_ids: the tokens of the document.
            namespace: the namespace whose recent contexts may be reused.

        Raises:
            EmptyPromptError: `token_ids` is empty.
            ContextLengthError: both together exceed the model's context.
            UnsupportedModelError: this engine cannot encode documents ahead of a question.
        """
        raise self._cannot("encode documents ahead of a question")

    def exact_context(self, context_ids: Sequence[int], tail_ids: Sequence[int], namespace: str = "") -> MergedContext:
        """Encode instruction and documents, in this order, as one context. The longest known prefix is reused.

        Args:
            context_ids: the tokens of instruction and documents.
            tail_ids: the tokens after them, which the context carries for `stream`.
            namespace: the namespace whose recent contexts may be reused.

        Raises:
            ContextLengthError: the tokens exceed the model's context.
            UnsupportedModelError: this engine cannot return a context.
        """
        raise self._cannot("return a context")

    def prompt_of(self, token_ids: Sequence[int], messages: list[dict[str, Any]] | None = None) -> ContextPrompt:
        """Return tokens as a `ContextPrompt`, for an engine whose contexts are prompts.

        Raises:
            UnsupportedModelError: this engine's contexts are caches.
        """
        raise self._cannot("turn a context into a prompt")

    def serves_merged(self, strategy: str, namespace: str = "") -> bool:
        """Whether the server of this engine merges documents by this strategy (`MergeStrategy`).

        Raises:
            UnsupportedModelError: the server merges documents, but not by this strategy.
        """
        return False

    def learn_drift(self, head_ids: Sequence[int], passages: Sequence[Sequence[int]], namespace: str = "") -> None:
        """Let a server that merges learn the usual drift of documents.

        Args:
            head_ids: the tokens before the passages.
            passages: the token ids of several short texts.
            namespace: the namespace in which the server stores the drift.

        Raises:
            UnsupportedModelError: this engine's server does not merge.
        """
        raise self._cannot("merge on a server")

    def known_prefix(self, token_ids: Sequence[int], namespace: str = "") -> int:
        """Return the length of the longest cached prefix of these tokens."""
        return 0

    def still_holds(self, token_ids: Sequence[int], namespace: str = "") -> bool:
        """Whether an item of this engine can be used without encoding it again.

        Args:
            token_ids: the tokens of the item, after those before it.
            namespace: the item's namespace.
        """
        return True

    def forget(self, namespace: str = "") -> None:  # noqa: B027 - most engines have nothing to drop
        """Drop the recent contexts of a namespace."""

    def begun(self, namespace: str = "") -> AbstractContextManager[None]:
        """Within the block, an answer is prepared. If the namespace is forgotten meanwhile, nothing of it is cached."""
        return nullcontext()

    def _cannot(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self).__name__} cannot {what}. Use an HFEngine; KVCacheMemory.stream answers with either."
        )

    # --- answering ---------------------------------------------------------------------------------------------

    @abstractmethod
    def constrain(self, constraint: ConstraintLike, max_new_tokens: int, thinking: bool = False) -> ConstraintLike:
        """Prepare a constraint for `stream`, and check it as far as possible.

        Args:
            constraint: the form of the answer.
            max_new_tokens: the token budget of the answer.
            thinking: the answer begins within a thinking block; the constraint holds after that block.

        Raises:
            ConstraintError: the constraint cannot be used.
        """

    @abstractmethod
    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        past_key_values: Cache | MergedContext | ContextPrompt | None = None,
        *,
        constraint: ConstraintLike | None = None,
        namespace: str = "",
        started: float | None = None,
        accept_merged: bool = False,
    ) -> Generator[Chunk, None, None]:
        """Answer a prompt. Arguments are checked at once; reading the stream runs the model, and closing it stops it.

        Args:
            prompt: the whole prompt, including the context's tokens; see `build_prompt`.
            sampling: see `sampling`.
            past_key_values: a context that the prompt begins with. It is only read.
            constraint: the form of the answer.
            namespace: the namespace whose recent contexts may be reused, and to which this one is added.
            accept_merged: a merged recent context may be reused too; the report says so.
            started: the time from which `Usage` counts (`time.perf_counter()`), to include preparing the context.

        Raises:
            EmptyPromptError: the prompt has no tokens.
            ConstraintError: the constraint cannot be used, or no answer that satisfies it fits `max_new_tokens`.
            ContextLengthError: the prompt with `max_new_tokens` exceeds the model's context.
            CacheMismatchError: another model made the context, or the prompt does not begin with its tokens.
        """

    def sampling(self, **given: Any) -> Sampling:
        """Return the settings of one call: the given ones, and the engine's defaults for the others.

        Raises:
            InvalidInputError: an unknown name, or a value out of range.
            UnsupportedModelError: `top_logprobs` is given, and this engine has no log-probabilities.
        """
        made = Sampling.over(self.defaults, given)
        if made.top_logprobs is not None and not self.has_logprobs:
            raise UnsupportedModelError(f"{type(self).__name__} has no log-probabilities. Use an HFEngine.")
        return made

    def check_fits(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """Return how many tokens may be generated.

        Args:
            prompt_tokens: the length of the prompt.
            max_new_tokens: the wanted number of tokens. None: 512, or as many as fit.

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
        messages: str | Sequence[Message] | MergedContext | None = None,
        past_key_values: Cache | MergedContext | ContextPrompt | None = None,
        *,
        constraint: ConstraintLike | None = None,
        **sampling: Any,
    ) -> str:
        """Answer messages, optionally over a cached context.

        Args:
            messages: chat messages, or a str for one user message. With a context, the messages continue it. A
                `MergedContext` without messages answers the question that it was merged for.
            past_key_values: the result of `build_kv_cache` (for a server, `build_vllm_kv_cache`) or
                `KVCacheMemory.get_cache`, or a `MergedContext`. It is only read.
            constraint: the form of the answer: a pydantic model, a JSON schema, `Regex`, `Choices` or `Grammar`.
            **sampling: see `Sampling`.

        Raises:
            ConstraintError: the constraint cannot be used, or no answer that satisfies it fits `max_new_tokens`.
            ContextLengthError: the prompt with `max_new_tokens` exceeds the model's context. Nothing was prefilled.
            CacheMismatchError: another model made the cache, or the cache has no `token_ids`.
        """
        return "".join(self.generate_stream(messages, past_key_values, constraint=constraint, **sampling))

    def generate_stream(
        self,
        messages: str | Sequence[Message] | MergedContext | None = None,
        past_key_values: Cache | MergedContext | ContextPrompt | None = None,
        *,
        constraint: ConstraintLike | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Answer as `generate`, piece by piece. Arguments are checked at once; closing the stream stops the model."""
        if isinstance(messages, MergedContext):
            messages, past_key_values = None, messages
        settings = self.sampling(**sampling)
        prompt = self.build_prompt(messages, past_key_values)
        chunks = self.stream(prompt, settings, past_key_values, constraint=constraint)
        return (chunk.text for chunk in chunks if chunk.text)

    def build_prompt(
        self,
        messages: str | Sequence[Message] | None,
        past_key_values: Cache | MergedContext | ContextPrompt | None = None,
    ) -> Prompt:
        """Return the whole prompt for `stream`, including the context's tokens.

        Args:
            messages: as for `generate`.
            past_key_values: as for `generate`.

        Raises:
            TokenMismatchError: the context has no `token_ids`.
            EmptyPromptError: there is no question.
        """
        asked = as_messages(messages) if messages else []
        if isinstance(past_key_values, MergedContext):
            context = tuple(past_key_values.token_ids.tolist())
            if not asked:
                return Prompt(context, (), tuple(past_key_values.tail_ids.tolist()))
            framed = self.template.split_system(None, asked)
        elif past_key_values is None or _is_empty(past_key_values):
            return self.template.prompt(asked)
        else:
            cached = past_key_values if isinstance(past_key_values, ContextPrompt) else with_tokens(past_key_values)
            context = tuple(cached.token_ids.tolist())
            if cached.messages is not None:
                return _continued(self.template, context, cached.messages, asked)
            framed = self.template.split_system(None, asked)
        return Prompt(context, (), framed.tail_ids, framed.thinking)


def context_ids(
    template: ChatTemplate, prompt: str | Sequence[str] | Sequence[Message]
) -> tuple[tuple[int, ...], list[dict[str, Any]] | None]:
    """Return the tokens of a context for `build_kv_cache`, and its messages; None if its last turn is open.

    Args:
        template: the model's chat template.
        prompt: a str, or a list of str, which is joined by blank lines, becomes an open system turn; chat messages
            become complete turns.

    Raises:
        EmptyPromptError: the prompt is empty.
    """
    parts: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if all(isinstance(part, str) for part in parts):
        text = "\n\n".join(part for part in parts if part.strip())
        if not text:
            raise EmptyPromptError("the prompt is empty: there is nothing to encode")
        return template.instruction_ids(None) + template.encode_text(text), None
    messages = [dict(message) for message in parts]
    return template.prompt(messages, add_generation_prompt=False).token_ids, messages


def with_tokens(cache: Cache) -> ContextCache:
    """Return the cache if it is a `ContextCache`, which has `token_ids`.

    Raises:
        TokenMismatchError: it is another cache.
    """
    if isinstance(cache, ContextCache):
        return cache
    raise TokenMismatchError(
        f"a {type(cache).__name__} has no token_ids, so it cannot be checked that the prompt begins with its tokens. "
        "Pass a cache from build_kv_cache or get_cache, a MergedContext, or wrap it: "
        "ContextCache.of(layers, token_ids, engine.fingerprint)."
    )


def _continued(
    template: ChatTemplate, context: tuple[int, ...], cached: list[dict[str, Any]], asked: list[Message]
) -> Prompt:
    """Return the prompt that continues the turns of `cached`. `asked` are new messages, or the whole conversation."""
    everything = asked if asked[: len(cached)] == cached else [*cached, *asked]
    closed = template.render(cached, add_generation_prompt=False)
    text = template.render(everything)
    if not text.startswith(closed):  # the template changes earlier turns; the engine reuses the common prefix
        return template.prompt(everything)
    tail = template.encode(text[len(closed) :])
    return Prompt(context, (), tail, thinking=text.rstrip().endswith("<think>"))


def _is_empty(context: Cache | ContextPrompt) -> bool:
    return not (context if isinstance(context, ContextPrompt) else context.get_seq_length())
