from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcag import Sampling
from kvcag.engines.decode import Sampler
from kvcag.errors import InvalidInputError

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])
CPU = torch.device("cpu")


def choose(sampler: Sampler, token_ids: list[int]) -> int:
    return sampler.take(int(sampler.draw(LOGITS, sampler.history(token_ids))))


def draws(sampling: Sampling, count: int = 200) -> list[int]:
    sampler = Sampler(sampling, CPU)
    return [choose(sampler, [0]) for _ in range(count)]


def test_greedy_takes_the_likeliest() -> None:
    assert set(draws(Sampling())) == {0}


def test_a_seed_repeats() -> None:
    assert draws(Sampling(temperature=1.0, seed=7)) == draws(Sampling(temperature=1.0, seed=7))
    assert draws(Sampling(temperature=1.0, seed=7)) != draws(Sampling(temperature=1.0, seed=8))


@pytest.mark.parametrize(
    ("settings", "possible"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),  # p = 0.58, 0.21, 0.13, 0.03, 0.00
        ({"top_p": 0.7}, {0, 1}),
        ({"min_p": 0.3}, {0, 1}),  # 1: 0.21 / 0.58 = 0.37; 2: 0.22
        ({"temperature": 0.01}, {0}),
    ],
)
def test_cut_offs_leave_only_what_they_say(settings: dict[str, float], possible: set[int]) -> None:
    assert set(draws(Sampling(**{"temperature": 1.0, "seed": 0, **settings}))) == possible  # type: ignore[arg-type]


def test_the_repetition_penalty_reads_the_prompt_too() -> None:
    penalised = Sampler(Sampling(repetition_penalty=3.0), CPU)
    assert choose(penalised, [0]) == 1
    assert choose(penalised, [0, 1]) == 0


def test_memos_spellings() -> None:
    assert Sampling.of(max_tokens=5, stop="x", temperature=None) == Sampling(max_new_tokens=5, stop=("x",))
    assert Sampling.of(do_sample=False, temperature=0.7).greedy
    assert Sampling.of(do_sample=True).temperature == 1.0
    assert Sampling.of(do_sample=True, temperature=0.3).temperature == 0.3


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.2},
        {"min_p": -1},
        {"repetition_penalty": 0},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"temperature": "hot"},
        {"max_new_tokens": True},
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        Sampling.of(**wrong)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"unknown argument temprature\. Known arguments: .*temperature"):
        Sampling.of(temprature=1)


@given(st.floats(0.1, 3), st.integers(1, 5))
def test_a_draw_is_never_outside_top_k(temperature: float, top_k: int) -> None:
    assert set(draws(Sampling(temperature=temperature, top_k=top_k, seed=1), 20)) <= set(range(top_k))
