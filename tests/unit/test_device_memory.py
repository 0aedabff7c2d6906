"""A device that is out of memory: one more attempt, a typed error, and nothing lost. A stand-in raises the error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import generation_cache
from kvcag.engines import hf
from kvcag.errors import DeviceMemoryError
from kvcag.testing import byte_tokenizer, tiny_model
from tests.forwards import forward_lengths

TEXTS = [f"Document {n} says this, and that, and a few more words. " * 3 for n in range(3)]
MERGED: Any = {"strategy": "query", "ratio": 0.1, "max_new_tokens": 12}


@contextmanager
def out_of_memory(engine: HFEngine, *, times: int, longer_than: int = 0) -> Iterator[list[int]]:
    """The first passes of more than so many tokens fail in the middle of the model; gives their lengths."""
    failed: list[int] = []

    def fail(module: object, given: tuple[torch.Tensor, ...]) -> None:
        if len(failed) < times and given[0].shape[1] > longer_than:
            failed.append(given[0].shape[1])
            raise torch.OutOfMemoryError("no room")

    with engine.model.model.layers[1].register_forward_pre_hook(fail):  # type: ignore[union-attr, operator, index]
        yield failed


@pytest.fixture
def engine() -> HFEngine:
    return HFEngine(tiny_model("llama"), byte_tokenizer())


@pytest.fixture
def memory(engine: HFEngine) -> KVCacheMemory:
    return KVCacheMemory(engine, instruction="Answer.")


def test_a_pass_that_fails_once_is_taken_again_in_shorter_ones(engine: HFEngine) -> None:
    ids = list(range(33, 250)) * 3
    right = HFEngine(tiny_model("llama"), byte_tokenizer()).forward(ids, generation_cache([], 1))
    cache = generation_cache([], 1)
    with forward_lengths(engine.model) as lengths, out_of_memory(engine, times=1):
        logits = engine.forward(ids, cache)
    assert lengths == [512, *[128] * 5, 11]
    assert cache.get_seq_length() == len(ids)
    torch.testing.assert_close(logits, right, atol=1e-5, rtol=1e-5)
    with forward_lengths(engine.model) as lengths:
        engine.forward(ids, generation_cache([], 1))
    assert max(lengths) == 128  # what did not fit once is not tried each time


@pytest.mark.parametrize("longer_than", [1, 0])  # the prefill, or a step, too
def test_an_answer_that_fails_once_is_the_same(engine: HFEngine, longer_than: int) -> None:
    right = engine.generate("What is it?", max_new_tokens=12)
    engine.forget()
    with out_of_memory(engine, times=1, longer_than=longer_than) as failed:
        assert engine.generate("What is it?", max_new_tokens=12) == right
    assert len(failed) == 1


def test_a_pass_that_fails_twice_raises_and_loses_nothing(engine: HFEngine) -> None:
    right = engine.generate("What is it?", max_new_tokens=12)
    known = engine.build_prompt("What is it?").token_ids
    cache = generation_cache([engine.prefill([40, 41, 42])[0]], 8)
    with out_of_memory(engine, times=2), pytest.raises(DeviceMemoryError, match="too little memory"):
        engine.forward(list(range(50, 80)), cache)
    assert {layer.get_seq_length() for layer in cache.layers} == {3}
    with out_of_memory(engine, times=2), pytest.raises(DeviceMemoryError):
        engine.generate("What else is there to say?", max_new_tokens=12)
    assert engine.known_prefix(known) == len(known)
    assert engine.generate("What is it?", max_new_tokens=12) == right


@pytest.mark.parametrize("failures", [1, 2])
def test_a_merge_that_fails_is_tried_once_more(memory: KVCacheMemory, failures: int) -> None:
    ids = memory.add(TEXTS)
    order = ids[::-1]
    right = KVCacheMemory(HFEngine(memory.engine.model, byte_tokenizer()), memory.store, "Answer.").ask(  # type: ignore[attr-defined]
        "What?", order, **MERGED
    )
    assert isinstance(memory.engine, HFEngine)
    with out_of_memory(memory.engine, times=failures, longer_than=1) as failed:
        if failures == 1:
            assert str(memory.ask("What?", order, **MERGED)) == str(right)
        else:
            with pytest.raises(DeviceMemoryError, match="Pass fewer documents"):
                memory.ask("What?", order, **MERGED)
    assert len(failed) == failures
    assert [item.id for item in memory] == ids
    assert str(memory.ask("What?", order, **MERGED)) == str(right)


def test_the_message_says_what_to_do() -> None:
    with pytest.raises(DeviceMemoryError, match="prefix_cache_bytes smaller"), hf._memory_errors():
        raise torch.OutOfMemoryError("no room")
