"""Generation: each answer prefills its uncached tokens, and then decodes one token per step into its own cache.

A decode step reads all weights for one token, so concurrent answers take their steps as a batch (`Steps`). An answer
asks for its next step and continues with the text it has. When it needs the step, its reader's thread waits for the
other answers and takes the step for all that asked. The thread waits as long as more answers ask, or the device is busy
with the previous step, so a slow or absent reader delays the others only by milliseconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakSet

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.cache_utils import Cache
from transformers.generation import logits_process

from kvcag.cache.layers import Layers, cut, layers_of, length_of, states_of
from kvcag.cache.prefix_cache import PrefixCache, agreeing
from kvcag.chat_template import Prompt
from kvcag.concurrency import CANCELLATION, Cancellation, cancellation
from kvcag.core import Chunk, ContextPrompt, FinishReason, MergedContext, MergeReport, ReadTail, TokenScore, Usage
from kvcag.engines.base import Sampling, with_tokens
from kvcag.errors import FingerprintMismatchError, TokenMismatchError, UnsupportedModelError
from kvcag.fingerprint import ModelFingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvcag.engines.constrain import Enforcement

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction of the token after those of a pass.

    Attributes:
        logits: `(1, vocabulary)`.
        likeliest: the token with the highest logit, int64 `(1,)`, on the logits' device; None if the pass did not
            compute it.
        arriving: the same token on its way to the host, in a batch of tokens.
        row: the token's index in this batch.
    """

    logits: torch.Tensor
    likeliest: torch.Tensor | None = None
    arriving: Arriving | None = None
    row: int = 0

    @property
    def is_there(self) -> bool:
        """Whether the device has finished the pass."""
        return self.arriving is None or self.arriving.is_there


Forward = Callable[["Sequence[int] | torch.Tensor", Cache], Prediction]
"""Runs tokens over a cache, which grows by them. A tensor, int64 `(1,)`, is one token that is still on the device."""

Ask = Callable[..., "Pending"]
"""Asks for a step: `ask(token, cache, now=…)`, with a token as in `Forward` and the generation's own cache. With `now`,
the step is launched at once if all running answers have asked, instead of when its result is needed."""


@dataclass(frozen=True, slots=True)
class Account:
    """The part of a generation's usage that is known before it starts.

    Attributes:
        started: the time of the call, by `time.perf_counter()`.
        cached_tokens: prompt tokens whose keys and values are reused.
        created_tokens: prompt tokens that are encoded and cached.
        context: how the documents' context was made.
    """

    started: float
    cached_tokens: int
    created_tokens: int
    context: MergeReport | None = None

    @classmethod
    def of(cls, prompt: Prompt, report: MergeReport | None, prefix: KnownPrefix, kept: int, started: float) -> Account:
        """Compute the account of a prompt.

        Args:
            prompt: the prompt.
            report: how its context was made, which may have computed some of the prefix. None: there are no documents,
                or they are read in order, or the prefix was merged for an earlier question.
            prefix: the reused beginning of the prompt.
            kept: how many of the other prompt tokens are cached afterwards.
            started: the time of the call.
        """
        reused = prefix.length
        if report is not None:
            cached, created = max(0, reused - report.paid_tokens), report.encoded_tokens + kept
            return cls(started, cached, created, _with_seams(report, prompt.seams))
        if prompt.document_ids or prefix.is_merged:
            size = len(prompt.context_ids) or reused
            found = min(reused, size)
            if prefix.is_merged:
                reason = f"merged for an earlier question, {reused:,} tokens reused"
                report = MergeReport("merged", "reused", size, found, 0, size - found, reason)
            else:
                report = MergeReport("prefix" if found else "encoded", "exact", size, found, 0, size - found)
        return cls(started, reused, kept, report and _with_seams(report, prompt.seams))


def _with_seams(report: MergeReport, seams: int) -> MergeReport:
    """Add to the report's reason that some of the prompt's tokens differ from those of the joined text."""
    if not seams:
        return report
    said = (
        f"{seams} {'place' if seams == 1 else 'places'} between documents tokenised otherwise than in the joined text: "
        "begin and end each document with a line break, or use strategy='exact'"
    )
    return replace(report, reason=f"{report.reason}; {said}" if report.reason else said)


