from __future__ import annotations

import threading

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcag.cache.layers import LayerKV, concat, nbytes
from kvcag.cache.prefix_cache import PrefixCache
from tests.waits import run_together

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def layers_for(token_ids: list[int], salt: int = 0) -> list[LayerKV]:
    """Keys and values that depend on the whole prefix, as a model's do."""
    states = [hash((salt, *token_ids[: i + 1])) % 10_007 for i in range(len(token_ids))]
    keys = torch.tensor(states, dtype=torch.float32).reshape(1, 1, -1, 1).repeat(1, 2, 1, 4)
    return [(keys, -keys), (keys + 1, -keys - 1)]


def same(a: list[LayerKV], b: list[LayerKV]) -> bool:
    return all(torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


@given(st.lists(TOKENS, max_size=12), TOKENS)
@settings(max_examples=200, deadline=None)
def test_it_finds_the_longest_prefix_and_its_own_keys(contexts: list[list[int]], wanted: list[int]) -> None:
    cache = PrefixCache(1 << 30)
    for context in contexts:
        cache.insert(context, layers_for(context))
    matched, pieces = cache.match(wanted)
    longest = 0
    for context in contexts:
        shared = next((i for i, (a, b) in enumerate(zip(context, wanted, strict=False)) if a != b), None)
        longest = max(longest, min(len(context), len(wanted)) if shared is None else shared)
    assert matched == longest
    if matched:
        assert same(concat(pieces), layers_for(wanted[:matched]))
    else:
        assert pieces == []


@given(st.lists(TOKENS, max_size=12))
@settings(max_examples=100, deadline=None)
def test_shared_beginnings_are_kept_once(contexts: list[list[int]]) -> None:
    cache = PrefixCache(1 << 30)
    for context in contexts:
        cache.insert(context, layers_for(context))
    distinct = {tuple(context[: i + 1]) for context in contexts for i in range(len(context))}
    assert cache.nbytes == len(distinct) * nbytes(layers_for([0]))


@given(st.lists(TOKENS, max_size=20), st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_the_budget_holds(contexts: list[list[int]], tokens: int) -> None:
    cache = PrefixCache(tokens * nbytes(layers_for([0])))
    for context in contexts:
        cache.insert(context, layers_for(context))
        assert cache.nbytes <= cache.max_bytes
        if len(context) <= tokens:
            assert cache.match(context)[0] == len(context)


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(2 * nbytes(layers_for([0, 0, 0])))
    cache.insert([1, 1, 1], layers_for([1, 1, 1]))
    cache.insert([2, 2, 2], layers_for([2, 2, 2]))
    cache.match([1, 1, 1])
    cache.insert([3, 3, 3], layers_for([3, 3, 3]))
    assert [cache.match([i, i, i])[0] for i in (1, 2, 3)] == [3, 0, 3]


def held(cache: PrefixCache) -> int:
    """Bytes of memory that the cache keeps alive, shared memory counted once."""
    nodes, storages = list(cache._roots.values()), {}
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children.values())
        for tensor in (t for kv in node.layers for t in kv):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@given(st.lists(TOKENS, max_size=20), st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_no_more_memory_is_held_than_is_counted(contexts: list[list[int]], tokens: int) -> None:
    cache = PrefixCache(tokens * nbytes(layers_for([0])))
    for context in contexts:
        cache.insert(context, layers_for(context))
        assert held(cache) == cache.nbytes


def test_what_was_inserted_is_a_copy() -> None:
    cache, layers = PrefixCache(1 << 20), layers_for([1, 2])
    cache.insert([1, 2], layers)
    layers[0][0].zero_()
    assert same(concat(cache.match([1, 2])[1]), layers_for([1, 2]))


def test_tenants_share_nothing() -> None:
    cache = PrefixCache(1 << 20)
    cache.insert([1, 2], layers_for([1, 2]), namespace="a")
    assert cache.match([1, 2], "a")[0] == 2
    assert cache.match([1, 2], "b")[0] == 0
    assert cache.match([1, 2])[0] == 0


def test_threads_never_see_half_a_split() -> None:
    cache, wrong = PrefixCache(200 * nbytes(layers_for([0]))), []
    contexts = [[i % 3, j % 2, k % 2, *range(5)] for i in range(3) for j in range(2) for k in range(2)]

    def work(offset: int) -> None:
        for step in range(150):
            context = contexts[(step * 7 + offset) % len(contexts)]
            cache.insert(context, layers_for(context))
            matched, pieces = cache.match(context)
            if matched and not same(concat(pieces), layers_for(context[:matched])):
                wrong.append(context)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    run_together(threads)
    assert wrong == []


def test_a_run_is_found_where_it_goes_on_longest() -> None:
    """Two turns that began alike were one: the later one."""
    cache = PrefixCache(1 << 20, turn_ids=[1])
    turn, other = [1, *range(10, 50)], [1, *range(60, 100)]
    context = [2, *turn, *other, *turn, 3]
    cache.insert(context, layers_for(context))
    prompt = [4, *turn, *other, 5]
    [run] = cache.runs(prompt, 1)
    assert (run.start, run.stood, run.length) == (1, 1, 82)
    kept = concat(run.pieces)
    assert torch.equal(kept[0][0], layers_for(context)[0][0][..., 1:83, :])


def test_a_run_goes_on_through_the_parts_of_split_contexts() -> None:
    cache = PrefixCache(1 << 20, turn_ids=[1])
    turn = [1, *range(10, 90)]
    context = [2, *turn]
    for inserted in (context, [*context[:30], 7], [*context[:45], 7]):  # the first is split where the others leave it
        cache.insert(inserted, layers_for(inserted))
    [run] = cache.runs([4, *turn], 0)
    assert (run.start, run.stood, run.length) == (1, 1, 81)
    [run] = cache.runs([4, *turn], 11)  # from within a turn on
    assert (run.start, run.stood, run.length) == (11, 11, 71)


def test_a_run_is_32_tokens_at_least_and_of_one_namespace() -> None:
    cache = PrefixCache(1 << 20, turn_ids=[1])
    context = [2, 1, *range(10, 41)]
    cache.insert(context, layers_for(context), "mine")
    assert len(cache.runs([4, *context[1:]], 1, "mine")) == 1
    assert cache.runs([4, *context[1:-1]], 1, "mine") == []
    assert cache.runs([4, *context[1:]], 1) == []
