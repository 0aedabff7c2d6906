"""A conversation that keeps its cache: each turn prefills its new tokens and nothing else."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvcag.cache.layers import crop, cut, generation_cache, layers_of
from kvcag.chat_template import Message, as_messages
from kvcag.core import Chunk, MergedContext
from kvcag.engines.base import with_tokens
from kvcag.engines.constrain import ConstraintLike
from kvcag.engines.decode import Account, Decoding, Detokenizer, StopStrings, ThinkingFilter, reusable_prefix
from kvcag.engines.hf import HFEngine
from kvcag.engines.sampling import Sampler, Sampling
from kvcag.errors import EmptyPromptError, InvalidInputError, TokenMismatchError, UnsupportedContentError

_ROOM = 512
"""Tokens that a session's cache has room for beyond those of its next turn."""
_CONTEXT = "kvcag-context-3e70a1"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a session.

    Attributes:
        messages: what was said, and the answer.
        prefilled_tokens: tokens that were run before the answer began: the new ones.
        completion_tokens: tokens of the answer.
    """

    messages: tuple[Message, ...]
    prefilled_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class _Segment:
    """Text of the rendered conversation and the tokens that stand for it."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A turn that was asked for, over the segments that were there before."""

    said: list[Message]
    before: tuple[_Segment, ...]
    segments: tuple[_Segment, ...]
    thinking: bool
    settings: Sampling
    budget: int
    started: float


class _Held:
    """A cache and how many sessions read it. Whoever is not alone copies before writing."""

    def __init__(self, cache: DynamicCache, token_ids: list[int]) -> None:
        self.cache, self.token_ids = cache, token_ids
        self.readers = 1


