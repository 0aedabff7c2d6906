"""A generation's cache over what it was lent: whoever reads it cannot tell."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kvcag.cache import layers
from kvcag.cache.layers import GenerationCache, LayerKV, crop, cut, generation_cache, layers_of

LENGTH = 700
PLACES = {"alone": [0, LENGTH], "first": [0, 600, LENGTH], "between": [0, 30, 650, LENGTH], "last": [0, 40, LENGTH]}


@pytest.fixture
def held() -> list[LayerKV]:
    torch.manual_seed(0)
    return [(torch.randn(1, 2, LENGTH, 8), torch.randn(1, 2, LENGTH, 8)) for _ in range(3)]


@pytest.fixture
def lending(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too, where no kernel could read it."""
    monkeypatch.setattr(layers, "readable", lambda layers: True)


def caches(held: list[LayerKV], place: str) -> tuple[GenerationCache, GenerationCache]:
    ends = PLACES[place]
    parts = [cut(held, start, end) for start, end in pairwise(ends)]
    lent, copied = (generation_cache(parts, room=4, lent=lent) for lent in (True, False))
    assert isinstance(lent, GenerationCache)
    assert isinstance(copied, GenerationCache)
    table = lent.addresses(0)
    assert table is not None
    sizes = [end - start for start, end in pairwise(ends)]
    assert table[0, 7] == max(sizes)
    assert table[0, 6] == ends[sizes.index(max(sizes))]
    return lent, copied


def equal(left: list[LayerKV], right: list[LayerKV]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("lending")
def test_lent_and_copied_are_read_alike(held, place):
    for start in (0, 10, 300, 645, 690, LENGTH):
        lent, copied = caches(held, place)
        assert lent.get_seq_length() == LENGTH
        assert equal(lent.behind(start), copied.behind(start))
        assert lent.addresses(0)[0, 7] > 0, "still lent"
    assert equal(layers_of(lent), held)
    assert lent.addresses(0)[0, 7] == 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("lending")
def test_what_is_written_behind_it_leaves_the_lender_alone(held, place):
    before = [tuple(t.clone() for t in kv) for kv in held]
    lent, copied = caches(held, place)
    for length in (5, 1):
        new = torch.randn(1, 2, length, 8)
        for cache in (lent, copied):
            for index in range(3):
                cache.update(new, new + 1, index)
    assert equal(layers_of(lent), layers_of(copied))
    for cache in (lent, copied):
        crop(cache, LENGTH + 2)
        crop(cache, LENGTH - 400)
    assert equal(layers_of(lent), layers_of(copied))
    assert equal(held, before)


@pytest.mark.usefixtures("lending")
def test_a_table_of_addresses_follows_the_buffers(held):
    lent, _ = caches(held, "first")
    first = lent.addresses(4)
    lent.advance(4)
    assert lent.addresses(0) is first
    grown = lent.addresses(1)
    assert grown[0, 2] > first[0, 2]
    assert lent.get_seq_length() == LENGTH + 4


def test_short_parts_are_copied(held):
    cache = generation_cache([cut(held, 0, 100)], room=4, lent=True)
    assert isinstance(cache, GenerationCache)
    assert cache.addresses(0)[0, 7] == 0
