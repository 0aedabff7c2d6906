from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache

from kvcag import CacheWarning, ContextCache, HFEngine, Sampling
from kvcag.cache.attention import check_mergeable
from kvcag.cache.layers import cache_argument, layers_of, nbytes
from kvcag.chat_template import as_messages
from kvcag.errors import (
    ContextLengthError,
    EmptyPromptError,
    FingerprintMismatchError,
    InvalidInputError,
    TokenMismatchError,
)
from kvcag.testing import CHATML, byte_tokenizer, tiny_model
from tests.waits import run_together

TEXT = "Alice has a red bicycle. Bob has a green car."
ASK = [{"role": "user", "content": "What does Bob have?"}]


class Steps:
    """Counts the tokens of every forward pass of a model, and can make one fail."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tokens: list[int] = []
        self.fail_at: int | None = None
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.fail_at == len(self.tokens):
            raise RuntimeError("the device fell over")
        self.tokens.append(kwargs["input_ids"].shape[-1])


def full_greedy(engine: HFEngine, token_ids: list[int], count: int) -> list[int]:
    """The reference: transformers alone, the whole prompt again at each step, no cache."""
    ids = list(token_ids)
    with torch.no_grad():
        while len(ids) < len(token_ids) + count:
            token = int(engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            ids.append(token)
            if token in engine.eos_ids:
                break
    return ids[len(token_ids) :]


def answer_ids(engine: HFEngine, messages: Any, cache: Any = None, **sampling: Any) -> list[int]:
    chunks = engine.stream(engine.build_prompt(messages, cache), Sampling.of(**sampling), cache)
    return [token for chunk in chunks for token in chunk.token_ids]


def bits(cache: Any) -> list[torch.Tensor]:
    return [tensor.clone() for layer in layers_of(cache) for tensor in layer]


def test_an_answer_over_a_cache_is_the_answer_of_a_full_prefill(tiny_engine: HFEngine) -> None:
    cache = tiny_engine.build_kv_cache(TEXT)
    prompt = tiny_engine.build_prompt(ASK, cache)
    expected = full_greedy(tiny_engine, list(prompt.token_ids), 24)
    assert answer_ids(tiny_engine, ASK, cache, max_new_tokens=24) == [
        i for i in expected if i not in tiny_engine.eos_ids
    ]


def test_the_prompt_over_a_cache_is_the_templates_own(tiny_engine: HFEngine) -> None:
    cache = tiny_engine.build_kv_cache(TEXT)
    rendered = tiny_engine.tokenizer.apply_chat_template(
        [{"role": "system", "content": TEXT}, *ASK], tokenize=False, add_generation_prompt=True
    )
    assert tiny_engine.tokenizer.decode(tiny_engine.build_prompt(ASK, cache).token_ids) == rendered


def test_a_list_of_texts_is_joined_into_one(tiny_engine: HFEngine) -> None:
    joined, one = tiny_engine.build_kv_cache(["a", "b"]), tiny_engine.build_kv_cache("a\n\nb")
    assert torch.equal(joined.token_ids, one.token_ids)


def test_chat_messages_are_taken_as_they_are_and_continued(tiny_engine: HFEngine) -> None:
    turns = [{"role": "system", "content": TEXT}, *ASK, {"role": "assistant", "content": "A car."}]
    follow_up = {"role": "user", "content": "Which colour?"}
    cache = tiny_engine.build_kv_cache(turns)
    new_turn, conversation = (
        tiny_engine.build_prompt([follow_up], cache),
        tiny_engine.build_prompt([*turns, follow_up], cache),
    )
    assert new_turn == conversation
    assert new_turn.token_ids == tiny_engine.template.prompt([*turns, follow_up]).token_ids


@pytest.mark.parametrize("nothing", ["", "  \n", [], ["", " "]])
def test_an_empty_prompt_is_a_value_error(tiny_engine: HFEngine, nothing: Any) -> None:
    with pytest.raises(EmptyPromptError) as raised:
        tiny_engine.build_kv_cache(nothing)
    assert isinstance(raised.value, ValueError)


def test_generation_leaves_the_cache_it_was_given_bitwise_alone(tiny_engine: HFEngine) -> None:
    cache = tiny_engine.build_kv_cache(TEXT)
    before, length = bits(cache), cache.get_seq_length()
    for seed in range(5):
        tiny_engine.generate(ASK, cache, temperature=1.0, seed=seed, max_new_tokens=8)
    assert cache.get_seq_length() == length
    assert all(torch.equal(a, b) for a, b in zip(before, bits(cache), strict=True))


def test_four_threads_answer_as_one_does(tiny_engine: HFEngine) -> None:
    cache = tiny_engine.build_kv_cache(TEXT)
    before = bits(cache)
    asked = [[{"role": "user", "content": f"Question {i}?"}] for i in range(8)]
    alone = [answer_ids(HFEngine(tiny_engine.model, tiny_engine.tokenizer), q, cache, max_new_tokens=12) for q in asked]
    together: dict[int, list[int]] = {}

    def work(index: int) -> None:
        for i in range(index, len(asked), 4):
            together[i] = answer_ids(tiny_engine, asked[i], cache, max_new_tokens=12)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    run_together(threads)
    assert [together[i] for i in range(len(asked))] == alone
    assert all(torch.equal(a, b) for a, b in zip(before, bits(cache), strict=True))


def test_a_generations_cache_is_its_own_in_the_models_dtype_and_is_released() -> None:
    engine = HFEngine(tiny_model(dtype=torch.bfloat16), byte_tokenizer(), prefix_cache_bytes=0)
    seen: list[weakref.ref[torch.Tensor]] = []
    dtypes: set[torch.dtype] = set()

    def watch(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        [cache] = [value for value in kwargs.values() if isinstance(value, Cache)]
        for layer in cache.layers:
            if layer.keys is not None:
                seen.append(weakref.ref(layer.keys))
                dtypes.add(layer.keys.dtype)

    engine.model.register_forward_pre_hook(watch, with_kwargs=True)
    engine.generate(ASK, max_new_tokens=6)
    gc.collect()
    assert seen
    assert dtypes == {torch.bfloat16}
    assert [ref for ref in seen if ref() is not None] == []


def test_memory_returns_to_where_it_was() -> None:
    engine = HFEngine(tiny_model(), byte_tokenizer(), prefix_cache_bytes=0)
    cache = engine.build_kv_cache(TEXT)
    engine.generate(ASK, cache, max_new_tokens=4)

    def tensor_bytes() -> int:
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return sum(
            storage.nbytes()
            for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values()
        )

    before = tensor_bytes()
    stream = engine.generate_stream(ASK, cache, max_new_tokens=64)
    next(stream)
    assert tensor_bytes() > before
    stream.close()
    del stream
    assert tensor_bytes() == before


def test_closing_a_stream_stops_the_model_within_a_step(tiny_engine: HFEngine) -> None:
    steps = Steps(tiny_engine.model)
    threads = threading.active_count()
    stream = tiny_engine.stream(tiny_engine.build_prompt(ASK), Sampling(max_new_tokens=100))
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(steps.tokens) == 3
    assert threading.active_count() == threads


def test_a_stream_that_is_never_read_does_nothing(tiny_engine: HFEngine) -> None:
    steps = Steps(tiny_engine.model)
    tiny_engine.generate_stream(ASK, max_new_tokens=4)
    assert steps.tokens == []


def test_an_error_in_the_model_reaches_the_consumer_and_leaves_nothing_half_kept(tiny_engine: HFEngine) -> None:
    steps = Steps(tiny_engine.model)
    steps.fail_at = 3
    with pytest.raises(RuntimeError, match="fell over"):
        tiny_engine.generate(ASK, max_new_tokens=10)
    assert tiny_engine.prefixes.nbytes == len(tiny_engine.build_prompt(ASK).token_ids) * tiny_engine.bytes_per_token
    steps.fail_at = None
    assert tiny_engine.generate(ASK, max_new_tokens=5) == HFEngine(tiny_engine.model, tiny_engine.tokenizer).generate(
        ASK, max_new_tokens=5
    )


def test_an_error_in_the_middle_of_a_step_is_not_kept(tiny_engine: HFEngine) -> None:
    """The first layers had grown by the token, the last had not: such a cache must never be remembered."""
    cache = tiny_engine.build_kv_cache(TEXT)
    tiny_engine.prefixes.clear()
    check_mergeable(tiny_engine.model)  # passes of its own, once
    calls = 0

    def fail(module: torch.nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("fell over between two layers")

    handle = tiny_engine.model.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="between two layers"):
        tiny_engine.generate(ASK, cache, max_new_tokens=10)
    handle.remove()
    assert (
        tiny_engine.prefixes.nbytes == len(tiny_engine.build_prompt(ASK, cache).token_ids) * tiny_engine.bytes_per_token
    )


def test_gradients_are_off_inside_and_as_the_caller_left_them_outside(tiny_engine: HFEngine) -> None:
    inside: list[bool] = []
    tiny_engine.model.register_forward_pre_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    with torch.enable_grad():
        for _ in tiny_engine.generate_stream(ASK, max_new_tokens=4):
            assert torch.is_grad_enabled()
        assert not any(layers_of(tiny_engine.build_kv_cache(TEXT))[0][0].requires_grad for _ in range(1))
        assert torch.is_grad_enabled()
    assert inside
    assert not any(inside)


def test_a_prompt_that_does_not_fit_is_refused_before_any_prefill() -> None:
    engine = HFEngine(tiny_model(max_position_embeddings=64), byte_tokenizer())
    steps = Steps(engine.model)
    prompt_tokens = len(engine.build_prompt(ASK).token_ids)
    with pytest.raises(
        ContextLengthError, match=f"that is {prompt_tokens + 40 - 64} more than the model's context of 64"
    ):
        engine.generate_stream(ASK, max_new_tokens=40)
    with pytest.raises(ContextLengthError) as raised:
        engine.build_kv_cache("x" * 100)
    assert raised.value.excess == raised.value.prompt_tokens - 64
    assert steps.tokens == []
    assert engine.generate(ASK, max_new_tokens=64 - prompt_tokens) is not None
    engine.generate(ASK)  # by default, what still fits


def test_every_eos_id_ends_an_answer(tiny_engine: HFEngine) -> None:
    plain = answer_ids(tiny_engine, ASK, max_new_tokens=12)
    tiny_engine.model.generation_config.eos_token_id = [257, plain[4]]
    assert (
        answer_ids(HFEngine(tiny_engine.model, tiny_engine.tokenizer), ASK, max_new_tokens=12)
        == plain[: plain.index(plain[4])]
    )


def test_stop_strings_end_the_answer_and_are_not_in_it(tiny_engine: HFEngine) -> None:
    text = tiny_engine.generate(ASK, max_new_tokens=40, temperature=2.0, seed=3)
    stop = text[10:13]
    chunks = list(
        tiny_engine.stream(
            tiny_engine.build_prompt(ASK), Sampling(max_new_tokens=40, temperature=2.0, seed=3, stop=(stop,))
        )
    )
    assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].finish_reason == "stop"
    assert all(stop not in chunk.text for chunk in chunks)


def test_the_last_chunk_says_why_it_ended_and_what_it_took(tiny_engine: HFEngine) -> None:
    cache = tiny_engine.build_kv_cache(TEXT)
    prompt = tiny_engine.build_prompt(ASK, cache)
    chunks = list(tiny_engine.stream(prompt, Sampling(max_new_tokens=5), cache))
    assert [chunk.finish_reason for chunk in chunks] == [*[None] * 5, "length"]
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt.token_ids), 5)
    assert usage.cached_tokens == cache.get_seq_length()
    assert usage.cached_tokens + usage.created_tokens == usage.prompt_tokens
    assert 0 < usage.ttft_s <= usage.total_s


# --- recent contexts ------------------------------------------------------------------------------------------------


def test_the_next_turn_prefills_only_what_is_new(tiny_engine: HFEngine) -> None:
    steps = Steps(tiny_engine.model)
    first = as_messages("What does Bob have?")
    answer = tiny_engine.generate(first, max_new_tokens=6)
    second = [*first, {"role": "assistant", "content": answer}, *as_messages("And Alice?")]
    known, _ = tiny_engine.prefixes.match(tiny_engine.build_prompt(second).token_ids)
    steps.tokens.clear()
    reused = answer_ids(tiny_engine, second, max_new_tokens=6)
    assert known >= len(tiny_engine.build_prompt(first).token_ids)
    assert steps.tokens[0] == len(tiny_engine.build_prompt(second).token_ids) - known
    assert reused == answer_ids(HFEngine(tiny_engine.model, tiny_engine.tokenizer), second, max_new_tokens=6)


def test_a_prompt_asked_again_runs_one_token(tiny_engine: HFEngine) -> None:
    tiny_engine.generate(ASK, max_new_tokens=1)
    steps = Steps(tiny_engine.model)
    tiny_engine.generate(ASK, max_new_tokens=1)
    assert steps.tokens == [1]


def test_remembering_can_be_switched_off() -> None:
    engine = HFEngine(tiny_model(), byte_tokenizer(), prefix_cache_bytes=0)
    steps = Steps(engine.model)
    for _ in range(2):
        engine.generate(ASK, max_new_tokens=1)
    assert steps.tokens == [len(engine.build_prompt(ASK).token_ids)] * 2


def test_writing_into_a_returned_cache_does_not_reach_the_next_caller(tiny_engine: HFEngine) -> None:
    cache = tiny_engine.build_kv_cache(TEXT)
    before = bits(cache)
    for layer in cache.layers:
        layer.keys.zero_()
        layer.values.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, bits(tiny_engine.build_kv_cache(TEXT)), strict=True))


def test_tenants_do_not_reuse_each_others_prefixes(tiny_engine: HFEngine) -> None:
    steps = Steps(tiny_engine.model)
    prompt = tiny_engine.build_prompt(ASK)
    for namespace in ("a", "b", "a"):
        list(tiny_engine.stream(prompt, Sampling(max_new_tokens=1), namespace=namespace))
    assert steps.tokens == [len(prompt.token_ids), len(prompt.token_ids), 1]


# --- which caches are taken -----------------------------------------------------------------------------------------


def test_an_empty_cache_is_no_cache(tiny_engine: HFEngine) -> None:
    assert tiny_engine.generate(ASK, DynamicCache(), max_new_tokens=4) == tiny_engine.generate(ASK, max_new_tokens=4)


def test_a_cache_that_does_not_know_its_tokens_is_refused(tiny_engine: HFEngine) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        tiny_engine.model(torch.tensor([[1, 2, 3]]), **cache_argument(tiny_engine.model, cache))
    with pytest.raises(TokenMismatchError, match="has no token_ids"):
        tiny_engine.generate(ASK, cache)
    wrapped = ContextCache.of(layers_of(cache), torch.tensor([1, 2, 3]), tiny_engine.fingerprint)
    assert tiny_engine.generate(ASK, wrapped, max_new_tokens=3) is not None


def test_a_cache_that_grew_is_refused(tiny_engine: HFEngine) -> None:
    cache = tiny_engine.build_kv_cache(TEXT)
    with torch.no_grad():
        tiny_engine.model(torch.tensor([[1]]), **cache_argument(tiny_engine.model, cache))
    with pytest.raises(TokenMismatchError, match="something was generated into it"):
        tiny_engine.generate(ASK, cache)


def test_another_models_cache_is_refused_and_says_what_differs(tiny_engine: HFEngine) -> None:
    other = HFEngine(tiny_model(seed=1), byte_tokenizer())
    with pytest.raises(FingerprintMismatchError, match=r"weights: .*, not"):
        tiny_engine.generate(ASK, other.build_kv_cache(TEXT))
    same_weights_other_template = HFEngine(tiny_engine.model, byte_tokenizer(CHATML + " "))
    with pytest.raises(FingerprintMismatchError, match="template"):
        tiny_engine.generate(ASK, same_weights_other_template.build_kv_cache(TEXT))


def test_a_prompt_that_does_not_begin_with_the_cache_is_refused(tiny_engine: HFEngine) -> None:
    cache = ContextCache.of(layers_of(tiny_engine.build_kv_cache(TEXT)), torch.full((48,), 7), tiny_engine.fingerprint)
    cache.token_ids = torch.full((cache.get_seq_length(),), 7)
    with pytest.raises(TokenMismatchError, match="agrees with the context's token_ids only in its first 0"):
        tiny_engine.stream(tiny_engine.build_prompt(ASK), Sampling(), cache)


def test_a_stored_cache_takes_the_bytes_of_its_geometry(tiny_engine: HFEngine) -> None:
    cache = tiny_engine.build_kv_cache(TEXT * 5)
    assert nbytes(layers_of(cache)) == cache.get_seq_length() * tiny_engine.bytes_per_token


def test_an_unknown_setting_is_refused_before_work(tiny_engine: HFEngine) -> None:
    with pytest.raises(InvalidInputError, match="unknown argument"):
        tiny_engine.generate_stream(ASK, temprature=1)


def test_defaults_hold_where_a_call_says_nothing() -> None:
    engine = HFEngine(
        tiny_model(), byte_tokenizer(), defaults={"max_new_tokens": 3, "do_sample": False, "temperature": 0.7}
    )
    assert engine.sampling() == Sampling(max_new_tokens=3)
    assert engine.sampling(max_new_tokens=5).max_new_tokens == 5
    assert engine.sampling(temperature=0.5).temperature == 0.5  # MemOS's cached path ignored it


def streams(engine: HFEngine) -> Iterator[str]:
    return engine.generate_stream(ASK, max_new_tokens=6)


def test_interleaved_streams_do_not_meet(tiny_engine: HFEngine) -> None:
    alone = tiny_engine.generate(ASK, max_new_tokens=6)
    out: list[list[str]] = [[], []]
    for a, b in zip(streams(tiny_engine), streams(tiny_engine), strict=True):
        out[0].append(a)
        out[1].append(b)
    assert ["".join(pieces) for pieces in out] == [alone, alone]


def test_a_context_too_large_to_be_kept_is_said_once() -> None:
    engine = HFEngine(tiny_model(), byte_tokenizer())
    engine.prefixes.max_bytes = 60 * engine.bytes_per_token
    with pytest.warns(CacheWarning, match=r"more than 60 tokens .* prefix_cache_bytes"):
        engine.generate("a" * 80, max_new_tokens=1)
    engine.generate("b" * 80, max_new_tokens=1)  # a warning would be an error here
    context = engine.build_kv_cache("c" * 80)
    HFEngine(engine.model, engine.tokenizer, prefix_cache_bytes=engine.prefixes.max_bytes).generate(
        "Why?", past_key_values=context, max_new_tokens=1
    )  # who keeps the context himself is not told


def test_an_engine_that_keeps_nothing_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    HFEngine(tiny_model(), byte_tokenizer(), prefix_cache_bytes=0).generate("a" * 80, max_new_tokens=1)
    assert not [w for w in recwarn if issubclass(w.category, CacheWarning)]


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_a_model_that_cannot_be_merged_goes_on_over_a_cache_all_the_same(family: str) -> None:
    engine = HFEngine(tiny_model(family), byte_tokenizer())
    fresh = HFEngine(engine.model, engine.tokenizer, prefix_cache_bytes=0)
    asked = engine.generate(ASK, engine.build_kv_cache(TEXT), max_new_tokens=12)
    assert asked == fresh.generate(ASK, fresh.build_kv_cache(TEXT), max_new_tokens=12)
    longer = [*ASK, {"role": "assistant", "content": "A car."}, {"role": "user", "content": "Which one?"}]
    assert engine.generate(longer, max_new_tokens=12) == fresh.generate(longer, max_new_tokens=12)
