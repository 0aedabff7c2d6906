"""Finds texts that end a grammar, so that a constrained answer is complete before its token budget runs out.

A matcher tells which symbols may come next. It does not tell how far the end is, and it does not show its state. So the
search works over bytes, where each step has at most 256 choices:

1. Where only one text can follow, take it.
2. Else try the symbols in a fixed order: closing brackets and quotes, digits, letters, the rest. Compare what the
   matcher allows before and after the symbol. If nothing changes, the symbol adds text without progress (one more
   character of a string): prefer another.
3. Repeat until the matcher accepts. `Closing.quick` does this once. `Closing.shortest` follows every choice with
   `quick` and keeps the one with the fewest tokens.

Step 2 is blind in free text: before `THE END` every character is allowed, and after `T` too. The grammar spells such
texts out, so `hints` reads them from the grammar, and the search tries each as one step.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from kvcag.errors import ConstraintError, MissingExtraError

try:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
    from llguidance.hf import from_tokenizer
except ModuleNotFoundError:
    raise MissingExtraError("constrained generation", "structured") from None

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_END = 256
_BY_NUMBER = re.compile(
    r"""<\[(?P<token>[^\]]*)\]>|(?P<limit>\[[^\]"/]*\bmax_tokens\s*=)|"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\])*/"""
)
"""Matches a token by number, or a limit on a rule's tokens; and strings and regexes, which are skipped."""
_LONGEST_TOKEN = 24
"""Longer tokens are not used to spell a text, because they are runs of one character and slow the spelling down."""
_CLOSERS = '}])>"'
_FIRST = _CLOSERS + string.digits + string.ascii_letters
"""The symbols that the search tries first, in this order."""
_MANY = 64
"""More symbols than this are allowed only within text, where a quote is a closer and a bracket is not."""
_LONGEST_TEXT = 1 << 15
"""The search gives up after this many bytes."""
_EFFORT = 1 << 11
"""The search gives up after this many choices, which take about a second."""
_OFTEN = 8
"""After this many visits to states that look the same, other choices are tried first. `a.a.a` never ends an e-mail."""


class Alphabet:
    """Texts as symbols, one character each: a byte (0 to 255), or a special token (257 and above).

    Args:
        tokenizer: the model's tokenizer.
        vocabulary: the number of tokens of the model.
        end_ids: the tokens that end an answer, the usual one first.

    Attributes:
        end_id: the usual end.
        tokens, symbols: llguidance's tokenizers, over the model's tokens and over symbols.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, end_ids: Sequence[int]) -> None:
        self.tokens = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(end_ids) or None)
        self.end_id = self.tokens.eos_token
        self.end_ids = frozenset(self.tokens.eos_tokens)
        special = [i for i in range(vocabulary) if self.tokens.is_special_token(i) and i not in self.end_ids]
        names = [str(tokenizer.convert_ids_to_tokens(token) or f"<unused-{token}>") for token in special]
        self.symbols = LLTokenizer(TokenizerWrapper(_SymbolTokenizer(names)), slices=[])
        self._special = {token: chr(_END + 1 + index) for index, token in enumerate(special)}
        self._token_of = {symbol: token for token, symbol in self._special.items()}
        for token in range(vocabulary):
            if token not in self._special and token not in self.end_ids:
                self._token_of.setdefault(self.text(token), token)
        self._single = frozenset(text for text in self._token_of if len(text) == 1)

    def text(self, token: int) -> str:
        """Return the symbols of one token."""
        return self._special.get(token) or self.tokens.decode_bytes([token]).decode("latin-1")

    def translate(self, grammar: str) -> str:
        """Replace tokens that a Lark grammar names by number, `<[5]>`, with symbols.

        Raises:
            ConstraintError: the grammar names ranges of tokens, or limits the tokens of a rule.
        """

        def symbols(found: re.Match[str]) -> str:
            token = found["token"] or ""
            if token.isdigit():
                return " ".join(f"<[{ord(symbol)}]>" for symbol in self.text(int(token)))
            if token or found["limit"]:
                raise ConstraintError(
                    f"{found[0]} in a grammar cannot be enforced. Name single tokens, <[5]>, not ranges, and use "
                    "max_new_tokens as the budget."
                )
            return found[0]

        return _BY_NUMBER.sub(symbols, grammar)

    def fits(self, text: str, budget: int) -> bool:
        """Whether at most `budget` tokens spell a text."""
        if len(text) <= budget and self._single.issuperset(text):
            return True
        tokens = self.spell(text)
        return tokens is not None and len(tokens) <= budget

    def spell(self, text: str) -> list[int] | None:
        """Return the fewest tokens that spell a text; None if the vocabulary cannot spell it."""
        size = len(text)
        best = [(0, 0, size)] * (size + 1)  # from each position: token count, first token, its end
        for start in reversed(range(size)):
            ends = range(start + 1, min(size, start + _LONGEST_TOKEN) + 1)
            found = ((end, self._token_of.get(text[start:end])) for end in ends)
            choices = ((best[end][0] + 1, token, end) for end, token in found if token is not None)
            best[start] = min(choices, default=(_LONGEST_TEXT * 2, 0, size))
        if best[0][0] > size:
            return None
        tokens, at = list[int](), 0
        while at < size:
            _, token, at = best[at]
            tokens.append(token)
        return tokens


class _SymbolTokenizer:
    """The tokenizer interface that `TokenizerWrapper` needs, over symbols."""

    bos_token_id = None
    eos_token_id = _END

    def __init__(self, special: Sequence[str]) -> None:
        self.tokens = [bytes([i]) for i in range(256)] + [b"<kvcag-end>", *(name.encode() for name in special)]
        self.special_token_ids = list(range(_END, len(self.tokens)))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile a grammar.

    Raises:
        ConstraintError: llguidance refuses the grammar.
    """
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        reason = matcher.get_error().partition("\n<state>")[0].strip()  # without a dump of llguidance's state
        raise ConstraintError(f"the constraint cannot be used: {reason}")
    return matcher


