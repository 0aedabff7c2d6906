"""The shortest way for a grammar to end, so that a constrained answer can be closed before its budget does.

A grammar's matcher says which symbols may come next, not how far the end is. So the search runs over bytes, of which
there are few: forced runs are taken whole, where there is a choice the symbol that closes something is tried first,
and one that leads back to the same choice (another character of a string, another digit) last.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END = 256
_NUMBERED = re.compile(r"""<\[(?P<token>\d+)\]>|"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\])*/""")
"""A token by number; a string or a regex, in which nothing is one."""
_FAR = 1 << 15
"""Bytes after which a way that has not ended is given up."""
_EFFORT = 1 << 11
"""Choices that one search looks at, at most: about a second."""
_LONGEST = 24
"""Bytes of a token, at most, where a text is spelt: longer ones are runs of one character."""
_CLOSERS = b'}]")>'
_IN_TEXT = b'"}])>'
_MANY = 64
"""More symbols than this may come next only within text, which a quotation mark closes sooner than a brace."""
_OFTEN = 8
"""How often a way may lead to what looks like the same state before something else is tried."""
_SIBLINGS = 24
"""How many symbols are looked at where the grammar leaves a choice and a quick way is enough."""


class Alphabet:
    """Symbols that a tokenizer's tokens are spelt with: the 256 bytes, an end, and each special token.

    Args:
        tokenizer: names the special tokens.
        ll_tokenizer: llguidance's view of it, which knows each token's bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ll_tokenizer: LLTokenizer) -> None:
        self.end_id = ll_tokenizer.eos_token
        self.end_ids = frozenset(ll_tokenizer.eos_tokens)
        ids = range(ll_tokenizer.vocab_size)
        special = [i for i in ids if ll_tokenizer.is_special_token(i) and i not in self.end_ids]
        self._special = {token: _END + 1 + index for index, token in enumerate(special)}
        self._decode = ll_tokenizer.decode_bytes
        names = [str(tokenizer.convert_ids_to_tokens(token) or f"<unused-{token}>") for token in special]
        self.tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(names)), slices=[])
        self._token_of: dict[bytes, int] = {}
        for token in ids:
            if token not in self._special and token not in self.end_ids:
                self._token_of.setdefault(self._decode([token]), token)

    def spell(self, token: int) -> tuple[int, ...]:
        """The symbols of one token."""
        symbol = self._special.get(token)
        return tuple(self._decode([token])) if symbol is None else (symbol,)

    def translate(self, grammar: str) -> str:
        """The grammar with symbols in place of the tokens that it gives by number, `<[5]>`."""

        def symbol(found: re.Match[str]) -> str:
            if found["token"] is None:
                return found[0]
            token = int(found["token"])
            return " ".join(f"<[{symbol}]>" for symbol in self.spell(token))

        return _NUMBERED.sub(symbol, grammar)

    def counts(self, symbols: Sequence[int]) -> list[int]:
        """The fewest tokens that spell the symbols from each on, none longer than `_LONGEST` bytes.

        One entry a symbol, and 0 for the end; at least `_FAR` where the vocabulary cannot spell the rest.
        """
        text = bytes(0 if symbol > _END else symbol for symbol in symbols)
        best = [0] * (len(symbols) + 1)
        stop = len(symbols)  # no token goes over a special one
        for start in reversed(range(len(symbols))):
            if symbols[start] > _END:
                best[start], stop = best[start + 1] + 1, start
                continue
            ends = range(start + 1, min(stop, start + _LONGEST) + 1)
            best[start] = 1 + min((best[end] for end in ends if text[start:end] in self._token_of), default=_FAR)
        return best

    def tokens(self, symbols: Sequence[int]) -> list[int] | None:
        """The fewest tokens that spell `symbols`; None if the vocabulary cannot."""
        best = self.counts(symbols)
        if best[0] >= _FAR:
            return None
        special = {symbol: token for token, symbol in self._special.items()} if max(symbols, default=0) > _END else {}
        found, at = list[int](), 0
        while at < len(symbols):
            if symbols[at] in special:
                found.append(special[symbols[at]])
                at += 1
                continue
            pieces = ((bytes(symbols[at:end]), end) for end in range(at + 1, min(len(symbols), at + _LONGEST) + 1))
            piece, at = next((p, end) for p, end in pieces if best[end] + 1 == best[at] and p in self._token_of)
            found.append(self._token_of[piece])
        return found


class _Bytes:
    """What `TokenizerWrapper` asks of a tokenizer."""

    bos_token_id = None
    eos_token_id = _END

    def __init__(self, special: Sequence[str]) -> None:
        self.tokens = [bytes([i]) for i in range(256)] + [b"<kvcag-end>", *(name.encode() for name in special)]
        self.special_token_ids = list(range(_END, len(self.tokens)))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


class _Step(NamedTuple):
    """Symbols to take, and whether the grammar then allows the same as before."""

    symbols: list[int]
    loops: bool = False


_Looks: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...], bool]"
"""How a state looks: what is forced, what is allowed then, and whether it ends there."""


class Closing:
    """A grammar's state, as bytes, and how it can end from there.

    Args:
        alphabet: of the tokenizer.
        matcher: the grammar over `alphabet.tokenizer`; it is advanced in place.
        hints: symbols that the grammar's author wrote one after another, `</think>` for one; tried where it is not
            otherwise seen how the grammar goes on.
    """

    def __init__(self, alphabet: Alphabet, matcher: LLMatcher, hints: Sequence[list[int]] = ()) -> None:
        self._alphabet = alphabet
        self._matcher = matcher
        self._hints = hints
        self._effort = _EFFORT
        self._mask = allocate_token_bitmask(1, alphabet.tokenizer.vocab_size)

    @property
    def exhausted(self) -> bool:
        """Whether the last search was given up because of its length."""
        return self._effort < 0

    def copy(self) -> Closing:
        """The same state, to be advanced on its own."""
        return Closing(self._alphabet, self._matcher.deep_copy(), self._hints)

    def advance(self, token: int) -> tuple[int, ...]:
        """Take a token, and return its symbols."""
        symbols = self._alphabet.spell(token)
        self._matcher.consume_tokens(list(symbols))
        return symbols

    def retract(self, symbols: Sequence[int]) -> None:
        """Take back the last symbols."""
        self._matcher.rollback(len(symbols))

    def ends_with(self, symbols: Sequence[int]) -> bool:
        """Whether these symbols bring the grammar to an end."""
        matcher = self._matcher
        if matcher.validate_tokens(list(symbols)) < len(symbols):
            return False
        matcher.consume_tokens(list(symbols))
        ends = matcher.is_accepting()
        matcher.rollback(len(symbols))
        return bool(ends)

    def quick(self) -> list[int] | None:
        """Symbols that end the grammar: a short way, found quickly. None if none was found."""
        path: list[int] = []
        before, step = list[int](), _Step([])
        been = Counter[_Looks]()
        while not self._matcher.is_accepting():
            forced = self._forced()
            if forced:
                step = _Step(forced)
            else:
                allowed = self._allowed()
                if not (step.loops and allowed == before):  # else the same symbol again: text of a minimum length
                    self._effort -= 1
                    step = next(self._choices(allowed, been), _Step([]))
                elif len(path) % 32 == 0:
                    self._effort -= 1
                before = allowed
            if not step.symbols or len(path) > _FAR or self._effort < 0:
                self._matcher.rollback(len(path))
                return None
            self._matcher.consume_tokens(step.symbols)
            path += step.symbols
        self._matcher.rollback(len(path))
        return path

    def shortest(self) -> list[int] | None:
        """Symbols of the shortest end that is found when, at each choice on the way, every branch is followed.

        Takes about a hundred times as long as `quick`, and settles for its way where that would be too long.
        """
        path: list[int] = []
        matcher = self._matcher
        self._effort = _EFFORT
        while not matcher.is_accepting():
            symbols = self._forced() or self._best_branch(path)
            if not symbols:
                break
            matcher.consume_tokens(symbols)
            path += symbols
        self._effort = _EFFORT
        rest = self.quick()
        matcher.rollback(len(path))
        return None if rest is None else path + rest

    def _best_branch(self, path: list[int]) -> list[int]:
        """The choice after which the end is nearest; empty if there is none."""
        ways = []
        for step in list(self._choices(self._allowed(), Counter(), thorough=True)):
            self._matcher.consume_tokens(step.symbols)
            rest = self.quick()
            self._matcher.rollback(len(step.symbols))
            if rest is not None:
                tokens = self._alphabet.tokens([*path, *step.symbols, *rest])
                if tokens is not None:
                    ways.append((len(tokens), len(rest), step.symbols))
        return min(ways)[2] if ways else []

    def _forced(self) -> list[int]:
        return list(self._matcher.compute_ff_tokens())

    def _choices(self, allowed: list[int], been: Counter[_Looks], thorough: bool = False) -> Iterator[_Step]:
        """What may come next, best first; of symbols that lead to the same state, one.

        What leads, once more, to a state that looks like one that was led to often comes last: `a.a.a` of an e-mail
        address never ends.
        """
        closers = _IN_TEXT if len(allowed) > _MANY else _CLOSERS
        ranked = sorted(allowed, key=lambda symbol: _rank(symbol, closers))
        seen = set[_Looks]()
        later: list[tuple[int, _Step]] = []
        hints = [hint for hint in self._hints if self._matcher.validate_tokens(hint) == len(hint)]
        yield from (_Step(hint) for hint in hints if self.ends_with(hint))
        for symbol in ranked if thorough else _spread(ranked):
            looks = self._after([symbol])
            if looks in seen:
                continue
            seen.add(looks)
            forced, then, _ = looks
            if then == tuple(allowed) and not (forced and symbol in tuple(closers)):
                later.append((1 if forced else 2, _Step([symbol], loops=not forced)))
            elif _lengthens(symbol):
                later.append((3, _Step([symbol])))
            elif been[looks] >= _OFTEN:
                later.append((4, _Step([symbol])))
            else:
                been[looks] += 1
                yield _Step([symbol])
        # what ends free text is not seen from its first symbol
        yield from (_Step(hint) for hint in hints if self._after(hint) not in seen)
        yield from (step for _, step in sorted(later, key=lambda way: way[0]))

    def _after(self, symbols: list[int]) -> _Looks:
        """How the state looks after these symbols: what is forced, what is allowed then, and whether it ends there."""
        self._matcher.consume_tokens(symbols)
        forced = self._forced()
        self._matcher.consume_tokens(forced)
        looks = tuple(forced), tuple(self._allowed()), self._matcher.is_accepting()
        self._matcher.rollback(len(symbols) + len(forced))
        return looks

    def _allowed(self) -> list[int]:
        """Symbols that may come next, without the end."""
        fill_next_token_bitmask(self._matcher, self._mask)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._alphabet.tokenizer.vocab_size]
        return [int(symbol) for symbol in np.flatnonzero(bits) if symbol != _END]


def _rank(symbol: int, closers: bytes) -> tuple[int, int]:
    """What closes something; digits and letters; then the rest."""
    if symbol < _END and symbol in closers:
        return 0, closers.index(symbol)
    if symbol > _END:
        return 2, symbol
    if _lengthens(symbol):
        return 4, symbol
    return (1 if chr(symbol).isalnum() else 3), symbol


def _lengthens(symbol: int) -> bool:
    """Whether it takes more bytes to say what one would do: control characters, the first of many bytes, escapes."""
    return symbol < 32 or 128 <= symbol < _END or symbol == ord("\\")


def _spread(ranked: list[int]) -> list[int]:
    """At most `_SIBLINGS` of them: the best, and some from all over."""
    best, rest = ranked[: _SIBLINGS // 2], ranked[_SIBLINGS // 2 :]
    return best + rest[:: max(1, -(-len(rest) // (_SIBLINGS - len(best) or 1)))]
