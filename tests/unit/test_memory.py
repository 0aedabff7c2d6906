from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from transformers import DynamicCache

from kvcag import (
    CacheWarning,
    Document,
    HFEngine,
    KVCacheItem,
    KVCacheMemory,
    MergedContext,
    Sampling,
    TextualMemoryItem,
)
from kvcag.cache.layers import cache_argument, layers_of
from kvcag.errors import (
    ContextLengthError,
    EmptyPromptError,
    FingerprintMismatchError,
    InvalidInputError,
    StoreUnavailableError,
    UnknownItemError,
)
from kvcag.stores.disk import DiskStore
from kvcag.stores.memory import MemoryStore
from kvcag.stores.remote import open_at
from kvcag.testing import byte_tokenizer, tiny_model

TEXTS = ["Alice has a red bicycle.", "Bob has a green car.", "Carol has a boat."]
HEAD = "Answer from the documents."
ENGINE = HFEngine(tiny_model(), byte_tokenizer())


@pytest.fixture
def memory(tiny_engine: HFEngine) -> KVCacheMemory:
    return KVCacheMemory(tiny_engine, instruction=HEAD)


def filled(memory: KVCacheMemory, texts: list[str] | None = None) -> list[KVCacheItem]:
    items = [memory.extract(text) for text in texts or TEXTS]
    memory.add(items)
    return items


def bits(item: KVCacheItem) -> list[torch.Tensor]:
    return [tensor.clone() for layer in layers_of(item.memory) for tensor in layer]


@torch.no_grad()
def distance(engine: HFEngine, context: MergedContext) -> float:
    """Largest logit difference between a full prefill and the merged cache, over the tail."""
    ids = torch.cat([context.token_ids, context.tail_ids])[None]
    full = engine.model(ids).logits[0, -len(context.tail_ids) :]
    cache = copy.deepcopy(context.cache)
    return float(
        (full - engine.model(context.tail_ids[None], **cache_argument(engine.model, cache)).logits[0]).abs().max()
    )


# --- MemOS's API ----------------------------------------------------------------------------------------------------


def test_what_memos_users_write(tiny_engine: HFEngine) -> None:
    mem = KVCacheMemory(tiny_engine)
    item = mem.extract("The background.")
    mem.add([item])
    kv = mem.get_cache([item.id])
    answer = tiny_engine.generate([{"role": "user", "content": "Well?"}], past_key_values=kv, max_new_tokens=8)
    assert answer == tiny_engine.generate(
        [{"role": "system", "content": "The background.\n\n"}, {"role": "user", "content": "Well?"}], max_new_tokens=8
    )


def test_an_item_says_what_it_was_made_from(memory: KVCacheMemory) -> None:
    item = memory.extract(TEXTS[0])
    assert item.records.text_memories == [TEXTS[0]]
    assert item.records.composed_text_memory == TEXTS[0]
    assert item.records.timestamp.tzinfo is not None
    assert item.metadata["source_text"] == TEXTS[0]
    assert item.metadata["extracted_at"]
    assert memory.engine.tokenizer.decode(item.token_ids) == TEXTS[0] + "\n\n"
    assert item.memory.get_seq_length() == len(item.token_ids)
    assert item.base_position == len(
        memory.engine.template.split_system(HEAD, [{"role": "user", "content": "x"}]).head_ids
    )
    assert item.fingerprint == memory.engine.fingerprint


def test_a_list_of_texts_is_one_item(memory: KVCacheMemory) -> None:
    item = memory.extract(TEXTS)
    assert item.records.text_memories == TEXTS
    assert item.records.composed_text_memory == "\n\n".join(TEXTS)