class Decoding:
    """The state of one generation.

    Args:
        forward: runs the model.
        ask: asks for a step, which may be taken as a batch with other generations.
        cache: the generation's own cache, with the first `cache.get_seq_length()` tokens of the prompt.
        prompt_ids: the whole prompt.
        max_new_tokens: the most tokens to generate.
        eos_ids: the tokens that end an answer.
        sampler: chooses each token.
        account: the known part of the usage.
    """

    def __init__(
        self,
        forward: Forward,
        ask: Ask,
        cache: Cache,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        sampler: Sampler,
        account: Account,
    ) -> None:
        self._forward, self._ask = forward, ask
        self.cache = cache
        self.prompt_ids = list(prompt_ids)
        self.answer_ids: list[int] = []
        self._max_new_tokens = max_new_tokens
        self._eos_ids = eos_ids
        self._sampler = sampler
        self._account = account
        self._first_token_at: float | None = None
        self._predicted: Prediction | None = None
        self._scored: tuple[tuple[int, float], ...] = ()

    @property
    def cached_ids(self) -> list[int]:
        """The tokens in the cache: the prompt after the prefill, and the answer, often without its last token."""
        return [*self.prompt_ids, *self.answer_ids][: self.cache.get_seq_length()]

    def prefill(self, predicted: Prediction | None = None) -> Prediction:
        """Prefill the prompt's tokens that are not in the cache, unless the prediction after them is passed."""
        self._predicted = predicted or self._forward(self.prompt_ids[self.cache.get_seq_length() :], self.cache)
        return self._predicted

    def tokens(self) -> Iterator[int]:
        """Yield tokens until an end-of-sequence token, which is included, or until the constraint or budget ends.

        On a GPU the next step is launched before the last token is read, unless a constraint needs the token first. The
        cache may then include the last token of the answer.
        """
        predicted = self._predicted or self.prefill()
        history = self._sampler.history(self.prompt_ids)
        ahead = predicted.logits.is_cuda and not self._sampler.waits
        step: Pending | None = None
        try:
            while True:
                if self._sampler.takes_likeliest and predicted.likeliest is not None and predicted.arriving is not None:
                    drawn, arriving, row = predicted.likeliest, predicted.arriving, predicted.row
                else:
                    drawn = self._sampler.draw(predicted.logits, history)
                    arriving, row = Arriving(drawn), 0
                logprobs = self._sampler.logprobs(predicted.logits)
                last = len(self.answer_ids) + 1 == self._max_new_tokens
                if ahead and not last:
                    step = self._ask(drawn, self.cache, now=True)
                token = self._sampler.take(arriving.token(row))
                self._scored = self._sampler.scored(logprobs, token)
                if history is not None:
                    history = torch.cat([history, history.new_full((1, 1), token)], dim=1)
                self.answer_ids.append(token)
                self._first_token_at = self._first_token_at or time.perf_counter()
                ends = last or token in self._eos_ids or self._sampler.complete
                if not ahead and not ends:
                    step = self._ask([token], self.cache, now=False)
                yield token
                if ends or step is None:
                    return
                predicted = step.get()
        finally:
            if step is not None:
                step.leave()

    def chunks(self, detokenizer: Detokenizer, stop: StopStrings, thinking: ThinkingFilter) -> Iterator[Chunk]:
        """Yield the answer as text, one chunk per token. The last chunk has the finish reason and the usage."""
        finish: FinishReason = "length"
        for token in self.tokens():
            if token in self._eos_ids:
                finish = "stop"
                break
            text = stop.push(thinking.push(detokenizer.push(token)))
            scores = tuple(TokenScore(detokenizer.text_of(id), logprob) for id, logprob in self._scored)
            if stop.found:
                yield Chunk(text, (token,), "stop", self.usage(), thinking.take(), scores)
                return
            yield Chunk(text, (token,), thinking=thinking.take(), scores=scores)
            finish = "stop" if self._sampler.complete else "length"
        text = stop.push(thinking.push(detokenizer.flush()) + thinking.flush())
        text += "" if stop.found else stop.flush()
        yield Chunk(text, (), "stop" if stop.found else finish, self.usage(), thinking.take())

    def usage(self) -> Usage:
        """Return the usage so far."""
        now = time.perf_counter()
        account = self._account
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=account.cached_tokens,
            created_tokens=account.created_tokens,
            completion_tokens=len(self.answer_ids),
            ttft_s=(self._first_token_at or now) - account.started,
            total_s=now - account.started,
            context=account.context,
        )