_Looks: TypeAlias = tuple[str, bytes]
"""The visible part of a state: the text that must follow, and a bit for each symbol that may follow that text."""


class Closing:
    """Finds texts that bring a matcher to its end. The matchers passed in are not changed.

    Args:
        alphabet: the symbols; matchers are over `alphabet.symbols`.
        hints: texts that are tried as one step.
    """

    def __init__(self, alphabet: Alphabet, hints: Sequence[str]) -> None:
        self._alphabet, self._hints = alphabet, hints
        self._ranked = sorted((i for i in range(alphabet.symbols.vocab_size) if i != _END), key=_rank)

    def ends(self, matcher: LLMatcher, text: str) -> bool:
        """Whether a text brings the matcher to an end."""
        state = _after(matcher, text)
        return state.is_accepting() and not state.is_error()

    def quick(self, matcher: LLMatcher, after: str = "", effort: Iterator[int] | None = None) -> str | None:
        """Return a short text that ends the grammar; None if the search finds none. Takes milliseconds.

        Args:
            matcher: the state to start from.
            after: the grammar ends after this text, which is not part of the result.
            effort: one entry for each choice that the search may make.
        """
        effort = iter(range(_EFFORT)) if effort is None else effort
        state, text, visits = _after(matcher, after), "", Counter[_Looks]()
        if state.is_error():
            return None
        while not state.is_accepting():
            step, before = _forced(state), state.compute_bitmask()
            if not step:
                step = next(self._steps(state, visits), "")
                if not step or next(effort, None) is None:
                    return None
            while True:
                _consume(state, step)
                text += step
                if len(text) >= _LONGEST_TEXT:
                    return None
                # A character that changes nothing is repeated, since the text has a minimum length.
                if len(step) > 1 or _forced(state) or state.compute_bitmask() != before:
                    break
        return text

    def shortest(self, matcher: LLMatcher) -> str | None:
        """Return the text with the fewest tokens that the search finds; None if it finds none. Takes up to seconds."""
        state, text, effort = matcher.deep_copy(), "", iter(range(_EFFORT))
        while not state.is_accepting():
            step = _forced(state) or self._best_step(state, text, effort)
            if not step:
                break
            _consume(state, step)
            text += step
        rest = self.quick(state)
        return None if rest is None else text + rest

    def _best_step(self, state: LLMatcher, text: str, effort: Iterator[int]) -> str:
        """Return the step after which the whole text has the fewest tokens; empty if no step leads to an end."""
        ways = list[tuple[int, int, str]]()
        for step in self._steps(state, Counter()):
            rest = self.quick(state, step, effort)
            tokens = None if rest is None else self._alphabet.spell(text + step + rest)
            if rest is not None and tokens is not None:
                ways.append((len(tokens), len(rest), step))
        return min(ways, default=(0, 0, ""))[2]

    def _steps(self, state: LLMatcher, visits: Counter[_Looks]) -> Iterator[str]:
        """Yield possible next steps, the best first; of symbols that lead to states which look the same, only one."""
        allowed = state.compute_bitmask()
        hints = [hint for hint in self._hints if state.validate_tokens(_numbers(hint)) == len(hint)]
        yield from (hint for hint in hints if self.ends(state, hint))
        seen, later = set[_Looks](), list[tuple[int, str]]()
        symbols = [chr(i) for i in self._ranked if allowed[i >> 3] >> (i & 7) & 1]
        if len(symbols) > _MANY:
            symbols.sort(key=lambda symbol: symbol != '"')
        for symbol in symbols:
            looks = _looks(state, symbol)
            if looks in seen:
                continue
            seen.add(looks)
            forced, then = looks
            if then == allowed and not (forced and symbol in _CLOSERS):
                later.append((1 if forced else 2, symbol))
            elif _lengthens(ord(symbol)):
                later.append((3, symbol))
            elif visits[looks] >= _OFTEN:
                later.append((4, symbol))
            else:
                visits[looks] += 1
                yield symbol
        yield from (hint for hint in hints if _looks(state, hint) not in seen)
        yield from (symbol for _, symbol in sorted(later, key=lambda step: step[0]))


