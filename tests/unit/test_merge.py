"""Any permutation and any subset: right, and nothing that is stored changes."""

import dataclasses
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import contiguous_copy, cut
from kvcag.cache.merge import Part, merge
from kvcag.core import MergeStrategy
from kvcag.errors import InvalidInputError
from kvcag.testing import byte_tokenizer, tiny_model
from tests.forwards import forward_lengths
from tests.merging import encode, equal, error, ids, parts_of, tokens_of

MODEL = tiny_model("llama", num_hidden_layers=2)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
SLIDING = tiny_model("gemma3_text", sliding_window=8, layer_types=MIXED)
HEAD = ids(5)
DOCUMENTS = [ids(length, seed=length) for length in (1, 2, 7, 16, 1, 30)]
TAIL = ids(6, seed=99)
STORED = {model: parts_of(model, HEAD, DOCUMENTS) for model in (MODEL, SLIDING)}

orders = st.lists(st.integers(0, len(DOCUMENTS) - 1), min_size=1, max_size=8)
strategies = st.sampled_from(get_args(MergeStrategy))
ratios = st.floats(0, 1)
models = st.sampled_from([MODEL, SLIDING])


def context(model, order) -> list[Part]:
    head, *documents = STORED[model]
    return [head, *(dataclasses.replace(documents[i], is_exact=n == 0) for n, i in enumerate(order))]


@settings(deadline=None, max_examples=60)
@given(models, orders, strategies, ratios)
def test_length_budget_and_what_is_exact(model, order, strategy, ratio):
    parts = context(model, order)
    before = [contiguous_copy(part.layers) for part in parts]
    merged = merge(model, parts, TAIL, strategy=strategy, ratio=ratio)

    tokens = tokens_of(parts)
    right = encode(model, tokens)
    exact = len(HEAD) + len(parts[1].token_ids)
    assert {t.shape for kv in merged.layers for t in kv} == {t.shape for kv in right for t in kv}
    assert error(cut(merged.layers, 0, exact), cut(right, 0, exact)) < 1e-5

    chosen = merged.recomputed
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen, chosen.unique())
    assert not len(chosen) or exact <= chosen.min() <= chosen.max() < len(tokens)
    if strategy == "full" or (ratio == 1 and strategy != "rotate"):
        assert len(chosen) == len(tokens) - exact
        assert error(merged.layers, right) < 1e-5
    elif strategy == "rotate":
        assert not len(chosen)
    else:
        assert len(chosen) == min(int(ratio * len(tokens)), len(tokens) - exact)

    assert all(equal(part.layers, kept) for part, kept in zip(parts, before, strict=True))


@settings(deadline=None, max_examples=30)
@given(models, orders)
def test_a_rotated_key_is_the_key_encoded_at_its_position(model, order):
    """Layer 0 sees no other token: there, re-rotation alone is exact."""
    parts = context(model, order)
    merged = merge(model, parts, TAIL, strategy="rotate")
    right = encode(model, tokens_of(parts))
    assert error(merged.layers[:1], right[:1]) < 1e-4


@settings(deadline=None, max_examples=20)
@given(orders, strategies)
def test_the_same_twice_is_bitwise_the_same(order, strategy):
    one, two = (merge(MODEL, context(MODEL, order), TAIL, strategy=strategy) for _ in range(2))
    assert torch.equal(one.recomputed, two.recomputed)
    assert equal(one.layers, two.layers)


def test_sixty_four_documents():
    documents = [ids(3 + seed % 5, seed=seed) for seed in range(64)]
    parts = parts_of(MODEL, HEAD, documents)
    merged = merge(MODEL, parts, TAIL, strategy="full")
    assert error(merged.layers, encode(MODEL, tokens_of(parts))) < 1e-5


def test_a_document_longer_than_the_window():
    parts = parts_of(SLIDING, HEAD, [ids(11, seed=1), ids(60, seed=2), ids(9, seed=3)])
    merged = merge(SLIDING, parts, TAIL, strategy="full")
    assert error(merged.layers, encode(SLIDING, tokens_of(parts))) < 1e-5


def test_without_a_head():
    parts = parts_of(MODEL, HEAD[:0], DOCUMENTS)
    merged = merge(MODEL, parts, TAIL, strategy="full")
    assert error(merged.layers, encode(MODEL, tokens_of(parts))) < 1e-5


