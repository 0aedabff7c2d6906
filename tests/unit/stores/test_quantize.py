from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcag.cache.int8 import dequantize_int8, quantize_int8
from kvcag.cache.layers import layers_of
from kvcag.errors import InvalidInputError
from kvcag.stores.files import read_manifest
from kvcag.stores.format import read_item, write_item
from tests.stored import assert_same, random_item


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-30, 30),
    shape=st.tuples(st.just(1), st.integers(1, 4), st.integers(1, 9), st.integers(1, 65)),
)
def test_no_value_moves_by_more_than_half_a_step(seed: int, exponent: float, shape: tuple[int, ...]) -> None:
    states = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent

    codes, scales = quantize_int8(states)

    assert codes.dtype == torch.int8
    assert scales.shape == (*shape[:-1], 1)
    step = states.abs().amax(dim=-1, keepdim=True) / 127 * 1.01  # the scale is rounded up, to eight bits
    moved = (dequantize_int8(codes, scales, torch.float32) - states).abs()
    assert bool((moved <= 0.505 * step).all())
    assert int(codes.abs().max()) <= 127


def test_zeros_stay_zeros() -> None:
    codes, scales = quantize_int8(torch.zeros(1, 2, 3, 4))
    assert not dequantize_int8(codes, scales, torch.bfloat16).any()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_values_without_an_int8_code_are_refused(bad: float) -> None:
    states = torch.zeros(1, 2, 3, 4)
    states[0, 1, 2, 3] = bad
    with pytest.raises(InvalidInputError, match="quantize=None"):
        quantize_int8(states)


def test_int8_halves_the_file_and_is_read_in_the_models_dtype(tmp_path: Path) -> None:
    item = random_item(tokens=200, layers=4, head_dim=64)
    plain = write_item(tmp_path / "plain", item)
    small = write_item(tmp_path / "small", item, quantize="int8")

    assert small <= 0.53 * plain
    assert read_manifest(tmp_path / "small").quantize == "int8"
    read = read_item(tmp_path / "small")
    for (keys, values), (true_keys, true_values) in zip(layers_of(read.memory), layers_of(item.memory), strict=True):
        assert keys.dtype == values.dtype == torch.bfloat16
        torch.testing.assert_close(keys, true_keys, atol=0.03, rtol=0.01)
        torch.testing.assert_close(values, true_values, atol=0.03, rtol=0.01)


def test_quantising_a_read_item_again_changes_nothing(tmp_path: Path) -> None:
    write_item(tmp_path / "once", random_item(dtype=torch.float32), quantize="int8")
    once = read_item(tmp_path / "once")
    write_item(tmp_path / "twice", once)
    assert_same(read_item(tmp_path / "twice"), once)
