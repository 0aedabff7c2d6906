"""Which caches are kept within a byte budget, and which leave first. Sizes and counters only; no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvcag.scheduler.policy import Policy, Use


@dataclass(frozen=True, slots=True)
class Cached:
    """A cache that is kept.

    Attributes:
        key: its item's id.
        digest: of its text, see `kvcag.scheduler.counters.digest_of`.
        tokens: in it.
        bytes: of its keys and values.
        managed: False for an item that somebody added under an id of their own, and has to find again: it counts, and
            never leaves by itself.
    """

    key: str
    digest: str
    tokens: int
    bytes: int
    managed: bool = True


class WorkingSet:
    """The caches that are kept.

    Args:
        budget_bytes: the most that keys and values may take together.
        policy: what they are worth.
        use_of: the uses of a text, by its digest.
    """

    def __init__(self, budget_bytes: int, policy: Policy, use_of: Callable[[str], Use]) -> None:
        self.budget_bytes = budget_bytes
        self.policy = policy
        self.entries: dict[str, Cached] = {}
        self.bytes = 0
        self._use_of = use_of

    def add(self, entry: Cached) -> None:
        """Count a cache, in place of one with the same key."""
        self.remove(entry.key)
        self.entries[entry.key] = entry
        self.bytes += entry.bytes

    def remove(self, key: str) -> Cached | None:
        """Count a cache no longer."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.bytes
        return entry

    def worth(self, entry: Cached, now: float) -> float:
        """What an entry is worth a byte, kept or not, in the policy's measure."""
        return self.policy.worth(self._use_of(entry.digest), entry.tokens, entry.bytes, now)

    def of_text(self, digest: str) -> list[Cached]:
        """The caches of a text, one after each head. May be asked while another thread adds."""
        return [entry for entry in list(self.entries.values()) if entry.digest == digest]

    def can_hold(self, new: Cached) -> bool:
        """Whether it fits beside what never leaves."""
        fixed = sum(e.bytes for e in self.entries.values() if not e.managed and e.key != new.key)
        return new.bytes + fixed <= self.budget_bytes

    def room_for(
        self, new: Cached, now: float, *, margin: float | None = None, force: bool = False
    ) -> list[Cached] | None:
        """What has to leave for a new cache, the least worth first; None where it cannot enter, or is not worth it.

        Args:
            new: what would enter.
            now: the moment.
            margin: how many times more it has to be worth than each that leaves for it. None asks for no more than the
                policy does.
            force: let it enter whatever it is worth.
        """
        if not self.can_hold(new):
            return None
        present = self.entries.get(new.key)
        leaving = self._least_worth(self.bytes - (present.bytes if present else 0) + new.bytes, now, new.key)
        if not force and (self.policy.selective or margin is not None):
            worth = self.worth(new, now)
            if any(worth <= (margin or 1.0) * self.worth(entry, now) for entry in leaving):
                return None
        return leaving

    def excess(self, now: float) -> list[Cached]:
        """What has to leave so that the rest fits the budget."""
        return self._least_worth(self.bytes, now)

    def _least_worth(self, total: int, now: float, but: str = "") -> list[Cached]:
        """As many of the least worth as bring `total` bytes into the budget, and none that need not go."""
        over = total - self.budget_bytes
        if over <= 0:
            return []
        leaving: list[Cached] = []
        for entry in sorted((e for e in self.entries.values() if e.managed and e.key != but), key=self._order(now)):
            if over <= 0:
                break
            leaving.append(entry)
            over -= entry.bytes
        for entry in reversed(leaving):  # one of the last may be so large that an earlier one can stay
            if over + entry.bytes <= 0:
                leaving.remove(entry)
                over += entry.bytes
        return leaving

    def _order(self, now: float) -> Callable[[Cached], tuple[float, float, str]]:
        return lambda entry: (self.worth(entry, now), self._use_of(entry.digest).last, entry.key)
