"""Constraints on an answer: JSON schemas, regular expressions, choices and grammars, and how they are enforced.

Every constraint becomes a grammar in Lark's syntax. llguidance (https://github.com/guidance-ai/llguidance) masks the
tokens that the grammar forbids. `Enforcement` also knows at every step a text that ends the grammar within the tokens
that are left. If a chosen token would leave no such text, the next token of the known text replaces it. So an answer is
always valid, within its budget.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from kvcag.errors import ConstraintBudgetError, ConstraintError, EngineError

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

    from kvcag.engines.closing import Alphabet, Closing


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that matches a regular expression as a whole, in Rust's syntax: no look-around, no back-references."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Choices:
    """One of several texts."""

    options: Sequence[str]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A context-free grammar in Lark's syntax, as llguidance reads it. The rule `start` describes the whole answer."""

    lark: str


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that is valid under a schema.

    Attributes:
        schema: the schema.
        whitespace: allow white space between JSON tokens. The default, none, saves about 40% of the tokens.
        closed: objects have only the properties that the schema names. This is the default for a pydantic model. Other
            schemas allow further properties, unless `additionalProperties` is false.
    """

    schema: Mapping[str, Any]
    whitespace: bool = False
    closed: bool = False


@dataclass(frozen=True, slots=True)
class ServerConstraint:
    """A constraint as fields of a request, which the server enforces. Made by `VLLMEngine.constrain`."""

    fields: Mapping[str, Any]


ConstraintLike: TypeAlias = (
    "type[BaseModel] | Mapping[str, Any] | JsonSchema | Regex | Choices | Grammar | Constraint | ServerConstraint"
)
"""The types of `constraint=`. A mapping is a JSON schema."""


def as_json_schema(constraint: Any) -> Any:
    """Convert a pydantic model or a mapping to a `JsonSchema`; return anything else unchanged."""
    if isinstance(constraint, type) and issubclass(constraint, BaseModel):
        return JsonSchema(constraint.model_json_schema(), closed=True)
    return JsonSchema(constraint) if isinstance(constraint, Mapping) else constraint


def to_lark(constraint: ConstraintLike) -> str:
    """Convert a constraint to a grammar in Lark's syntax.

    Raises:
        ConstraintError: the value is not a constraint, or not well formed.
    """
    constraint = as_json_schema(constraint)
    if isinstance(constraint, JsonSchema):
        return f"start: {lark_json(constraint)}"
    if isinstance(constraint, Regex):
        slashes = {"/": "\\/", "\n": "\\n"}  # escaped, because they would end the regex
        pattern = re.sub(r"(?s)\\.|/|\n", lambda part: slashes.get(part[0], part[0]), constraint.pattern)
        return f"start: /{pattern}/"
    if isinstance(constraint, Choices):
        if not constraint.options or not all(isinstance(option, str) and option for option in constraint.options):
            raise ConstraintError(f"choices must be one or more non-empty strings, not {constraint.options!r}")
        return "start: " + " | ".join(lark_literal(option) for option in dict.fromkeys(constraint.options))
    if isinstance(constraint, Grammar):
        return constraint.lark
    raise ConstraintError(
        "a constraint must be a pydantic model class, a JSON schema, Regex(…), Choices([…]) or Grammar(…), "
        f"not {constraint!r:.80}"
    )


def lark_json(constraint: JsonSchema) -> str:
    """Convert a JSON schema to a part of a Lark rule.

    Raises:
        ConstraintError: the schema is not JSON.
    """
    schema = close_objects(constraint.schema) if constraint.closed else constraint.schema
    options = {"whitespace_flexible": constraint.whitespace, **schema.get("x-guidance", {})}
    try:
        return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as malformed:
        raise ConstraintError(f"the schema is not JSON: {malformed}") from malformed


def lark_literal(text: str) -> str:
    """Return a text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def close_objects(schema: Any) -> Any:
    """Add `additionalProperties: false` to every object that names properties and does not mention others.

    Schemas under `allOf` stay as they are: there, one branch would forbid the properties of the next.
    """
    if not isinstance(schema, Mapping):
        return schema
    closed: dict[str, Any] = dict(schema)
    for key in ("properties", "$defs", "definitions", "patternProperties"):
        if isinstance(schema.get(key), Mapping):
            closed[key] = {name: close_objects(part) for name, part in schema[key].items()}
    for key in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(schema.get(key), list):
            closed[key] = [close_objects(part) for part in schema[key]]
    for key in ("items", "additionalProperties"):
        if key in schema:
            closed[key] = close_objects(schema[key])
    if "properties" in schema and "allOf" not in schema:
        closed.setdefault("additionalProperties", False)
    return closed