class Arriving:
    """Tokens on their way from the device, int64 `(tokens,)`. Later launches do not delay their copy."""

    def __init__(self, drawn: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tokens = drawn
        self._arrived: list[int] | None = None
        self._lock = threading.Lock()
        if drawn.is_cuda:
            self._tokens = torch.empty(len(drawn), dtype=drawn.dtype, pin_memory=True).copy_(drawn, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def is_there(self) -> bool:
        """Whether the tokens have arrived."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def token(self, row: int = 0) -> int:
        """Wait for the tokens, and return one of them."""
        if self._arrived is None:
            with self._lock:  # one thread polls the device; the others sleep
                if self._arrived is None:
                    if self._event is not None:
                        self._event.synchronize()
                    self._arrived = self._tokens.tolist()
        return self._arrived[row]


# --- steps of several generations ----------------------------------------------------------------------------------

_PATIENCE = 0.003
"""The step is taken when no further answer has asked for a step for this many seconds."""

Together: TypeAlias = Callable[[list[Any], list[Cache]], "Sequence[Prediction]"]
"""Runs one token, as in `Forward`, over each cache, in one pass. After an error, each step is taken alone."""


class Alone:
    """A step that is not part of a batch.

    Args:
        forward: runs the model.
        token: as in `Forward`.
        cache: the answer's cache.
        now: take the step now, instead of when its result is needed.
    """

    def __init__(self, forward: Forward, token: Any, cache: Cache, *, now: bool) -> None:
        self._forward, self._token, self._cache = forward, token, cache
        self._prediction = forward(token, cache) if now else None

    def get(self) -> Prediction:
        """Return the step's prediction. Takes the step if it was not taken yet."""
        return self._prediction or self._forward(self._token, self._cache)

    def leave(self) -> None:
        """Do nothing: no other answer waits for this step."""


class _Step:
    """A step that is taken in a batch with those of other answers."""

    def __init__(self, steps: Steps, token: Any, cache: Cache) -> None:
        self.steps, self.token, self.cache = steps, token, cache
        self.prediction: Prediction | None = None
        self.alone = False
        self._woken = threading.Lock()  # lighter than an Event: there are many threads, and one interpreter lock
        self._woken.acquire()

    def get(self) -> Prediction:
        """Return the step's prediction. Takes the step if it was not taken yet.

        Raises:
            Cancelled: the reader left while this thread waited.
        """
        return self.prediction or self.steps.take(self)

    def leave(self) -> None:
        """Tell the others that this answer needs no further step."""
        self.steps.leave(self)

    def wake(self) -> None:
        """End the current `wait`, or the next one."""
        with suppress(RuntimeError):  # the thread is awake already
            self._woken.release()

    def wait(self, seconds: float = -1) -> None:
        """Wait until `wake` is called, or for `seconds`."""
        self._woken.acquire(timeout=seconds)


Pending: TypeAlias = Alone | _Step
"""A step that a generation asked for: one token over its cache."""


class Steps:
    """Takes the steps of several answers as a batch. Each answer may be read in its own thread, or several in one.

    One of the waiting threads, the leader, takes the step for all.

    Args:
        exclusive: holds the model for one thread.
        alone: takes the step of one answer.
        together: takes a step of at least two answers.
        most: the most answers of a step.
    """

    def __init__(
        self, exclusive: Callable[[], AbstractContextManager[Any]], alone: Forward, together: Together, most: int
    ) -> None:
        self._exclusive, self._alone, self._together, self._most = exclusive, alone, together, most
        self._lock = threading.Lock()
        self._waiting: list[_Step] = []
        self._missing: WeakSet[Cache] = WeakSet()  # caches of running answers that did not ask for a step yet
        self._leader: _Step | None = None  # whose thread takes the next step
        self._last: Prediction | None = None

    def ask(self, token: Any, cache: Cache, *, now: bool) -> Pending:
        """Ask for a step of one answer.

        Args:
            token: as in `Forward`.
            cache: the answer's cache.
            now: take the step now if all running answers have asked. Else it is taken when an answer needs it.
        """
        mine = _Step(self, token, cache)
        with self._lock:
            self._waiting.append(mine)
            self._missing.discard(cache)
            here = self._all_are_here()
            if here and self._leader is not None:
                self._leader.wake()
            elif here and now:
                self._leader = mine
        if self._leader is mine:
            try:
                self._lead(mine)
            except BaseException:
                self.leave(mine)
                raise
        return mine

    def take(self, mine: _Step) -> Prediction:
        """Return the step's prediction, after this thread or another took the step."""
        left = cancellation()
        with left.waking(mine.wake):
            while True:
                with self._lock:
                    if mine not in self._waiting and (mine.alone or mine.prediction is not None):
                        break
                    if mine in self._waiting:
                        left.check()
                        if self._leader is None:
                            self._leader = mine
                if self._leader is mine:
                    self._gather(mine, left)
                    self._lead(mine)
                else:
                    mine.wait()
        return self._alone(mine.token, mine.cache) if mine.prediction is None else mine.prediction

    def leave(self, mine: _Step) -> None:
        """Remove an answer that has ended, or whose reader has left."""
        with self._lock:
            self._missing.discard(mine.cache)
            if mine in self._waiting:
                self._waiting.remove(mine)
            if self._leader is not None and self._all_are_here():
                self._leader.wake()

    def _all_are_here(self) -> bool:
        return not self._missing or len(self._waiting) >= self._most

    def _gather(self, mine: _Step, left: Cancellation) -> None:
        """Wait for the other running answers to ask for a step, but not much longer than the device is busy."""
        came = 0
        try:
            while True:
                with self._lock:
                    if self._all_are_here():
                        return
                    busy = self._last is not None and not self._last.is_there
                    if len(self._waiting) == came and not busy:
                        self._missing.clear()
                        return
                    came = len(self._waiting)
                mine.wait(_PATIENCE)
                left.check()
        except BaseException:
            self._hand_over(mine)
            raise

    def _lead(self, mine: _Step) -> None:
        """Take the step for all waiting answers."""
        try:
            with self._exclusive():
                with self._lock:
                    others = [step for step in self._waiting if step is not mine][: self._most - 1]
                    steps = [mine, *others]
                    self._waiting = [step for step in self._waiting if step not in steps]
                    self._missing.update(step.cache for step in steps)
                if others:
                    self._take_together(steps)
                else:
                    mine.alone = True
                    mine.prediction = self._last = self._alone(mine.token, mine.cache)
        finally:
            self._hand_over(mine)

    def _take_together(self, steps: list[_Step]) -> None:
        token = CANCELLATION.set(Cancellation())  # one reader must not cancel the others' step
        try:
            taken = self._together([step.token for step in steps], [step.cache for step in steps])
            for step, prediction in zip(steps, taken, strict=True):
                step.prediction = self._last = prediction
        except Exception:  # the boundary: each step is then taken alone, and an error reaches only its own answer
            _log.warning("a step of %d answers failed; each is taken alone", len(steps), exc_info=True)
        finally:
            CANCELLATION.reset(token)
            for step in steps:
                step.alone = step.prediction is None
                step.wake()

    def _hand_over(self, mine: _Step) -> None:
        """Wake the waiting threads, one of which becomes the leader."""
        with self._lock:
            self._leader = None
            for step in self._waiting:
                step.wake()


# --- tokens as text ------------------------------------------------------------------------------------------------

_OPEN, _CLOSE = "<think>", "</think>"


class Detokenizer:
    """Turns tokens into text one by one. A character is returned when all of its bytes have come.

    It decodes a short window that overlaps the tokens before, since a token's text depends on its neighbours (leading
    spaces, bytes of one character), and never decodes the whole answer again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._window = 0  # where decoding starts
        self._given = 0  # tokens whose text was returned

    def push(self, token_id: int) -> str:
        """Add a token, and return the new text; empty while a character is incomplete."""
        self._token_ids.append(token_id)
        text = self._pending()
        if text.endswith("\ufffd"):
            return ""
        self._window, self._given = self._given, len(self._token_ids)
        return text

    def text_of(self, token_id: int) -> str:
        """Return the text of one token by itself; U+FFFD for a part of a character."""
        return self._decode([token_id])

    def flush(self) -> str:
        """Return the rest of the text at the end of the answer; an incomplete character becomes U+FFFD."""
        text = self._pending()
        self._window = self._given = len(self._token_ids)
        return text

    def _pending(self) -> str:
        before = self._decode(self._token_ids[self._window : self._given])
        return self._decode(self._token_ids[self._window :])[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopStrings:
    """Cuts a text at the first of several strings, and holds back text that may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text, and return the text that is certainly before a stop string. Sets `found` after a stop string."""
        text = self._held + text
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


class ThinkingFilter:
    """Removes `<think>…</think>` and the blank lines after it from a text.

    Args:
        thinking: the text begins inside a thinking block, because the generation prompt opened one.
        strips: False leaves the text unchanged.
    """

    def __init__(self, thinking: bool, *, strips: bool = True) -> None:
        self._thinking = thinking
        self._strips = strips
        self._held = ""
        self._trim = False
        self._thought = ""

    def take(self) -> str:
        """Return the removed text since the last call."""
        thought, self._thought = self._thought, ""
        return thought

    def push(self, text: str) -> str:
        """Add text, and return the part that is not thinking."""
        if not self._strips:
            return text
        self._held += text
        out = ""
        while True:
            tag = _CLOSE if self._thinking else _OPEN
            before, found, after = self._held.partition(tag)
            if not found:
                keep = overlap(self._held, tag)
                before, self._held = (
                    self._held[: len(self._held) - keep],
                    self._held[len(self._held) - keep :],
                )
                return out + self._visible(before)
            out += self._visible(before)
            self._held = after
            self._thinking = not self._thinking
            self._trim = not self._thinking

    def flush(self) -> str:
        """Return the text that was held back and did not become a tag."""
        held, self._held = self._held, ""
        return self._visible(held)

    def _visible(self, text: str) -> str:
        if self._thinking:
            self._thought += text
            return ""
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        return text


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are a proper prefix of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


# --- reusable prefixes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KnownPrefix:
    """The beginning of a prompt whose keys and values are known.

    Attributes:
        length: the number of tokens.
        pieces: their keys and values, in consecutive pieces, only to be read.
        is_merged: the keys and values are approximate, and so are those generated after them.
        report: how the context was made, if a `MergedContext` was passed.
        read: the prefilled rest of the prompt, if the merge prefilled it.
    """

    length: int = 0
    pieces: list[Layers] = field(default_factory=list)
    is_merged: bool = False
    report: MergeReport | None = None
    read: ReadTail | None = None

    def longest(self, prefixes: PrefixCache, token_ids: Sequence[int], namespace: str, *, merged: bool) -> KnownPrefix:
        """Return this prefix, or a longer one from the recent contexts; with `merged`, merged contexts count too."""
        known = [self]
        if not self.is_merged:
            known.append(KnownPrefix(*prefixes.match(token_ids, namespace)))
        if merged:
            known.append(KnownPrefix(*prefixes.match(token_ids, namespace, merged=True), is_merged=True))
        return max(known, key=lambda prefix: prefix.length)  # of equal lengths, the first


def reusable_prefix(
    past_key_values: Cache | MergedContext | ContextPrompt | None,
    token_ids: Sequence[int],
    fingerprint: ModelFingerprint,
) -> KnownPrefix:
    """Return the part of a context that the prompt begins with, without the prompt's last token, which must be run.

    Raises:
        FingerprintMismatchError: another model made the context.
        TokenMismatchError: the context has no `token_ids` or other tokens than its `token_ids`, or the prompt does not
            begin with its tokens.
        UnsupportedModelError: the context is a server's.
    """
    if past_key_values is None:
        return KnownPrefix()
    if isinstance(past_key_values, ContextPrompt):
        raise UnsupportedModelError("a server's context has no keys and values. Pass it to that server's engine.")
    report, exact, read = None, True, None
    if isinstance(past_key_values, MergedContext):
        report, cache, held = past_key_values.report, past_key_values.cache, past_key_values.token_ids
        made_by, exact = past_key_values.fingerprint, report.mode != "merged"
        if np.array_equal(torch.cat([held, past_key_values.tail_ids]).cpu().numpy(), token_ids):
            read = past_key_values.read
    elif past_key_values.get_seq_length() == 0:
        return KnownPrefix()
    else:
        own = with_tokens(past_key_values)
        cache, held, made_by, exact = own, own.token_ids, own.fingerprint, own.is_exact
    if not fingerprint.matches(made_by):
        raise FingerprintMismatchError("the cache", fingerprint.differences(made_by))
    if cache.get_seq_length() != len(held):
        raise TokenMismatchError(
            f"the cache has {cache.get_seq_length()} tokens, but its token_ids {len(held)}: something was generated "
            "into it, or it was cut. Pass the cache as it was made; generate() never writes into it."
        )
    common = agreeing(held.cpu().numpy(), np.asarray(token_ids, dtype=np.int64))
    if common == 0 or (common < len(held) and not exact):
        raise TokenMismatchError(
            f"the prompt agrees with the context's token_ids only in its first {common} of {len(held)} tokens. "
            "Begin the prompt with context.token_ids."
        )
    layers = layers_of(cache)
    usable = cut(layers, 0, min(common, len(token_ids) - 1))
    if states_of(layers) is not None and states_of(usable) is None:  # recurrent layers cannot continue from its middle
        return KnownPrefix(is_merged=not exact, report=report)
    return KnownPrefix(length_of(usable), [usable] if usable else [], not exact, report, read)


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
            self._processors.append(logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
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

    def draw(self, logits: torch.Tensor, history: torch.Tensor | None) -> torch.Tensor:
        """Draw the next token, int64 `(1,)`, on the logits' device. Without a constraint, this does not wait for it.

        Args:
            logits: `(1, vocabulary)`.
            history: prompt and answer so far, int64 `(1, tokens)`, or None, from `history`.
        """
        scores = logits.float()
        if self._processors:
            scores = self._processors(history, scores)  # type: ignore[arg-type]
        if self._greedy:
            return scores.argmax(-1)
        # The same as torch.multinomial for one draw, but without its check of the input, which waits for the device.
        probabilities = scores.softmax(-1)
        noise = torch.empty_like(probabilities).exponential_(1, generator=self._generator)
        return (probabilities / noise).argmax(-1)

    @property
    def takes_likeliest(self) -> bool:
        """Whether each token is the likeliest one of the unchanged logits."""
        return self._greedy and not self._processors

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Return the log-probability of every token, fp32 `(vocabulary,)`; None unless the settings ask for them."""
        return None if self._top_logprobs is None else logits[0].float().log_softmax(-1)

    def scored(self, logprobs: torch.Tensor | None, token: int) -> tuple[tuple[int, float], ...]:
        """Return the token with its log-probability, then the likeliest tokens with theirs."""
        if logprobs is None:
            return ()
        best = logprobs.topk(min(self._top_logprobs or 0, len(logprobs)))
        likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return (token, float(logprobs[token])), *likeliest

    def history(self, token_ids: Sequence[int]) -> torch.Tensor | None:
        """Return the tokens so far for `draw`, int64 `(1, tokens)`; None if the settings do not depend on them."""
        return torch.tensor([token_ids], dtype=torch.long, device=self._device) if self._reads_history else None

    @property
    def waits(self) -> bool:
        """Whether a token must be read from the device and passed to `take` before the next can be drawn."""
        return self._constraint is not None

    def take(self, token: int) -> int:
        """Pass the drawn token to the constraint. Returns this token, or another one that the constraint needs."""
        return token if self._constraint is None else self._constraint.take(token)

    @property
    def complete(self) -> bool:
        """Whether the answer satisfies its constraint and only an end-of-sequence token may follow."""
        return self._constraint is not None and self._constraint.complete


def _warpers(sampling: Sampling) -> list[logits_process.LogitsProcessor]:
    """Return the logits processors, in the order of `transformers.generate`."""
    warpers: list[logits_process.LogitsProcessor] = []
    if sampling.temperature != 1.0:
        warpers.append(logits_process.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        warpers.append(logits_process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        warpers.append(logits_process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(logits_process.MinPLogitsWarper(sampling.min_p))
    return warpers
