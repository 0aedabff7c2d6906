"""Sampling: the settings of a generation, and the choice of each token with transformers' logits processors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from kvcag.chat_template import check_unicode
from kvcag.errors import InvalidInputError

if TYPE_CHECKING:
    from kvcag.engines.constrain import Enforcement

DEFAULT_MAX_NEW_TOKENS = 512

_FINE = 1e-6
"""The smallest temperature and penalty: logits in float32 that are divided by less may become infinite."""
_RANGE = "from 1e-6 to 1e6"


@dataclass(frozen=True, slots=True)
class Sampling:
    """The settings of one generation. Greedy unless `temperature` is above 0.

    Attributes:
        max_new_tokens: the most tokens to generate. None: 512, or as many as still fit the model's context.
        temperature: 0 is greedy.
        top_k: sample from the k likeliest tokens.
        top_p: sample from the likeliest tokens that together reach this probability.
        min_p: sample from tokens that are at least this likely, relative to the likeliest.
        repetition_penalty: values above 1 make tokens of the prompt and of the answer so far less likely.
        seed: makes a sampled answer repeatable. None: a new seed for each answer.
        stop: strings that end the answer; they are not part of it.
        strip_thinking: leave `<think>…</think>` out of the text.
        top_logprobs: give each token's log-probability, and those of so many of the likeliest tokens at its place, as
            the model has them before any of these settings applies. None: give none.

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
        """From keyword arguments, including the spellings of MemOS and transformers.

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
            raise InvalidInputError(f"unknown argument {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**settings)

    @classmethod
    def over(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Sampling:
        """From keyword arguments, and from defaults for those that are not given.

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


class Sampler:
    """Chooses tokens for one generation.

    Args:
        sampling: the settings.
        device: the device of the logits.
        constraint: masks forbidden tokens before temperature, top_k, top_p and min_p apply, and may replace the choice.
    """

    def __init__(
        self,
        sampling: Sampling,
        device: torch.device,
        constraint: Enforcement | None = None,
    ) -> None:
        self._constraint = constraint
        self._device = device
        self._greedy = sampling.greedy
        self._top_logprobs = sampling.top_logprobs
        self._generator: torch.Generator | None = None
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty not in (None, 1.0):
            self._processors.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        self._reads_history = bool(self._processors)
        if constraint is not None:
            self._processors.append(constraint)
        if not sampling.greedy:
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)
            self._processors.extend(_warpers(sampling))

    def choose(self, logits: torch.Tensor, token_ids: Sequence[int]) -> int:
        """Choose the next token.

        Args:
            logits: floating point, `(1, vocabulary)`.
            token_ids: the prompt and the answer so far.
        """
        return self.take(int(self.draw(logits, self.history(token_ids))))

    def draw(self, logits: torch.Tensor, history: torch.Tensor | None) -> torch.Tensor:
        """The next token, `(1,)` int64, where the logits are. Nothing waits for the device, without a constraint.

        Args:
            logits: `(1, vocabulary)`.
            history: prompt and answer so far, `(1, tokens)` int64, or None where `history` gave None.
        """
        scores = logits.float()
        if self._processors:
            scores = self._processors(history, scores)  # type: ignore[arg-type]
        if self._greedy:
            return scores.argmax(-1)
        # What torch.multinomial does for one draw, which waits for the device to check its input.
        probabilities = scores.softmax(-1)
        noise = torch.empty_like(probabilities).exponential_(1, generator=self._generator)
        return (probabilities / noise).argmax(-1)

    @property
    def takes_likeliest(self) -> bool:
        """Whether each token is the likeliest one of the logits as they are."""
        return self._greedy and not self._processors

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Log-probabilities of every token, `(vocabulary,)` float32, where the logits are; None if none are given."""
        return None if self._top_logprobs is None else logits[0].float().log_softmax(-1)

    def scored(self, logprobs: torch.Tensor | None, token: int) -> tuple[tuple[int, float], ...]:
        """The token and its log-probability, and then those of the likeliest tokens."""
        if logprobs is None:
            return ()
        best = logprobs.topk(min(self._top_logprobs or 0, len(logprobs)))
        likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return (token, float(logprobs[token])), *likeliest

    def history(self, token_ids: Sequence[int]) -> torch.Tensor | None:
        """The tokens so far as `draw` takes them: None where the settings do not look at them."""
        return torch.tensor([token_ids], dtype=torch.long, device=self._device) if self._reads_history else None

    @property
    def waits(self) -> bool:
        """Whether a token has to be read, and handed to `take`, before the next can be drawn."""
        return self._constraint is not None

    def take(self, token: int) -> int:
        """Tell the constraint which token was drawn. Returns the one that it puts in its place, if it does."""
        return token if self._constraint is None else self._constraint.take(token)

    @property
    def complete(self) -> bool:
        """Whether the answer satisfies its constraint and only an end-of-sequence token may follow."""
        return self._constraint is not None and self._constraint.complete


def _warpers(sampling: Sampling) -> list[hf.LogitsProcessor]:
    """Logits processors in the order in which `transformers.generate` applies them."""
    warpers: list[hf.LogitsProcessor] = []
    if sampling.temperature != 1.0:
        warpers.append(hf.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        warpers.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(hf.MinPLogitsWarper(sampling.min_p))
    return warpers


def _check(name: str, value: Any, holds: Any, wanted: str, kinds: Any = int | float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, kinds) or not holds(value):
        raise InvalidInputError(f"{name} must be {wanted}, not {value!r}")
