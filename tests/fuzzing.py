"""Fuzzing with hypothesis: a second in the suite, and as long as `KVCAG_FUZZ_SECONDS` says otherwise (`make fuzz`)."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

SECONDS = float(os.environ.get("KVCAG_FUZZ_SECONDS", "0"))
ROUND = 100
"""Inputs in the suite, the same in each run; the rounds of a long run differ."""


def fuzz(inputs: st.SearchStrategy[Any], check: Callable[[Any], object]) -> None:
    """Call `check` with generated inputs. It raises where one is not handled, and hypothesis shrinks that input."""
    tried, began = 0, time.monotonic()
    slowest = 0.0

    @settings(
        max_examples=ROUND if not SECONDS else 20 * ROUND,
        deadline=None,
        database=None,
        derandomize=not SECONDS,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.target, Phase.shrink),
    )
    @given(inputs)
    def run(given: Any) -> None:
        nonlocal tried, slowest
        tried, start = tried + 1, time.process_time()
        check(given)
        slowest = max(slowest, time.process_time() - start)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)  # a long input that failed is shown all the same
        run()
        while time.monotonic() - began < SECONDS:
            run()
    if SECONDS:
        print(f"{tried:,} inputs in {time.monotonic() - began:.0f} s, the slowest {slowest:.2f} s")  # noqa: T201
    assert slowest < 20


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e308, -0.5, float("nan"), float("inf")])
    | st.integers()
    | st.sampled_from(
        ["", "x", "float32", "bfloat16", "int8", "I8", "F32", "../x", "\ud800", "\x1b[2J", "1", "layers.0.keys"]
    )
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def changed_json(draw: st.DrawFn, sound: Any) -> Any:
    """A JSON value with a few parts replaced, deleted, doubled or nested."""

    def change(value: Any, depth: int) -> Any:
        if isinstance(value, dict | list) and value and depth and draw(st.integers(0, 5)):
            copy = dict(value) if isinstance(value, dict) else list(value)
            place = draw(st.sampled_from(sorted(copy) if isinstance(copy, dict) else range(len(copy))))
            if draw(st.integers(0, 7)) == 0:
                del copy[place]
            else:
                copy[place] = change(copy[place], depth - 1)
            return copy
        return draw(JSON)

    for _ in range(draw(st.integers(1, 3))):
        sound = change(sound, 5)
    return sound


@st.composite
def changed_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """Bytes of which some were flipped, cut out, moved, repeated or inserted."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        start = draw(st.integers(0, len(data) - 1))
        end = min(len(data), start + draw(st.integers(1, 64)))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            data[start] = draw(st.integers(0, 255))
        elif kind == 1:
            del data[start:]
        elif kind == 2:
            del data[start:end]
        elif kind == 3:
            data[start:start] = data[start:end]
        elif kind == 4:
            data[start:end] = draw(st.binary(max_size=16))
        else:
            other = draw(st.integers(0, len(data) - 1))
            data[start:end] = data[other : other + end - start]
    return bytes(data)