class Constraint:
    """A compiled constraint for one tokenizer. Made by `HFEngine.constrain`; many generations may use it at once.

    Attributes:
        shortest: the token ids of the shortest valid answer that was found. `check_fits` searches harder if a budget is
            too small for it.
    """

    def __init__(self, matcher: LLMatcher, symbols: LLMatcher, closing: Closing, alphabet: Alphabet) -> None:
        self._matcher, self._symbols, self._closing, self._alphabet = matcher, symbols, closing, alphabet
        self._searched = False
        self.ending, self.shortest = "", tuple[int, ...]()
        if not self._keep(closing.quick(symbols)) and not self._keep(closing.shortest(symbols)):
            raise ConstraintError(
                "no text was found that satisfies the constraint: it matches nothing, or never ends. Check for "
                "contradictions, and for a rule that only calls itself."
            )

    def check_fits(self, max_new_tokens: int) -> None:
        """Refuse a budget that is too small for any valid answer.

        Raises:
            ConstraintBudgetError: no valid answer fits; the error has the number of tokens needed.
        """
        if len(self.shortest) > max_new_tokens and not self._searched:
            self._searched = True
            self._keep(self._closing.shortest(self._symbols))
        if len(self.shortest) > max_new_tokens:
            raise ConstraintBudgetError(len(self.shortest), max_new_tokens)

    def accepts(self, token_ids: Sequence[int]) -> bool:
        """Whether these tokens are a valid answer."""
        return self._closing.ends(self._symbols, "".join(map(self._alphabet.text, token_ids)))

    def start(self, max_new_tokens: int) -> Enforcement:
        """Enforce the constraint on one generation.

        Raises:
            ConstraintBudgetError: no valid answer fits `max_new_tokens`.
        """
        self.check_fits(max_new_tokens)
        matchers = self._matcher.deep_copy(), self._symbols.deep_copy()
        return Enforcement(*matchers, self._closing, self._alphabet, self.ending, max_new_tokens)

    def _keep(self, ending: str | None) -> bool:
        """Remember a valid answer if it is the shortest so far. Returns whether the vocabulary can spell it."""
        tokens = None if ending is None else self._alphabet.spell(ending)
        if ending is None or tokens is None:
            return False
        if not self.shortest or len(tokens) < len(self.shortest):
            self.ending, self.shortest = ending, tuple(tokens)
        return True