def test_chat_messages_become_a_transcript(memory: KVCacheMemory) -> None:
    item = memory.extract([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    assert item.records.composed_text_memory == "user: Hi\n\nassistant: Hello"


def test_a_text_that_ends_with_a_line_break_gets_no_second_one(memory: KVCacheMemory) -> None:
    assert memory.engine.tokenizer.decode(memory.extract("Passage: x\n\n").token_ids) == "Passage: x\n\n"


@pytest.mark.parametrize("nothing", ["", " \n", [], [""]])
def test_an_empty_text_is_refused(memory: KVCacheMemory, nothing: Any) -> None:
    with pytest.raises(EmptyPromptError):
        memory.extract(nothing)


def test_missing_ids_give_none(memory: KVCacheMemory) -> None:
    items = filled(memory)
    assert memory.get("nobody") is None
    assert [item and item.id for item in memory.get_by_ids([items[1].id, "nobody"])] == [items[1].id, None]
    assert {item.id for item in memory.get_all()} == {item.id for item in items}


def test_deleting_ignores_what_is_missing(memory: KVCacheMemory) -> None:
    items = filled(memory)
    memory.delete([items[0].id, "nobody"])
    memory.delete(items[1].id)
    assert [item.id for item in memory.get_all()] == [items[2].id]
    memory.delete_all()
    assert memory.get_all() == []


def test_unknown_ids_are_named_unless_they_may_be_skipped(memory: KVCacheMemory) -> None:
    items = filled(memory)
    with pytest.raises(UnknownItemError, match="'x', 'y'") as raised:
        memory.merge(["x", items[0].id, "y"], "Well?")
    assert raised.value.ids == ["x", "y"]
    with pytest.raises(UnknownItemError):
        memory.get_cache(["x"])
    skipped = memory.merge(["x", items[0].id], "Well?", skip_missing=True)
    assert torch.equal(skipped.token_ids, memory.merge([items[0].id], "Well?").token_ids)
    assert memory.get_cache(["x"], skip_missing=True) is None
    assert memory.get_cache([]) is None
    with pytest.raises(InvalidInputError, match="nothing to merge"):
        memory.merge([], "Well?")


class _Meta(BaseModel):
    source: str
    tags: list[str]


@dataclass
class _LikeDocument:
    page_content: str
    metadata: dict[str, Any] = field(default_factory=dict)


class _LikeNode:
    metadata: dict[str, Any] = {"file": "a.md"}  # noqa: RUF012

    def get_content(self, metadata_mode: str) -> str:
        return "text"


@pytest.mark.parametrize(
    ("textual", "metadata"),
    [
        ("text", {}),
        (_LikeDocument("text", {"page": 3}), {"page": 3}),
        (_LikeNode(), {"file": "a.md"}),
        (TextualMemoryItem(memory="text", metadata={"source": "faq"}), {"source": "faq"}),  # they were lost
        (TextualMemoryItem(memory="text", metadata=_Meta(source="faq", tags=["a"])), {"source": "faq", "tags": ["a"]}),
    ],
)
def test_from_textual_memory_takes_what_frameworks_have(
    memory: KVCacheMemory, textual: object, metadata: dict[str, Any]
) -> None:
    item = memory.from_textual_memory(textual)
    assert item.metadata == metadata
    assert item.records.composed_text_memory == "text"


def test_from_textual_memory_refuses_what_has_no_text(memory: KVCacheMemory) -> None:
    with pytest.raises(InvalidInputError, match="cannot read a text from int"):
        memory.from_textual_memory(3)


def test_another_models_item_is_not_added(memory: KVCacheMemory) -> None:
    stranger = KVCacheMemory(HFEngine(tiny_model(seed=5), byte_tokenizer())).extract("x")
    with pytest.raises(FingerprintMismatchError, match="weights"):
        memory.add([memory.extract("fine"), stranger])
    assert memory.get_all() == []


def test_an_item_without_a_model_is_not_added(memory: KVCacheMemory) -> None:
    with pytest.raises(InvalidInputError, match="does not say which model made it"):
        memory.add(KVCacheItem())
    with pytest.raises(InvalidInputError, match="cannot read a text from int"):
        memory.add(["a text", 3])
    assert len(memory) == 0


def test_a_str_is_one_document_and_never_its_letters(memory: KVCacheMemory) -> None:
    [id] = memory.add("Hello")
    assert memory.sync("Hello").ids == [id]
    assert len(memory) == 1


# --- putting together -----------------------------------------------------------------------------------------------


@given(order=st.lists(st.integers(0, 2), min_size=1, max_size=6), strategy=st.sampled_from(["exact", "rotate", "full"]))
@settings(max_examples=40, deadline=None)
def test_a_merged_context_is_its_parts_at_their_true_positions(order: list[int], strategy: Any) -> None:
    memory = KVCacheMemory(ENGINE, instruction=HEAD)
    items = filled(memory)
    before = [bits(item) for item in items]
    context = memory.merge([items[i].id for i in order], "Who has a boat?", strategy=strategy)
    assert context.cache.get_seq_length() == len(context.token_ids)
    head = items[0].base_position
    assert len(context.token_ids) == head + sum(len(items[i].token_ids) for i in order)
    report = context.report
    assert report.reused_tokens + report.recomputed_tokens + report.encoded_tokens == report.context_tokens
    assert report.context_tokens == len(context.token_ids)
    if strategy == "rotate":
        assert report.recomputed_tokens == 0
        start = head
        for i in order:  # the same document, encoded after as many other tokens, has the same first-layer keys
            ids = context.token_ids.clone()
            ids[head:start] = 7
            with torch.no_grad():
                read = DynamicCache()
                ENGINE.model(ids[None], **cache_argument(ENGINE.model, read))
            reference = layers_of(read)[0][0]
            end = start + len(items[i].token_ids)
            wanted, got = reference[..., start:end, :], layers_of(context.cache)[0][0][..., start:end, :]
            assert float((wanted - got).norm() / wanted.norm()) <= 1e-4
            start = end
    else:
        assert distance(ENGINE, context) <= 1e-4
    after = [bits(item) for item in memory.get_by_ids([item.id for item in items])]  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))


