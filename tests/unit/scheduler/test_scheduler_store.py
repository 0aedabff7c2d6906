"""The worth of caches and the budget, without a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcag.scheduler.store import Cached, Policy, gdsf, room_for
from kvcag.scheduler.texts import TextStats


def lru(stats: TextStats, tokens: int, size: int, now: float) -> float:
    return stats.last


def used(*moments: float) -> TextStats:
    use = TextStats(last=moments[0])
    for moment in moments:
        use.add_use(moment)
    return use


def worth(policy: Policy, uses: dict[str, TextStats], now: float) -> Callable[[Cached], float]:
    return lambda entry: policy(uses.get(entry.digest, TextStats()), entry.tokens, entry.bytes, now)


def test_a_rate_is_the_number_of_uses_in_a_round() -> None:
    """Two uses per round for a long time: both averages converge to two."""
    use = used(*(moment / 2 for moment in range(400)))
    assert use.rate(use.last) == pytest.approx(2, rel=0.15)
    assert use.rate(use.last + 3) < 0.9 * use.rate(use.last)
    assert use.rate(use.last + 200) < 0.001


def test_a_formerly_hot_text_is_worth_less_than_a_text_in_use() -> None:
    once_hot, rising = used(*range(50)), used(100, 101, 102)
    assert rising.count < once_hot.count
    assert gdsf(rising, 100, 1000, 102) > gdsf(once_hot, 100, 1000, 102)


def test_a_long_text_is_worth_more_a_byte_since_attention_is_quadratic() -> None:
    use = used(0, 1)
    assert gdsf(use, 8192, 8192, 1) == pytest.approx(2 * gdsf(use, 1, 1, 1), rel=1e-3)


def test_a_text_that_is_asked_once_displaces_nothing_that_is_asked_often() -> None:
    uses = {"often": used(1, 2, 3, 4), "once": used(4.5)}
    for policy, displaced in ((gdsf, None), (lru, ["often"])):
        room = room_for(Cached("b", "once", 10, 80), [Cached("a", "often", 10, 80)], 100, worth(policy, uses, 5))
        assert (room and [entry.digest for entry in room]) == displaced


def test_the_least_worth_leaves_and_nothing_that_need_not() -> None:
    uses = {"cold": used(1), "warm": used(1, 5), "hot": used(1, 5, 6), "new": used(2, 3, 4, 5, 6, 7)}
    stored = [Cached(name, name, size, size) for name, size in (("cold", 10), ("warm", 60), ("hot", 30))]
    room = room_for(Cached("new", "new", 50, 50), stored, 100, worth(gdsf, uses, 7))
    assert room is not None
    assert [entry.key for entry in room] == ["warm"]  # with it gone, the cold one can stay
    for force in (False, True):
        assert room_for(Cached("new", "new", 101, 101), stored, 100, worth(gdsf, uses, 7), force=force) is None


def test_items_with_the_callers_id_count_and_are_never_evicted() -> None:
    stored = [Cached("mine", "mine", 60, 60, managed=False), Cached("other", "other", 40, 40)]
    new = worth(lru, {"new": used(1)}, 1)
    room = room_for(Cached("new", "new", 40, 40), stored, 100, new)
    assert room is not None
    assert [entry.key for entry in room] == ["other"]
    assert room_for(Cached("new", "new", 41, 41), stored, 100, new, force=True) is None


operations = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 60), st.sampled_from(["use", "put", "force", "remove"])),
    max_size=60,
)


@pytest.mark.parametrize("policy", [gdsf, lru])
@given(operations=operations, budget=st.integers(1, 120))
def test_the_budget_holds_whatever_happens(policy: Policy, operations: list[tuple[str, int, str]], budget: int) -> None:
    uses: dict[str, TextStats] = {}
    stored: dict[str, Cached] = {}
    for now, (name, size, what) in enumerate(operations):
        if what == "use":
            uses.setdefault(name, TextStats(last=now)).add_use(now)
        elif what == "remove":
            stored.pop(name, None)
        else:
            new, is_forced = Cached(name, name, size, size), what == "force"
            room = room_for(new, stored.values(), budget, worth(policy, uses, now), force=is_forced)
            if room is None:
                assert what == "put" or size > budget
                continue
            assert name not in [entry.key for entry in room]
            kept = sum(entry.bytes for entry in stored.values() if entry not in room and entry.key != name)
            assert all(kept + size + left.bytes > budget for left in room)  # none of them could have stayed
            for entry in room:
                del stored[entry.key]
            stored[name] = new
        assert sum(entry.bytes for entry in stored.values()) <= budget
        assert room_for(None, stored.values(), budget, worth(policy, uses, now)) == []
