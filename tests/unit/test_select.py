"""Which tokens a strategy picks."""

import pytest
import torch

from kvcag.cache import merge as selection
from kvcag.cache.layers import cache_argument, cache_of, contiguous_copy, layers_of
from kvcag.cache.merge import Layout, anchor, deviation, merge, query, select
from kvcag.testing import tiny_model
from tests.merging import encode, ids, parts_of, tokens_of

LENGTHS = (4, 10, 1, 20, 15)
PART_OF = torch.arange(5).repeat_interleave(torch.tensor(LENGTHS))
TAIL = ids(6, seed=9)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request):
    return tiny_model(request.param, attn_implementation="eager")


@pytest.fixture(scope="module")
def rotated(model):
    parts = parts_of(model, ids(4), [ids(length, seed=length) for length in LENGTHS[1:]])
    return merge(model, parts, TAIL, strategy="rotate").layers, Layout(tokens_of(parts), PART_OF, PART_OF > 1)


def test_anchors_are_the_first_tokens_of_each_open_document(model, rotated):
    layers, layout = rotated
    chosen = select(model, layers, layout, TAIL, strategy="anchor", ratio=0.2)
    # Four tokens of each document where it has them; then, in order, the first of those that follow.
    assert chosen.tolist() == [14, 15, 16, 17, 18, 19, 35, 36, 37, 38]


def test_the_query_score_is_attention_times_value_norm(model, rotated):
    """Against the attention maps that the model itself returns."""
    layers, layout = rotated
    with torch.no_grad():
        maps = model(TAIL[None], **cache_argument(model, cache_of(layers)), output_attentions=True).attentions
    expected = torch.zeros(50)
    for weights, (_, values) in zip(maps, layers, strict=True):
        norms = values[0].norm(dim=-1).repeat_interleave(2, dim=0)
        expected += (weights[0, :, :, :50].sum(1) * norms).sum(0)
    with torch.no_grad():
        torch.testing.assert_close(query(model, layers, layout, TAIL), expected, rtol=1e-4, atol=1e-6)


def test_the_query_score_is_the_same_in_blocks(model, rotated, monkeypatch):
    layers, layout = rotated
    with torch.no_grad():
        whole = query(model, layers, layout, TAIL)
        monkeypatch.setitem(selection._WEIGHTS, "cpu", 300)
        torch.testing.assert_close(query(model, layers, layout, TAIL), whole)


def test_deviation_is_the_change_in_layer_1(model, rotated):
    layers, layout = rotated
    right = encode(model, layout.token_ids)
    with torch.no_grad():
        scores = deviation(model, contiguous_copy(layers), layout, TAIL)
    expected = sum((a - b).square().sum(dim=(0, 1, 3)) for a, b in zip(layers[1], right[1], strict=True))
    torch.testing.assert_close(scores[14:], expected[14:], rtol=1e-3, atol=1e-5)
    assert not scores[:14].any()


def test_anchor_scores_fall_within_a_document(rotated):
    _, layout = rotated
    assert anchor(None, [], layout, TAIL).tolist() == [float(-i) for length in LENGTHS for i in range(length)]


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (0.01, 0), (0.02, 1), (0.5, 25), (0.9, 36), (1.0, 36)])
def test_the_budget_is_a_share_of_all_tokens_rounded_down(model, rotated, ratio, expected):
    layers, layout = rotated
    for strategy in ("anchor", "deviation", "query"):
        assert len(select(model, layers, layout, TAIL, strategy=strategy, ratio=ratio)) == expected


def test_one_layer_is_enough_for_deviation():
    model = tiny_model("llama", num_hidden_layers=1)
    parts = parts_of(model, ids(4), [ids(10, seed=1), ids(10, seed=2)])
    assert len(merge(model, parts, TAIL, strategy="deviation", ratio=0.25).recomputed) == 6
    assert layers_of(cache_of(parts[0].layers))