def test_the_tail_is_the_rest_of_the_template(memory: KVCacheMemory) -> None:
    context = memory.merge([filled(memory)[0].id], "Well?")
    whole = memory.engine.tokenizer.decode(torch.cat([context.token_ids, context.tail_ids]))
    assert whole == memory.engine.tokenizer.apply_chat_template(
        [{"role": "system", "content": f"{HEAD}\n\n{TEXTS[0]}\n\n"}, {"role": "user", "content": "Well?"}],
        tokenize=False,
        add_generation_prompt=True,
    )


def test_one_document_under_its_own_head_is_exact(memory: KVCacheMemory) -> None:
    context = memory.merge([filled(memory)[0].id], "Well?", strategy="query")
    assert context.report.mode == "prefix"
    assert context.report.recomputed_tokens == 0
    assert distance(memory.engine, context) <= 1e-5


def test_get_cache_of_one_id_is_not_the_stored_one(memory: KVCacheMemory) -> None:
    """MemOS returned the stored object, and generation grew it: 6, 19, 32 tokens over three questions."""
    item = filled(memory)[0]
    before = bits(item)
    for question in ("a", "b", "c"):
        cache = memory.get_cache([item.id])
        assert cache is not None
        memory.engine.generate(question, cache, max_new_tokens=4)
        with torch.no_grad():
            memory.engine.model(torch.tensor([[1, 2, 3]]), **cache_argument(memory.engine.model, cache))
        for layer in cache.layers:
            layer.keys.zero_()
    stored = memory.get(item.id)
    assert stored is not None
    assert stored.memory.get_seq_length() == len(item.token_ids)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(stored), strict=True))


def test_generating_with_a_stored_items_own_memory_does_not_grow_it(memory: KVCacheMemory) -> None:
    item = filled(memory)[0]
    got = memory.get(item.id)
    assert got is not None
    for held in (item, got):
        with torch.no_grad():
            memory.engine.model(torch.tensor([[1, 2, 3]]), **cache_argument(memory.engine.model, held.memory))
    stored = memory.get(item.id)
    assert stored is not None
    assert stored.memory.get_seq_length() == len(item.token_ids)


def test_merging_two_is_not_an_uninitialised_cache(memory: KVCacheMemory) -> None:
    """MemOS assigned `layer.keys` without initialising the layer: its length was 0, and the context was thrown away."""
    ids = [item.id for item in filled(memory)]
    cache = memory.get_cache(ids)
    assert cache is not None
    assert cache.get_seq_length() == len(cache.token_ids)
    assert all(layer.is_initialized for layer in cache.layers)
    with torch.no_grad():
        memory.engine.model(torch.tensor([[1]]), **cache_argument(memory.engine.model, cache))
    assert cache.get_seq_length() == len(cache.token_ids) + 1


def test_a_merged_context_answers_its_own_question_or_another(memory: KVCacheMemory) -> None:
    ids = [item.id for item in filled(memory)]
    context = memory.merge(ids, "Who has a boat?")
    own = memory.engine.generate(past_key_values=context, max_new_tokens=8)
    same = memory.engine.generate("Who has a boat?", context, max_new_tokens=8)
    other = memory.engine.build_prompt("Who has a car?", context)
    assert own == same
    assert other.token_ids[: len(context.token_ids)] == tuple(context.token_ids.tolist())


def test_an_approximate_context_is_never_remembered_as_exact(memory: KVCacheMemory) -> None:
    ids = [item.id for item in filled(memory)]
    context = memory.merge(ids, "Who has a boat?", strategy="rotate")
    cache = memory.get_cache(ids)
    memory.engine.generate(past_key_values=context, max_new_tokens=4)
    memory.engine.generate("Who has a boat?", cache, max_new_tokens=4)
    known, _ = memory.engine.prefixes.match(context.token_ids.tolist())
    assert known == filled(memory)[0].base_position
    exact = memory.merge(ids, "Who has a boat?", strategy="exact")
    assert distance(memory.engine, exact) <= 1e-5


