"""Which caches are worth their bytes, from how often and how lately their texts were asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

_FAST, _SLOW = 3.0, 20.0
"""Rounds after which a use counts half, in the two averages."""


@dataclass(slots=True)
class Use:
    """How often, and how lately, a text was asked for.

    Moments are counted in rounds: one round is as many uses as texts are known. So nothing ages while nobody asks, and
    a round means the same for a hundred documents as for a hundred thousand.

    Attributes:
        count: all uses.
        fast: uses, of which a half is forgotten every three rounds.
        slow: uses, of which a half is forgotten every twenty.
        last: the moment of the last use.
    """

    count: int = 0
    fast: float = 0.0
    slow: float = 0.0
    last: float = 0.0

    def again(self, now: float) -> None:
        """Count a use."""
        since = now - self.last
        self.count += 1
        self.fast = self.fast * 2 ** (-since / _FAST) + 1
        self.slow = self.slow * 2 ** (-since / _SLOW) + 1
        self.last = now

    def rate(self, now: float) -> float:
        """Uses to be expected a round: the mean of a quick estimate and a steady one, as load averages are."""
        since = now - self.last
        return math.log(2) / 2 * (self.fast * 2 ** (-since / _FAST) / _FAST + self.slow * 2 ** (-since / _SLOW) / _SLOW)


class Policy(Protocol):
    """Says what a cache is worth. That is all a `CacheScheduler` asks: what is worth least leaves first."""

    @property
    def selective(self) -> bool:
        """Whether a new cache that is worth less than what it would displace is turned away."""

    def worth(self, use: Use, tokens: int, size: int, now: float) -> float:
        """What a cache of `tokens` tokens that takes `size` bytes is worth, for each of its bytes."""


@dataclass(frozen=True, slots=True)
class GDSF:
    """Frequency × cost / size, for frequencies that age: the default.

    After GreedyDual-Size-Frequency (Cherkasova 1998), which ages by raising a floor at every eviction; here the
    frequency itself fades (`Use.rate`), also that of what nobody evicts. A cache enters only if it is worth more than
    what it displaces, as in TinyLFU (Einziger, Friedman and Manes 2017), so what is asked once displaces nothing.

    Attributes:
        attention_tokens: the length at which attention costs as much as all the rest of a prefill, so that a long text
            is worth more a token than a short one.
    """

    attention_tokens: int = 8192
    selective: bool = True

    def worth(self, use: Use, tokens: int, size: int, now: float) -> float:
        """Prefill saved a round, in tokens' worth of a short text, for each byte."""
        return use.rate(now) * tokens * (1 + tokens / self.attention_tokens) / max(size, 1)


@dataclass(frozen=True, slots=True)
class LRU:
    """What was asked for least recently leaves first."""

    selective: bool = False

    def worth(self, use: Use, tokens: int, size: int, now: float) -> float:
        """When it was last asked for."""
        return use.last


@dataclass(frozen=True, slots=True)
class LFU:
    """What was asked for least often leaves first; nothing is ever forgotten."""

    selective: bool = False

    def worth(self, use: Use, tokens: int, size: int, now: float) -> float:
        """How often it was asked for."""
        return float(use.count)
