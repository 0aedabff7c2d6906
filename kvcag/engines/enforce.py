"""Constraints compiled, and enforced on one generation after another.

Over llguidance (Moskal et al.), which masks the tokens that the grammar forbids. On top of it, budget-aware closing:
a way to end the grammar within the tokens that are left is known at every step, and a token after which there would be
none is replaced by the next of that way. So what comes out is always valid.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from kvcag.engines.constrain import (
    Choices,
    ConstraintLike,
    Grammar,
    JsonSchema,
    Regex,
    close_objects,
    lark_literal,
)
from kvcag.errors import ConstraintBudgetError, ConstraintError, EngineError, MissingExtraError

try:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer
    from llguidance.numpy import allocate_token_bitmask

    from kvcag.engines.closing import Alphabet, Closing
    from kvcag.engines.hints import hints
except ModuleNotFoundError:
    raise MissingExtraError("constrained generation", "structured") from None

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions
    from transformers import PreTrainedTokenizerBase

_COMPILED = 128
"""Grammars kept per tokenizer; the least recently used goes first."""


class Constraint:
    """A compiled grammar over one tokenizer. Made by `HFEngine.constrain`; may be used for many generations.

    Attributes:
        shortest: the tokens of the shortest output that was found; where a budget is too small for it, `check_fits`
            looks harder for a shorter one.
    """

    def __init__(self, matcher: LLMatcher, closing: Closing, alphabet: Alphabet, vocabulary: int) -> None:
        self._matcher, self._closing, self._alphabet, self._vocabulary = matcher, closing, alphabet, vocabulary
        self._searched = False
        search = closing.copy()
        way = search.quick()
        if way is None and not search.exhausted:
            way, self._searched = search.shortest(), True
        tokens = None if way is None else alphabet.tokens(way)
        if way is None or tokens is None:
            raise ConstraintError(
                "no text satisfies the constraint (none was found): it matches nothing, or never ends. Check for "
                "contradictions, and for a rule that only calls itself."
            )
        self._way, self.shortest = way, tuple(tokens)

    def check_fits(self, max_new_tokens: int) -> None:
        """Refuse a budget that no output fits.

        Raises:
            ConstraintBudgetError: it says how many tokens the shortest output needs.
        """
        if len(self.shortest) > max_new_tokens and not self._searched:
            way = self._closing.copy().shortest()
            tokens = None if way is None else self._alphabet.tokens(way)
            if way is not None and tokens is not None and len(tokens) < len(self.shortest):
                self._way, self.shortest = way, tuple(tokens)
            self._searched = True
        if len(self.shortest) > max_new_tokens:
            raise ConstraintBudgetError(len(self.shortest), max_new_tokens)

    def accepts(self, token_ids: Sequence[int]) -> bool:
        """Whether an answer of these tokens satisfies it."""
        symbols = [symbol for token in token_ids for symbol in self._alphabet.spell(token)]
        return self._closing.copy().ends_with(symbols)

    def start(self, max_new_tokens: int) -> Enforcement:
        """Enforce it on one generation.

        Raises:
            ConstraintBudgetError: no output fits `max_new_tokens`.
        """
        self.check_fits(max_new_tokens)
        matcher, closing = self._matcher.deep_copy(), self._closing.copy()
        return Enforcement(matcher, closing, self._alphabet, self._vocabulary, self._way, max_new_tokens)


class Enforcement:
    """One generation's state in a grammar.

    A transformers logits processor: called with `(input_ids, scores)`, it masks what the grammar forbids. The token
    chosen from those scores is then handed to `take`.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        closing: Closing,
        alphabet: Alphabet,
        vocabulary: int,
        way: list[int],
        max_new_tokens: int,
    ) -> None:
        self._matcher, self._closing, self._alphabet = matcher, closing, alphabet
        self._way = way
        self._counts: list[int] | None = None  # the fewest tokens from each symbol of the way on, once it matters
        self._left = max_new_tokens
        self._vocabulary = vocabulary
        self._mask = allocate_token_bitmask(1, vocabulary)
        # Taken once: numpy's way to an address costs as much as a simple mask. It lives as long as `_mask`.
        self._address = self._mask.ctypes.data

    @property
    def complete(self) -> bool:
        """Whether the text satisfies the grammar and nothing may follow it."""
        return bool(self._matcher.is_stopped())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(1, vocabulary)` with -inf for each token that the grammar forbids."""
        self._matcher.unsafe_compute_mask_ptr(self._address, self._mask.nbytes)
        if self._matcher.is_error():
            raise EngineError(f"the grammar cannot go on: {_reason(self._matcher.get_error())}")
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little", count=self._vocabulary)
        allowed = torch.from_numpy(bits.view(np.bool_))
        beyond = scores.shape[-1] - self._vocabulary  # a model may have logits for tokens that nobody has
        if beyond > 0:
            allowed = torch.nn.functional.pad(allowed, (0, beyond))
        # `where` takes a third of the time of `masked_fill`
        return torch.where(allowed[: scores.shape[-1]].to(scores.device), scores, -torch.inf)

    def take(self, token: int) -> int:
        """Go on with the token, or with another if the grammar could not be closed in time after it.

        Returns:
            The token to go on with.
        """
        self._left -= 1
        if token not in self._alphabet.end_ids:
            symbols = self._closing.advance(token)
            way = self._way_on(symbols)
            if way is None:
                self._closing.retract(symbols)
                token = self._steer()
            else:
                self._way = way
        if not self._matcher.consume_token(token):
            raise EngineError(f"the grammar refused token {token}: {_reason(self._matcher.get_error())}")
        return token

    def _steer(self) -> int:
        """The next token of the known way, or the end where the grammar has got there."""
        if not self._way:
            return self._alphabet.end_id
        tokens = self._alphabet.tokens(self._way)
        assert tokens  # ways that the vocabulary cannot spell are not kept
        self._way = self._way[len(self._closing.advance(tokens[0])) :]
        self._counts = None
        return tokens[0]

    def _way_on(self, symbols: tuple[int, ...]) -> list[int] | None:
        """How the grammar can end, after these symbols, within the tokens that are left."""
        way, counts = self._way, self._counts
        if tuple(way[: len(symbols)]) == symbols:
            way, counts = way[len(symbols) :], counts and counts[len(symbols) :]
        elif not self._closing.ends_with(way):
            found = self._closing.quick()
            if found is None:
                return None
            way, counts = found, None
        if len(way) > self._left:  # a symbol is a token at most
            counts = counts or self._alphabet.counts(way)
            if counts[0] > self._left:
                return None
        self._counts = counts
        return way


class Grammars:
    """Compiles constraints for one tokenizer, and keeps them. Safe to use from several threads.

    Args:
        tokenizer: a fast tokenizer.
        vocabulary: the model's vocabulary, which may be larger than the tokenizer's.
        eos_ids: the tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos_ids: Sequence[int]) -> None:
        self._vocabulary = max(vocabulary, len(tokenizer))
        first = [tokenizer.eos_token_id] if tokenizer.eos_token_id in eos_ids else []
        ends = first + [token for token in sorted(eos_ids) if token not in first]
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConstraintError(f"constraints need a fast tokenizer, and {type(tokenizer).__name__} is none")
        self._tokenizer = from_tokenizer(tokenizer, n_vocab=self._vocabulary, eos_token=ends or None)
        self._alphabet = Alphabet(tokenizer, self._tokenizer)
        self._compiled: OrderedDict[str, Constraint] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, constraint: ConstraintLike, *, thinking: bool = False) -> Constraint:
        """A constraint, compiled or found among those compiled before.

        Args:
            constraint: what the answer must be.
            thinking: the answer begins within a thinking block; the constraint holds after it is closed.

        Raises:
            ConstraintError: a malformed or unsupported schema, regex or grammar, or one that nothing satisfies.
        """
        if isinstance(constraint, Constraint):
            return constraint
        grammar = grammar_of(constraint)
        if thinking:
            grammar = _after_thinking(grammar)
        with self._lock:
            if grammar not in self._compiled:
                self._compiled[grammar] = self._compile(grammar)
                if len(self._compiled) > _COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar]

    def _compile(self, grammar: str) -> Constraint:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ConstraintError(f"the constraint cannot be used: {_reason(matcher.get_error())}")
        over_bytes = LLMatcher(self._alphabet.tokenizer, self._alphabet.translate(grammar), log_level=0)
        if over_bytes.is_error():
            raise ConstraintError(f"the constraint cannot be used: {_reason(over_bytes.get_error())}")
        closing = Closing(self._alphabet, over_bytes, hints(grammar))
        return Constraint(matcher, closing, self._alphabet, self._vocabulary)


def grammar_of(constraint: ConstraintLike) -> str:
    """The constraint in llguidance's own format.

    Raises:
        ConstraintError: it is none, or not well formed.
    """
    if isinstance(constraint, type) and issubclass(constraint, BaseModel):
        constraint = JsonSchema(constraint.model_json_schema(), closed=True)
    if isinstance(constraint, Mapping):
        constraint = JsonSchema(constraint)
    if isinstance(constraint, JsonSchema):
        return _json_grammar(constraint)
    if isinstance(constraint, Regex):
        return str(LLMatcher.grammar_from_regex(constraint.pattern))
    if isinstance(constraint, Choices):
        if not constraint.options or not all(isinstance(option, str) and option for option in constraint.options):
            raise ConstraintError(f"choices are non-empty strings, at least one, not {constraint.options!r}")
        return "start: " + " | ".join(lark_literal(option) for option in dict.fromkeys(constraint.options))
    if isinstance(constraint, Grammar):
        if re.search(r"<\[(?!\d+\]>)|\bmax_tokens\b", constraint.lark):
            raise ConstraintError("a grammar may name single tokens, <[5]>, no ranges; its budget is max_new_tokens")
        return constraint.lark
    raise ConstraintError(
        "a constraint is a pydantic model class, a JSON schema, Regex(…), Choices([…]) or Grammar(…), "
        f"not {constraint!r:.80}"
    )


def _json_grammar(constraint: JsonSchema) -> str:
    try:
        wanted = close_objects(constraint.schema) if constraint.closed else constraint.schema
        schema = json.dumps(wanted, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as malformed:
        raise ConstraintError(f"the schema is not JSON: {malformed}") from malformed
    options: JsonCompileOptions = {"whitespace_flexible": constraint.whitespace}
    return str(LLMatcher.grammar_from_json_schema(schema, defaults=options))


def _after_thinking(grammar: str) -> str:
    body = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    opening = "start: think LINES @answer\nthink[lazy]: /(.|\\n)*<\\/think>/\nLINES: /\\n*/"
    return json.dumps({"grammars": [{"name": "thinking", "lark_grammar": opening}, {**body[0], "name": "answer"}]})


def _reason(error: str) -> str:
    """What llguidance says, without the dump of its state."""
    return error.partition("\n<state>")[0].strip()