def test_a_context_that_does_not_fit_is_refused_before_work() -> None:
    memory = KVCacheMemory(HFEngine(tiny_model(max_position_embeddings=96), byte_tokenizer()))
    ids = [item.id for item in filled(memory, ["x" * 30, "y" * 30, "z" * 30])]
    calls: list[int] = []
    memory.engine.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ContextLengthError):
        memory.merge(ids, "Well?")
    assert calls == []


def test_an_empty_question_is_refused(memory: KVCacheMemory) -> None:
    with pytest.raises(EmptyPromptError):
        memory.merge([filled(memory)[0].id], " ")


# --- documents in messages ------------------------------------------------------------------------------------------


def asked(*texts: str, question: str = "Who has a boat?") -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": [f"{HEAD}\n\n", *(Document(f"{text}\n\n") for text in texts)]},
        {"role": "user", "content": question},
    ]


def usage_of(memory: KVCacheMemory, messages: Any, **options: Any) -> Any:
    return list(memory.stream(messages, sampling=Sampling(max_new_tokens=4), **options))[-1].usage


def test_documents_are_encoded_once_and_found_by_their_content(memory: KVCacheMemory) -> None:
    cold = usage_of(memory, asked(*TEXTS), strategy="query")
    warm = usage_of(memory, asked(*TEXTS, question="Who has a car?"), strategy="query")
    moved = usage_of(memory, asked(*reversed(TEXTS)), strategy="query")
    assert cold.context.reused_tokens == cold.cached_tokens == 0
    assert warm.context.encoded_tokens == moved.context.encoded_tokens == 0
    assert warm.context.mode == moved.context.mode == "merged"
    for usage in (cold, warm, moved):
        assert usage.cached_tokens + usage.created_tokens <= usage.prompt_tokens
    assert cold.prompt_tokens == usage_of(memory, asked(*TEXTS), strategy="query").prompt_tokens


def test_a_context_that_was_encoded_in_this_order_is_exact(memory: KVCacheMemory) -> None:
    usage_of(memory, asked(*TEXTS), strategy="exact")
    again = usage_of(memory, asked(*TEXTS, question="Who has a car?"))
    assert again.context.mode == "prefix"
    assert again.context.encoded_tokens == again.context.recomputed_tokens == 0


def test_a_message_without_documents_reuses_the_longest_prefix(memory: KVCacheMemory) -> None:
    first = usage_of(memory, "Hello there")
    again = usage_of(memory, "Hello there")
    assert first.cached_tokens == 0
    assert again.cached_tokens == again.prompt_tokens - 1


class _Broken(MemoryStore):
    """A store whose disk went away."""

    def get(self, key: str) -> KVCacheItem | None:
        raise StoreUnavailableError("the disk went away")

    def put(self, item: KVCacheItem) -> None:
        raise StoreUnavailableError("the disk went away")


def test_a_store_that_fails_costs_time_and_not_the_answer(tiny_engine: HFEngine) -> None:
    sound = KVCacheMemory(tiny_engine)
    broken = KVCacheMemory(HFEngine(tiny_engine.model, tiny_engine.tokenizer), _Broken())
    with pytest.warns(CacheWarning, match="the disk went away"):
        answer = "".join(chunk.text for chunk in broken.stream(asked(*TEXTS), sampling=Sampling(max_new_tokens=8)))
    assert answer == "".join(chunk.text for chunk in sound.stream(asked(*TEXTS), sampling=Sampling(max_new_tokens=8)))


def test_a_sound_store_warns_of_nothing(memory: KVCacheMemory) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usage_of(memory, asked(*TEXTS)).completion_tokens > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head", ["Answer.", None])
def test_what_a_disk_kept_is_merged_on_the_models_device(tmp_path: Path, head: str | None) -> None:
    """Its tensors came from the disk into the host's memory, and the head's were on the device."""
    engine = HFEngine(tiny_model().to("cuda"), byte_tokenizer())
    memory = KVCacheMemory(engine, DiskStore(tmp_path), instruction=head)
    ids = memory.sync(["Alice has a red bicycle.", "Bob has a green car."]).ids
    merged = memory.merge(ids, "Who?")
    assert {keys.device.type for keys, _ in layers_of(merged.cache)} == {"cuda"}


def test_a_folder_that_is_opened_by_its_path_has_a_byte_budget(
    tiny_engine: HFEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It grew until the disk was full."""
    budget = 40_000
    monkeypatch.setattr(open_at, "__defaults__", ("", budget))
    memory = KVCacheMemory(tiny_engine, tmp_path)
    memory.add([f"Text number {number}, of some length." for number in range(20)])
    stats = memory.store.stats()
    assert stats.max_bytes == budget
    assert 0 < stats.bytes <= budget
    assert stats.evictions > 0
