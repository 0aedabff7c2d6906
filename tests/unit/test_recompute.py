"""The scatter pass, and the model it runs on."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcag.cache import attention as attend
from kvcag.cache import merge as merging
from kvcag.cache.layers import cache_argument, concat, contiguous_copy, cut, generation_cache, layers_of
from kvcag.cache.merge import Layout, merge, recompute, select
from kvcag.testing import tiny_model
from tests.merging import encode, equal, error, ids, parts_of, tokens_of
from tests.waits import run_together

DOCUMENTS = [ids(length, seed=length) for length in (20, 30, 25)]
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "llama": tiny_model("llama"),
    "qwen3": tiny_model("qwen3", attn_implementation="eager"),
    "gemma3_text": tiny_model("gemma3_text", sliding_window=8, layer_types=MIXED),
}


@pytest.fixture
def model():
    return tiny_model("llama")


def layout_of(parts) -> Layout:
    counts = torch.tensor([len(part.token_ids) for part in parts])
    part_of = torch.arange(len(parts)).repeat_interleave(counts)
    return Layout(tokens_of(parts), part_of, part_of > 1)


def pick(layers, tokens):
    return [(keys[..., tokens, :], values[..., tokens, :]) for keys, values in layers]


def test_chosen_tokens_of_a_right_context_stay_right(model):
    """Every other token of a right cache is lost: recomputing them brings back the cache that was."""
    parts = parts_of(model, ids(5), DOCUMENTS)
    right = encode(model, tokens_of(parts))
    chosen = torch.arange(26, 80, 2)
    layers = contiguous_copy(right)
    for keys, values in layers:
        keys[..., chosen, :], values[..., chosen, :] = 3.0, -3.0
    recompute(model, layers, layout_of(parts), chosen, correct=False)
    assert error(layers, right) < 1e-5


def test_without_correction_the_others_are_untouched(model):
    parts = parts_of(model, ids(5), DOCUMENTS)
    rotated = merge(model, parts, ids(3), strategy="rotate").layers
    layers, chosen = contiguous_copy(rotated), torch.arange(30, 60, 3)
    recompute(model, layers, layout_of(parts), chosen, correct=False)
    others = torch.ones(80, dtype=torch.bool)
    others[chosen] = False
    assert equal(pick(layers, others), pick(rotated, others))
    assert not torch.equal(layers[-1][0], rotated[-1][0])


def test_what_is_exact_is_not_corrected(model):
    parts = parts_of(model, ids(5), DOCUMENTS)
    rotated = merge(model, parts, ids(3), strategy="rotate").layers
    layers = contiguous_copy(rotated)
    recompute(model, layers, layout_of(parts), torch.arange(26, 80, 3))
    assert equal(cut(layers, 0, 25), cut(rotated, 0, 25))
    assert not torch.equal(layers[-1][0][..., 27, :], rotated[-1][0][..., 27, :])


def test_long_passes_attend_block_by_block(model, monkeypatch):
    parts = parts_of(model, ids(5), DOCUMENTS)
    whole = merge(model, parts, ids(3), strategy="full").layers
    monkeypatch.setitem(attend._BLOCK, "cpu", 7)
    assert error(merge(model, parts, ids(3), strategy="full").layers, whole) < 1e-5


@pytest.mark.parametrize("room", [0, 4])
def test_choosing_leaves_no_trace(model, room):
    parts = parts_of(model, ids(5), DOCUMENTS)
    layers = concat([merge(model, parts, ids(3), strategy="rotate").layers], room)
    before = contiguous_copy(layers)
    select(model, layers, layout_of(parts), ids(4), strategy="query", ratio=0.2)
    assert equal(cut(layers, 0, 80), cut(before, 0, 80))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["anchor", "deviation", "query", "full"]),
    st.floats(0.02, 1),
    st.integers(1, 20),
    st.sampled_from(["llama", "gemma3_text", "qwen3"]),
)
def test_recomputing_and_reading_in_one_pass_is_as_in_two(strategy, ratio, tail, family):
    """The context, the question's keys and values and its logits are those of a pass after the other."""
    model = MODELS[family]
    parts, tail_ids = parts_of(model, ids(5), DOCUMENTS), ids(tail, seed=7)
    merged = merge(model, parts, tail_ids, strategy=strategy, ratio=ratio)
    layers, layout = merge(model, parts, tail_ids, strategy="rotate").layers, layout_of(parts)
    chosen = select(model, layers, layout, tail_ids, strategy=strategy, ratio=ratio)
    recompute(model, layers, layout, chosen)
    assert torch.equal(merged.recomputed, chosen)
    assert error(merged.layers, layers) < 1e-5
    cache = generation_cache([layers], tail)
    with torch.no_grad(), attend.by_position(model, torch.arange(80, 80 + tail)):
        logits = model(tail_ids[None], **cache_argument(model, cache), use_cache=True).logits[:, -1]
    assert merged.read is not None
    assert error(layers_of(merged.read.cache), cut(layers_of(cache), 80)) < 1e-5
    torch.testing.assert_close(merged.read.logits, logits, atol=1e-5, rtol=1e-5)


def test_a_long_history_behind_the_documents_is_read_in_passes_of_its_own(model, monkeypatch):
    monkeypatch.setattr(merging, "_LONGEST_TAIL", 5)
    parts = parts_of(model, ids(5), DOCUMENTS)
    assert merge(model, parts, ids(5), strategy="query").read is not None
    assert merge(model, parts, ids(6), strategy="query").read is None


