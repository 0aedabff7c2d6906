"""Re-rotation, apart from any one family (those are in test_families)."""

import gc
import weakref

import pytest
import torch

from kvcag.cache import attention as rope
from kvcag.cache.attention import PositionShift, Rotation, check_mergeable, rotations
from kvcag.cache.layers import contiguous_copy
from kvcag.errors import UnsupportedModelError
from kvcag.testing import tiny_model
from tests.merging import encode, encode_at, error, ids


class Table(torch.nn.Module):
    def __init__(self, frequencies):
        super().__init__()
        self.register_buffer("inv_freq", torch.tensor(frequencies))


def turned(rotation: Rotation, keys, start, end):
    out = torch.empty_like(keys)
    at = torch.arange(keys.shape[-2])
    rotation.turn(keys, rotation.angles(start + at, end + at), out)
    return out


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_quarter_turn_by_hand(interleaved):
    rotation = Rotation(Table([torch.pi / 2]), "inv_freq", interleaved)
    keys = torch.tensor([[[[1.0, 2.0, 7.0]]]])
    torch.testing.assert_close(turned(rotation, keys, 0, 1), torch.tensor([[[[-2.0, 1.0, 7.0]]]]))


def test_pairs_are_half_a_head_apart_or_neighbours():
    table, keys = Table([torch.pi / 2, 0.0]), torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    halves = turned(Rotation(table, "inv_freq"), keys, 0, 1)
    torch.testing.assert_close(halves, torch.tensor([[[[-3.0, 2.0, 1.0, 4.0]]]]))
    neighbours = turned(Rotation(table, "inv_freq", interleaved=True), keys, 0, 1)
    torch.testing.assert_close(neighbours, torch.tensor([[[[-2.0, 1.0, 3.0, 4.0]]]]))


def test_half_precision_keys_are_turned_in_float32():
    rotation = Rotation(Table([1.0, 0.1, 0.01, 0.001]), "inv_freq")
    keys = torch.randn(1, 2, 5, 8)
    exact = turned(rotation, keys.bfloat16().float(), 11, 1234).bfloat16()
    assert torch.equal(turned(rotation, keys.bfloat16(), 11, 1234), exact)


def test_keys_stay_right_100000_positions_away():
    """The model rounds `position * frequency` to fp32: turned by the difference of positions, keys are off by 1e-4."""
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=200_000)
    encoded, expected = (encode_at(model, ids(9), position) for position in (3, 100_003))
    PositionShift(rotations(model), torch.arange(3, 12), torch.arange(100_003, 100_012)).turn(0, encoded[0])
    assert error(encoded, expected) < 1e-6


def test_there_and_back():
    model = tiny_model("llama")
    layers = encode(model, ids(9))
    move = PositionShift(rotations(model), torch.arange(9), torch.arange(500, 509))
    moved = contiguous_copy(layers)
    for index, kv in enumerate(moved):
        move.turn(index, kv)
    assert error(moved, layers) > 0.1
    for index, kv in enumerate(moved):
        move.turn(index, kv, back=True)
    assert error(moved, layers) < 1e-6


def test_frequencies_are_read_when_they_are_used():
    """`model.to(bfloat16)` rounds them, and keys made after that are rotated with the rounded ones."""
    model = tiny_model("llama")
    before = rotations(model)[0].frequencies.clone()
    model.to(torch.bfloat16)
    after = rotations(model)[0].frequencies
    assert not torch.equal(before, after)
    assert torch.equal(after, model.model.rotary_emb.inv_freq.float())


def test_a_model_is_measured_once(monkeypatch):
    model = tiny_model("llama")
    check_mergeable(model)
    monkeypatch.setattr(rope, "_measure", lambda model: pytest.fail("measured again"))
    check_mergeable(model)


def test_a_measured_model_can_be_released():
    model = tiny_model("llama")
    check_mergeable(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_rotation_that_nobody_knows_is_refused():
    """A model that rotates by twice its table, as an architecture of tomorrow might."""
    model = tiny_model("llama")
    forward = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: forward(x, 2 * position_ids)
    with pytest.raises(UnsupportedModelError, match="its rotation is unknown"):
        check_mergeable(model)


def test_attention_that_is_not_transformers_own_is_refused():
    """Recomputing single tokens would be wrong where the attention function is not asked."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.config = type(model.config)(**model.config.to_dict())
        layer.self_attn.config._attn_implementation = "eager"
    with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
        check_mergeable(model)
    assert error(encode(model, ids(3)), encode(model, ids(3))) == 0