def _after(matcher: LLMatcher, text: str) -> LLMatcher:
    """Return a copy of a matcher after a text. It is in an error state if the text is not allowed."""
    copy = matcher.deep_copy()
    _consume(copy, text)
    return copy


def _consume(matcher: LLMatcher, text: str) -> None:
    matcher.consume_tokens(_numbers(text))


def _numbers(text: str) -> list[int]:
    return [ord(symbol) for symbol in text]


def _forced(matcher: LLMatcher) -> str:
    return "".join(map(chr, matcher.compute_ff_tokens()))


def _looks(matcher: LLMatcher, text: str) -> _Looks:
    state = _after(matcher, text)
    forced = _forced(state)
    _consume(state, forced)
    return forced, state.compute_bitmask()


def _rank(symbol: int) -> tuple[bool, int, int]:
    place = _FIRST.find(chr(symbol))
    return _lengthens(symbol), place if place >= 0 else len(_FIRST), symbol


def _lengthens(symbol: int) -> bool:
    """Whether a character that starts with this byte needs several: control characters, UTF-8 sequences, escapes."""
    return symbol < 32 or 128 <= symbol < _END or symbol == ord("\\")


_MOST_HINTS = 32
_SPELT = re.compile(r'/(?P<regex>(?:\\.|[^/\\\n])+)/|(?P<string>"(?:\\.|[^"\\\n])*")(?P<key>\s*:)?')
_ATOM = re.compile(
    r"(?:\\(?P<escape>.)|\[(?P<negated>\^?)(?P<set>(?:\\.|[^\]\\])+)\]|(?P<gap>[()|.^$])|(?P<char>[^*+?{]))"
    r"(?P<times>[*+?]|\{\d+(?:,\d*)?\})?\??",
    re.DOTALL,
)
_CLASSES = {"d": "0", "w": "a", "s": " ", "D": "a", "W": "-", "S": "a", "n": "\n", "t": "\t", "r": "\r"}
_FORMATS = {"email": "a@a.aa", "uri": "a:a"}
"""A short text for each JSON schema format in which no single character makes visible progress."""


def hints(grammar: str) -> list[str]:
    """Return texts that a Lark grammar spells out: its strings, examples of its regexes and patterns, and formats."""
    texts = list[str]()
    for line in grammar.splitlines():
        key = ""  # the last key of a JSON schema in this line
        for found in _SPELT.finditer(line):
            text = _unquoted(found["string"] or '""')
            if found["key"]:
                key = text
            elif found["regex"] or key == "pattern":
                texts += examples(found["regex"] or text)
            elif key == "format":
                texts.append(_FORMATS.get(text, ""))
            elif not key:
                texts.append(text)
    return [hint.encode().decode("latin-1") for hint in dict.fromkeys(texts) if len(hint) > 1][:_MOST_HINTS]


def _unquoted(literal: str) -> str:
    try:
        return str(json.loads(literal, strict=False))
    except ValueError:  # Lark knows more escapes than JSON
        return ""


def examples(pattern: str) -> list[str]:
    r"""Return short texts that match the parts of a regex between groups, dots and bars: `a0x` for `.*[a-f]\d+x`."""
    runs = [""]
    for atom in _ATOM.finditer(pattern):
        if atom["gap"]:
            runs.append("")
            continue
        times = atom["times"] or ""
        count = 0 if times in ("*", "?") else int(re.sub(r"\D.*", "", times[1:])) if times[:1] == "{" else 1
        runs[-1] += _character(atom) * min(count, 64)
    return [run for run in runs if run]


def _character(atom: re.Match[str]) -> str:
    if atom["char"]:
        return atom["char"]
    if atom["set"]:
        first = "a" if atom["negated"] else atom["set"]
        return _CLASSES.get(first[1], first[1]) if first[0] == "\\" else first[0]
    return _CLASSES.get(atom["escape"], atom["escape"])