@pytest.mark.parametrize("way", [attend._by_products, attend._grouped])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("scattered", [True, False])
def test_heads_that_share_keys_attend_as_under_a_mask(way, window, scattered):
    """In fp32, where both can be compared; products are used in bf16."""
    positions = torch.randperm(300)[:90].sort().values if scattered else torch.arange(210, 300)
    query, (key, value) = torch.randn(1, 6, 90, 16), torch.randn(2, 1, 2, 300, 16).unbind()
    call = attend.Call(positions, 0.3, window, None, attend.Masks(positions))
    blocks = attend._seen(positions, positions.device)
    right = [
        attend._sdpa(query[:, :, block], key[:, :, :n], value[:, :, :n], call.mask(block, n), 0.3)
        for block, n in blocks
    ]
    for _ in range(2):  # with masks that are made, and with those that were
        torch.testing.assert_close(way(call, blocks, query, key, value), torch.cat(right, dim=1))


@pytest.mark.parametrize("keys", [40, 1023, 1024, 2001])
def test_one_query_in_bf16_attends_as_in_fp32(keys):
    key, value = torch.randn(2, 1, 3, keys + 9, 32).bfloat16().unbind()
    query = 2 * torch.randn(1, 9, 1, 32).bfloat16()
    got = attend.one_query(query, key[:, :, :keys], value[:, :, :keys], 0.2)
    wide = [t.repeat_interleave(3, 1)[:, :, :keys].float() for t in (key, value)]
    right = torch.nn.functional.scaled_dot_product_attention(query.float(), *wide, scale=0.2).transpose(1, 2)
    assert (got.float() - right).norm() < 2e-2 * right.norm()  # scores of up to 8 are rounded to 8 bits


def test_masks_that_take_much_memory_are_not_held(monkeypatch):
    positions = torch.arange(20, 30)
    masks = attend.Masks(positions)
    call = attend.Call(positions, 1.0, None, None, masks)
    monkeypatch.setattr(attend, "_MASKS", 60)
    assert call.hidden(slice(0, 5), 25)[1].tolist() == call.hidden(slice(0, 5), 25)[1].tolist()
    assert masks._bytes == 20
    call.hidden(slice(0, 10), 30)
    assert masks._bytes == 20


@pytest.mark.parametrize("count", [1, 16, 17, 500])
def test_blocks_of_scattered_queries_hold_each_once_and_stand_near_each_other(count):
    at = torch.randperm(8000)[:count].sort().values.tolist()
    blocks = attend._near(at)
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(count))
    assert all(b.stop - b.start <= 16 or at[b.stop - 1] - at[b.start] <= 256 for b in blocks)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("strategy", ["deviation", "query", "full"])
def test_the_attention_implementation_is_put_back(implementation, strategy):
    model = tiny_model("llama", attn_implementation=implementation)
    merge(model, parts_of(model, ids(5), DOCUMENTS), ids(3), strategy=strategy)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("strategy", ["deviation", "query", "full"])
def test_the_attention_implementation_is_put_back_when_the_pass_raises(model, strategy):
    parts = parts_of(model, ids(5), DOCUMENTS)
    merge(model, parts, ids(3), strategy="rotate")  # what is measured once is measured
    stored = [contiguous_copy(part.layers) for part in parts]

    def fail(*args):
        raise MemoryError("in the middle")

    layer = 0 if strategy == "deviation" else 1
    handle = model.model.layers[layer].mlp.register_forward_hook(fail)
    with pytest.raises(MemoryError, match="in the middle"):
        merge(model, parts, ids(3), strategy=strategy)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert all(equal(part.layers, kept) for part, kept in zip(parts, stored, strict=True))
    assert error(merge(model, parts, ids(3), strategy="full").layers, encode(model, tokens_of(parts))) < 1e-5


def test_another_thread_may_run_the_model_meanwhile(model):
    """The attention implementation is in the configuration, which all threads see."""
    token_ids = ids(40)
    padded = torch.ones(1, 40, dtype=torch.long)
    padded[:, :5] = 0

    def plain():
        with torch.no_grad():
            return model(token_ids[None], attention_mask=padded).logits

    right, found = plain(), []
    with attend.by_position(model, torch.arange(40)):
        other = threading.Thread(target=lambda: found.append(plain()))
        run_together([other])
    assert torch.equal(found[0], right)


@pytest.mark.parametrize("size", [64, 1024])
@pytest.mark.parametrize("queries", [0, 1, 32, 33, 64, 65, 97, 705, 1025, 2049])
def test_no_block_leaves_one_query_over(queries, size):
    """pytorch#191937: with keys that are broadcast, the last query of 65, 129, … was wrong on a GPU."""
    blocks = attend._blocks(queries, size)
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(queries))
    lengths = [block.stop - block.start for block in blocks]
    assert all(0 < n <= size and (n == 1 or n % 32 != 1) for n in lengths)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel runs on CUDA alone")
@pytest.mark.parametrize("queries", [33, 65, 129, 705])
def test_the_last_query_is_right_on_a_gpu(queries):
    """pytorch#191937 again, on the real kernel."""
    model = tiny_model("llama", hidden_size=256, head_dim=64, max_position_embeddings=4096).to("cuda")
    token_ids = ids(800)
    right = encode(model, token_ids)
    layers = contiguous_copy(right)
    positions = torch.arange(800 - queries, 800)
    for keys, values in layers:
        keys[..., positions, :] = 0
        values[..., positions, :] = 0
    part_of = torch.zeros(800, dtype=torch.long)
    recompute(model, layers, Layout(token_ids, part_of, part_of == 0), positions, correct=False)
    for one, other in zip(layers, right, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
