"""The drift of recomputed tokens, given to the others."""

import torch

from kvcag.cache import merge as drifts
from kvcag.cache.attention import PositionShift, rotations
from kvcag.cache.layers import contiguous_copy
from kvcag.cache.merge import DriftCorrection, Layout, _Drift
from kvcag.testing import tiny_model
from tests.merging import equal, ids

HEADS, HEAD_DIM, LAYERS = 2, 8, 3
PART_OF = torch.arange(3).repeat_interleave(torch.tensor([4, 400, 300]))
LAYOUT = Layout(ids(704), PART_OF, PART_OF > 0)
CHOSEN = torch.arange(4, 704, 3)
OTHERS = torch.tensor([i for i in range(4, 704) if (i - 4) % 3])


def a_cache() -> list:
    torch.manual_seed(0)
    return [(torch.randn(1, HEADS, 704, HEAD_DIM), torch.randn(1, HEADS, 704, HEAD_DIM)) for _ in range(LAYERS)]


def corrected(layers, new):
    """`layers` after a scatter pass that would bring `new` for the chosen tokens."""
    layers = contiguous_copy(layers)
    correction = DriftCorrection(tiny_model("llama"), LAYOUT, CHOSEN)
    for index, held in enumerate(layers):
        correction.watch(index, held, tuple(t[..., CHOSEN, :] for t in new[index]))
    return layers


def shifted(layers, by):
    """The layers, each document's keys (as at position 0) and values moved by a constant of its own."""
    move = PositionShift(rotations(tiny_model("llama")), torch.zeros_like(PART_OF), torch.arange(704))
    shifts = by[PART_OF].expand(1, HEADS, 704, HEAD_DIM).clone()
    turned = shifts.clone()
    move.turn(0, (turned, shifts))
    return [(keys + turned, values + shifts) for keys, values in layers]


def test_a_documents_common_drift_is_given_to_its_other_tokens():
    layers = a_cache()
    by = torch.randn(3, HEAD_DIM)
    after, right = corrected(layers, shifted(layers, by)), shifted(layers, by)
    for one, before, goal in zip(after, layers, right, strict=True):
        for t, b, g in zip(one, before, goal, strict=True):
            left, was = ((x - g)[..., OTHERS, :].norm() for x in (t, b))
            assert left < 0.5 * was  # four tenths are held back on purpose


def test_no_drift_changes_nothing_much():
    layers = a_cache()
    for one, before in zip(corrected(layers, layers), layers, strict=True):
        for t, b in zip(one, before, strict=True):
            torch.testing.assert_close(t, b, atol=1e-5, rtol=0)


def test_drift_that_follows_the_features_is_foreseen():
    torch.manual_seed(1)
    features, slope = torch.randn(HEADS, 500, 16), 0.3 * torch.randn(HEADS, 16, 16)
    part_of = torch.zeros(500, dtype=torch.long)
    fitted = _Drift.fit(
        features[:, :400], (features @ slope)[:, :400], part_of[:400], drifts.averages(part_of[:400], 1)
    )
    foreseen, right = fitted.of(features[:, 400:], part_of[400:]), (features @ slope)[:, 400:]
    assert torch.cosine_similarity(foreseen, right, dim=-1).mean() > 0.95


def test_a_document_without_recomputed_tokens_gets_the_mean_of_all():
    averages = drifts.averages(torch.tensor([1, 1, 2, 2]), 4)
    of = torch.tensor([1.0, 1.0, 3.0, 3.0])
    torch.testing.assert_close(averages @ of, torch.tensor([2.0, 10 / 6, 14 / 6, 2.0]))


def test_a_single_recomputed_token_does_no_harm():
    layers = a_cache()
    correction = DriftCorrection(tiny_model("llama"), LAYOUT, CHOSEN[:1])
    held = contiguous_copy(layers)[0]
    correction.watch(0, held, tuple(t[..., CHOSEN[:1], :] + 0.1 for t in layers[0]))
    assert all(t.isfinite().all() for t in held)


def test_blocks_make_no_difference(monkeypatch):
    layers = a_cache()
    new = shifted(layers, torch.randn(3, HEAD_DIM))
    whole = corrected(layers, new)
    monkeypatch.setitem(drifts._BLOCK, "cpu", 50)
    for one, other in zip(corrected(layers, new), whole, strict=True):
        for t, u in zip(one, other, strict=True):
            torch.testing.assert_close(t, u, atol=1e-5, rtol=1e-5)


def test_with_every_token_recomputed_there_is_nothing_to_correct():
    layers = a_cache()
    held = contiguous_copy(layers)
    everything = LAYOUT.open.nonzero()[:, 0]
    correction = DriftCorrection(tiny_model("llama"), LAYOUT, everything)
    correction.watch(0, held[0], tuple(t[..., everything, :] + 1 for t in held[0]))
    assert equal(held, layers)


def test_tokens_among_exact_ones_get_their_drift_and_the_exact_ones_none():
    """Blocks with gaps are gathered, those without are views: what comes of both is the same."""
    layers, by = a_cache(), torch.randn(3, HEAD_DIM)
    is_open = LAYOUT.open.clone()
    is_open[150:160:2] = False  # within the first document
    chosen = CHOSEN[is_open[CHOSEN]]
    held = [contiguous_copy(layers) for _ in range(2)]
    new = shifted(layers, by)
    for which, open_ in zip(held, (LAYOUT.open, is_open), strict=True):
        correction = DriftCorrection(tiny_model("llama"), Layout(LAYOUT.token_ids, PART_OF, open_), chosen)
        assert any(isinstance(block.places, slice) for block in correction.rest)
        for index, kv in enumerate(which):
            correction.watch(index, kv, tuple(t[..., chosen, :] for t in new[index]))
    same = [i for i in OTHERS.tolist() if is_open[i]]
    for views, gathered, before in zip(*held, layers, strict=True):
        for a, b, was in zip(views, gathered, before, strict=True):
            torch.testing.assert_close(a[..., same, :], b[..., same, :])
            assert equal([(b[..., 150:160:2, :],) * 2], [(was[..., 150:160:2, :],) * 2])
            assert not torch.equal(b[..., same, :], was[..., same, :])