class Enforcement:
    """A constraint's state in one generation.

    It is a transformers logits processor: called with `(input_ids, scores)`, it masks the tokens that the grammar
    forbids. Pass the token that was chosen from those scores to `take`.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        symbols: LLMatcher,
        closing: Closing,
        alphabet: Alphabet,
        ending: str,
        max_new_tokens: int,
    ) -> None:
        self._matcher, self._symbols, self._closing, self._alphabet = matcher, symbols, closing, alphabet
        self._ending = ending  # ends the grammar from here, within the tokens that are left
        self._left = max_new_tokens
        self._mask = np.zeros((alphabet.tokens.vocab_size + 31) // 32, dtype=np.int32)
        self._address = self._mask.ctypes.data  # read once, since reading it takes as long as a mask

    @property
    def complete(self) -> bool:
        """Whether the answer is valid and nothing may follow it."""
        return bool(self._matcher.is_stopped())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask scores.

        Args:
            input_ids: not used.
            scores: floating point, `(1, vocabulary)`.

        Returns:
            The scores, with -inf for each token that the grammar forbids.

        Raises:
            EngineError: the grammar became too complex for llguidance.
        """
        self._matcher.unsafe_compute_mask_ptr(self._address, self._mask.nbytes)
        if self._matcher.is_error():
            raise EngineError(
                f"the constraint became too complex to enforce: {_reason(self._matcher)}. Simplify the constraint."
            )
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little", count=self._alphabet.tokens.vocab_size)
        allowed = torch.from_numpy(bits.view(np.bool_))
        beyond = scores.shape[-1] - len(allowed)  # a model may have more logits than the tokenizer has tokens
        if beyond > 0:
            allowed = torch.nn.functional.pad(allowed, (0, beyond))
        # `where` takes a third of the time of `masked_fill`
        return torch.where(allowed[: scores.shape[-1]].to(scores.device), scores, -torch.inf)

    def take(self, token: int) -> int:
        """Continue with a token, or with another one if the answer could not end within the budget after this one.

        Returns:
            The token to continue with.

        Raises:
            EngineError: the grammar forbids the token.
        """
        self._left -= 1
        if token not in self._alphabet.end_ids:
            ending = self._ending_after(token)
            if ending is None:
                token = (self._alphabet.spell(self._ending) or [self._alphabet.end_id])[0]
                ending = self._ending[len(self._alphabet.text(token)) :] if self._ending else ""
            self._ending = ending
            if token not in self._alphabet.end_ids:
                self._symbols.consume_tokens([ord(symbol) for symbol in self._alphabet.text(token)])
        if not self._matcher.consume_token(token):
            raise EngineError(f"the grammar forbids token {token}: {_reason(self._matcher)}")
        return token

    def _ending_after(self, token: int) -> str | None:
        """Return a text that ends the grammar after a token within the remaining budget; None if none is found."""
        text = self._alphabet.text(token)
        if self._ending.startswith(text):
            ending: str | None = self._ending[len(text) :]
        elif self._closing.ends(self._symbols, text + self._ending):
            ending = self._ending
        else:
            ending = self._closing.quick(self._symbols, text)
        return ending if ending is not None and self._alphabet.fits(ending, self._left) else None


class ConstraintCompiler:
    """Compiles constraints for one tokenizer, and caches the last 128. Safe to use from several threads.

    Args:
        tokenizer: a fast tokenizer.
        vocabulary: the number of tokens of the model, which may exceed the tokenizer's.
        eos_ids: the tokens that end an answer.

    Raises:
        ConstraintError: the tokenizer is not a fast one.
        MissingExtraError: llguidance is not installed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos_ids: Sequence[int]) -> None:
        from kvcag.engines import closing  # needs llguidance, which is an extra

        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConstraintError(f"constraints need a fast tokenizer; {type(tokenizer).__name__} is not one")
        usual_first = sorted(eos_ids, key=lambda token: (token != tokenizer.eos_token_id, token))
        self._closing = closing
        self._alphabet = closing.Alphabet(tokenizer, max(vocabulary, len(tokenizer)), usual_first)
        self._compiled: OrderedDict[tuple[str, bool], Constraint] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, constraint: ConstraintLike, *, thinking: bool = False) -> Constraint:
        """Compile a constraint, or return it if it was compiled before.

        Args:
            constraint: the form of the answer.
            thinking: the answer begins within a thinking block; the constraint holds after that block.

        Raises:
            ConstraintError: the constraint is malformed or not supported, or no text satisfies it.
        """
        if isinstance(constraint, Constraint):
            return constraint
        key = to_lark(constraint), thinking
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(*key)
                if len(self._compiled) > _CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return self._compiled[key]

    def _compile(self, lark: str, thinking: bool) -> Constraint:
        alphabet, wrap = self._alphabet, _after_thinking if thinking else str
        matcher = self._closing.new_matcher(alphabet.tokens, wrap(lark))
        symbols = self._closing.new_matcher(alphabet.symbols, wrap(alphabet.translate(lark)))
        hints = [*(["</think>"] if thinking else []), *self._closing.hints(lark)]
        return Constraint(matcher, symbols, self._closing.Closing(alphabet, hints), alphabet)


_CACHED = 128


def _after_thinking(lark: str) -> str:
    """Return a grammar for a thinking block and then an answer, in llguidance's own format."""
    opening = "start: think LINES @answer\nthink[lazy]: /(.|\\n)*<\\/think>/\nLINES: /\\n*/"
    grammars = [{"name": "thinking", "lark_grammar": opening}, {"name": "answer", "lark_grammar": lark}]
    return json.dumps({"grammars": grammars})


def _reason(matcher: LLMatcher) -> str:
    """Return a matcher's error without the dump of its state."""
    return matcher.get_error().partition("\n<state>")[0].strip()