def test_documents_encoded_alone_are_moved_from_where_they_stood():
    head, *_ = STORED[MODEL]
    alone = [Part(document, encode(MODEL, document), 0, False) for document in DOCUMENTS]
    merged = merge(MODEL, [head, *alone], TAIL, strategy="full")
    assert error(merged.layers, encode(MODEL, tokens_of([head, *alone]))) < 1e-5


def test_an_empty_question_is_chosen_for_like_deviation():
    parts = context(MODEL, [3, 5, 2])
    asked, unasked = (merge(MODEL, parts, TAIL[:0], strategy=s) for s in ("query", "deviation"))
    assert torch.equal(asked.recomputed, unasked.recomputed)


def test_another_question_chooses_other_tokens():
    model = tiny_model("llama", initializer_range=0.5)  # attention that is not flat
    parts = parts_of(model, HEAD, [DOCUMENTS[i] for i in (3, 5, 2)])
    one, other = (merge(model, parts, tail).recomputed for tail in (TAIL, ids(6, seed=7)))
    assert not torch.equal(one, other)


def test_exact_parts_alone_cost_nothing():
    merged = merge(MODEL, context(MODEL, [5]), TAIL, strategy="full")
    assert not len(merged.recomputed)


def test_the_result_shares_no_memory_with_what_is_stored():
    parts = context(MODEL, [5])
    merged = merge(MODEL, parts, TAIL, strategy="rotate")
    stored = {t.untyped_storage().data_ptr() for part in parts for kv in part.layers for t in kv}
    assert not stored & {t.untyped_storage().data_ptr() for kv in merged.layers for t in kv}
    assert not any(t.is_inference() or t.requires_grad for kv in merged.layers for t in kv)


def test_bfloat16_full_is_close_to_a_full_prefill():
    model = tiny_model("llama", dtype=torch.bfloat16)
    parts = parts_of(model, HEAD, DOCUMENTS)
    merged = merge(model, parts, TAIL, strategy="full")
    assert merged.layers[0][0].dtype == torch.bfloat16
    assert error(merged.layers, encode(model, tokens_of(parts))) < 2e-2


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_an_impossible_ratio_is_refused(ratio):
    with pytest.raises(InvalidInputError, match="from 0 to 1"):
        merge(MODEL, context(MODEL, [1]), TAIL, ratio=ratio)


def test_an_unknown_strategy_is_refused_by_name():
    with pytest.raises(InvalidInputError, match=r"'blend'.*query"):
        merge(MODEL, context(MODEL, [1]), TAIL, strategy="blend")


def test_nothing_to_merge_is_refused():
    with pytest.raises(InvalidInputError, match="no tokens"):
        merge(MODEL, [Part(HEAD[:0], [], 0, True)], TAIL)


def test_ids_that_do_not_fit_their_keys_are_refused():
    head, document, *_ = context(MODEL, [5])
    with pytest.raises(InvalidInputError, match="part 1 has 29 token ids"):
        merge(MODEL, [head, dataclasses.replace(document, token_ids=document.token_ids[1:])], TAIL)


def test_a_question_over_merged_documents_takes_two_passes():
    """One chooses, the other recomputes and reads the question; the first token follows from it."""
    engine = HFEngine(tiny_model("llama"), byte_tokenizer())
    memory = KVCacheMemory(engine)
    known = memory.add([f"Document {n} says this, and that, and a few more words. " * 2 for n in range(3)])
    with forward_lengths(engine.model.get_decoder()) as lengths:
        answer = memory.ask("What?", known[::-1], strategy="query", ratio=0.1, max_new_tokens=1)
    context = memory.merge(known[::-1], "What?", strategy="query", ratio=0.1)
    tail = len(context.tail_ids)
    assert lengths == [tail, answer.report.recomputed_tokens + tail]
    assert answer.report.recomputed_tokens > 20


def test_a_question_that_was_read_with_the_context_is_answered_as_one_that_is_read_behind_it():
    engine = HFEngine(tiny_model("llama"), byte_tokenizer(), prefix_cache_bytes=0)
    memory = KVCacheMemory(engine)
    known = memory.add([f"Document {n} says this, and that, and a few more words. " * 2 for n in range(3)])
    context = memory.merge(known[::-1], "What?", strategy="query", ratio=0.1)
    assert context.read is not None
    behind = dataclasses.replace(context, read=None)
    assert engine.generate(context, max_new_tokens=20) == engine.generate(behind, max_new_tokens=20)
    other = engine.generate("Which other?", context, max_new_tokens=20)
    assert other == engine.generate("Which other?", behind, max_new_tokens=20)