class Session:
    """ModelLock over one running cache. Close it, or use it in a `with` block.

    The conversation is rendered anew each turn. What it has in common with the turn before keeps the tokens it had,
    those that the model itself chose included; only what differs is tokenised and prefilled. A turn whose stream is
    closed before its end, or which fails, is taken back.

    Args:
        engine: the model.
        context: what the conversation stands on: a cache from `build_kv_cache` or `get_cache`, or a `MergedContext`
            of `KVCacheMemory.merge`. It is read, never written.
        tools: shown by the chat template, if it shows tools.

    Attributes:
        turns: what was said so far.
        prefilled_tokens: tokens prefilled by this session, over all turns, those that were rolled back included.
    """

    def __init__(
        self,
        engine: HFEngine,
        context: Cache | MergedContext | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self._engine = engine
        self._tools = tools
        self._opening: list[Message] = []
        self._base = engine.template.bos_ids
        self._within_turn = False
        self._fixed = 0  # tokens of a context that the model could not compute again
        self._segments: tuple[_Segment, ...] = ()
        self._earlier: tuple[tuple[_Segment, ...], ...] = ()
        self._lock = threading.Lock()
        self.turns: tuple[Turn, ...] = ()
        self.prefilled_tokens = 0
        self._held: _Held | None = self._take(context)

    def _take(self, context: Cache | MergedContext | None) -> _Held:
        if context is None or (isinstance(context, Cache) and context.get_seq_length() == 0):
            return _Held(generation_cache([], room=_ROOM), [])
        held = context if isinstance(context, MergedContext) else with_tokens(context)
        token_ids = tuple(held.token_ids.tolist())
        given = reusable_prefix(context, [*token_ids, -1], self._engine.fingerprint)
        self._fixed = 0 if given.is_exact else len(token_ids)
        if isinstance(held, MergedContext) or held.messages is None:
            self._base, self._within_turn = token_ids, True
        else:
            self._opening = list(held.messages)
            text = self._render(self._opening, add_generation_prompt=False)
            self._base, self._segments = (), (_Segment(text, token_ids),)
        return _Held(generation_cache([given.layers], room=_ROOM), list(token_ids))

    # --- what it holds -----------------------------------------------------------------------------------------

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token of the conversation, context and answers included."""
        return self._ids(self._segments)

    @property
    def messages(self) -> list[Message]:
        """The conversation, without what the context holds."""
        return [message for turn in self.turns for message in turn.messages]

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache. The session cannot be used afterwards; its forks can."""
        if self._held is not None:
            self._held.readers -= 1
            self._held = None

    def fork(self) -> Session:
        """A session that goes on from here on its own. The cache is shared until one of the two writes."""
        held = self._open()
        with self._turn():
            twin = copy.copy(self)
            twin._lock = threading.Lock()
            twin.prefilled_tokens = 0
            held.readers += 1
            return twin

    def rollback(self, n_turns: int = 1) -> None:
        """Go back by `n_turns`. What they prefilled and generated is forgotten.

        Raises:
            InvalidInputError: there are fewer turns.
        """
        self._open()
        if not 0 <= n_turns <= len(self.turns):
            raise InvalidInputError(f"there are {len(self.turns)} turns: {n_turns} cannot be taken back")
        with self._turn():
            if n_turns:
                self._segments = self._earlier[-n_turns]
                self._earlier = self._earlier[:-n_turns]
                self.turns = self.turns[:-n_turns]

    # --- turns -------------------------------------------------------------------------------------------------

    def generate(
        self, message: str | Sequence[Message], *, constraint: ConstraintLike | None = None, **sampling: Any
    ) -> str:
        """One turn.

        Args:
            message: what is said: a str for one user message, or messages (tool results, say).
            constraint: what the answer must be; turns with and without one mix.
            **sampling: see `Sampling`.

        Raises:
            ConstraintError: the constraint cannot be used, or nothing that satisfies it fits `max_new_tokens`.
            ContextLengthError: the conversation with `max_new_tokens` exceeds the model's context.
            InvalidInputError: the session is closed, or another turn is running.
        """
        return "".join(chunk.text for chunk in self.stream(message, constraint=constraint, **sampling))

    def stream(
        self, message: str | Sequence[Message], *, constraint: ConstraintLike | None = None, **sampling: Any
    ) -> Generator[Chunk, None, None]:
        """`generate`, piece by piece. Arguments are checked at once; closing the stream takes the turn back.

        Raises:
            EmptyPromptError: there is nothing to answer.
            TokenMismatchError: the template renders a merged context's messages otherwise once something follows them.
            ConstraintError, ContextLengthError, InvalidInputError: as `generate`.
        """
        self._open()
        started = time.perf_counter()
        said = [_flat(each) for each in as_messages(message)]
        if not said:
            raise EmptyPromptError("there is nothing to answer: pass at least one message")
        settings = self._engine.sampling(**sampling)
        segments, thinking = self._continued(said)
        token_ids = self._ids(segments)
        if _agreeing(self.token_ids, token_ids) < self._fixed:
            raise TokenMismatchError(
                "the chat template renders the context's messages otherwise once something follows them, and what was "
                "merged cannot be computed again. Begin the session without a context and say them in its first turn."
            )
        budget = self._engine.check_fits(len(token_ids), settings.max_new_tokens)
        compiled = None if constraint is None else self._engine.constrain(constraint, budget, thinking)
        sampler = Sampler(settings, self._engine.device, compiled.start(budget) if compiled else None)
        asked = _Asked(said, self._segments, segments, thinking, settings, budget, started)
        return self._run(asked, sampler)

    def _run(self, asked: _Asked, sampler: Sampler) -> Generator[Chunk, None, None]:
        engine, settings, token_ids = self._engine, asked.settings, self._ids(asked.segments)
        with self._turn():
            if self._segments is not asked.before:
                raise InvalidInputError("another turn was made since this stream was asked for: ask again")
            held = self._own(token_ids)
            reused = held.cache.get_seq_length()
            decoding = Decoding(
                engine.forward,
                held.cache,
                token_ids,
                max_new_tokens=asked.budget,
                eos_ids=engine.eos_ids,
                sampler=sampler,
                account=Account(asked.started, reused, len(token_ids) - reused),
            )
            decoding.prefill()
            self.prefilled_tokens += len(token_ids) - reused
            held.token_ids = decoding.cached_ids
            thinking_filter = ThinkingFilter(asked.thinking) if settings.strip_thinking else None
            for chunk in decoding.chunks(Detokenizer(engine.tokenizer), StopStrings(settings.stop), thinking_filter):
                held.token_ids = decoding.cached_ids
                yield chunk
            self._keep(asked, tuple(decoding.answer_ids), len(token_ids) - reused)

    def _keep(self, asked: _Asked, answer_ids: tuple[int, ...], prefilled: int) -> None:
        """Add a turn that was said to its end."""
        stop = StopStrings(asked.settings.stop)
        text = stop.push(self._text(answer_ids, skip_special_tokens=True))
        reply: Message = {"role": "assistant", "content": text + ("" if stop.found else stop.flush())}
        self._earlier = (*self._earlier, self._segments)
        self._segments = (*asked.segments, _Segment(self._text(answer_ids, skip_special_tokens=False), answer_ids))
        self.turns = (*self.turns, Turn((*asked.said, reply), prefilled, len(answer_ids)))

    # --- tokens ------------------------------------------------------------------------------------------------

    def _continued(self, said: list[Message]) -> tuple[tuple[_Segment, ...], bool]:
        """The conversation with what is said now: known segments as far as its text begins with them, then new ones.

        Also whether the answer begins within a thinking block.
        """
        text = self._tail_text([*self.messages, *said])
        thinking = text.rstrip().endswith("<think>")
        kept: list[_Segment] = []
        for segment in self._segments:
            if not text.startswith(segment.text):
                break
            kept.append(segment)
            text = text[len(segment.text) :]
        return (*kept, _Segment(text, self._engine.template.encode(text))), thinking

    def _tail_text(self, messages: list[Message]) -> str:
        """The rendered conversation, from where a context that ends within a turn ends."""
        if not self._within_turn:
            return self._render([*self._opening, *messages])
        rest = list(messages)
        closing = ""
        while rest and rest[0]["role"] == "system":
            closing += f"\n\n{rest.pop(0)['content']}"
        framed = self._render([{"role": "system", "content": _CONTEXT + closing}, *rest])
        return framed.partition(_CONTEXT)[2]

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        return self._engine.template.render(messages, tools=self._tools, add_generation_prompt=add_generation_prompt)

    def _ids(self, segments: Sequence[_Segment]) -> tuple[int, ...]:
        return self._base + tuple(token for segment in segments for token in segment.token_ids)

    def _text(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(
            self._engine.tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    # --- the cache ---------------------------------------------------------------------------------------------

    def _own(self, token_ids: Sequence[int]) -> _Held:
        """A cache that is this session's alone, and holds what is known of `token_ids` without the last."""
        held = self._open()
        known_tokens = _agreeing(held.token_ids, token_ids[:-1])
        if held.readers > 1:
            layers = cut(layers_of(held.cache), 0, known_tokens)
            own = _Held(generation_cache([layers], room=len(token_ids) - known_tokens + _ROOM), [])
            held.readers -= 1
            self._held = held = own
        crop(held.cache, known_tokens)
        held.token_ids = list(token_ids[:known_tokens])
        return held

    def _open(self) -> _Held:
        if self._held is None:
            raise InvalidInputError("the session is closed: begin another one, or fork before closing")
        return self._held

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise InvalidInputError("a turn is running: read its stream to the end, or close it")
        try:
            yield
        finally:
            self._lock.release()


def _agreeing(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _flat(message: Message) -> Message:
    """The message with its content as one text."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return {**message, "content": content or ""}
    parts = [part if isinstance(part, str) else part.get("text") for part in content]
    if None in parts:
        raise UnsupportedContentError("a session reads text alone: pass {'type': 'text', 'text': …} parts")
    return {**message, "content": "".join(map(str, parts))}
