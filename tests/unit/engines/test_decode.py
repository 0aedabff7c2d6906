"""Answers that are generated at the same time take their steps together, and say what each says alone."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from kvcag import HFEngine, KVCacheMemory, Sampling
from kvcag.concurrency import CANCELLATION, Cancellation, Cancelled
from kvcag.engines.decode import Prediction
from kvcag.errors import ContextLengthError
from kvcag.testing import byte_tokenizer, tiny_model

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": {},
    "llama eager": {"attn_implementation": "eager"},
    "qwen3": {},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": MIXED},
    "gpt_oss": {"sliding_window": 16, "layer_types": MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm": {},
    "phi": {},
}
TEXT = "Alice has a red bicycle. Bob has a green car. "


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many generations each shared step took."""
    sizes: list[int] = []
    own = HFEngine._together

    def counting(self: HFEngine, tokens: list[Any], caches: list[Any]) -> list[Prediction]:
        sizes.append(len(caches))
        return own(self, tokens, caches)

    monkeypatch.setattr(HFEngine, "_together", counting)
    return sizes


def engine_of(family: str = "llama", **config: object) -> HFEngine:
    model = tiny_model(family.split()[0], **{"eos_token_id": None, **config})
    engine = HFEngine(model, byte_tokenizer(), prefix_cache_bytes=0)
    engine.__dict__["eos_ids"] = frozenset()  # all answers are as long
    return engine


def answer(engine: HFEngine, i: int, count: int = 40, **sampling: Any) -> list[int]:
    prompt = engine.build_prompt(f"{TEXT * (i % 3 + 1)} Question {i}?")
    chunks = engine.stream(prompt, Sampling(max_new_tokens=count, **sampling))
    return [token for chunk in chunks for token in chunk.token_ids]


def at_once(count: int, read: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as threads:
        return [future.result(60) for future in [threads.submit(read, i) for i in range(count)]]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_at_once_are_those_one_by_one(family, together):
    engine = engine_of(family, **FAMILIES[family])
    right = [answer(engine, i) for i in range(5)]
    assert not together
    assert at_once(5, lambda i: answer(engine, i)) == right
    assert max(together, default=5) == 5
    assert together or not engine._by_position


def test_one_thread_that_reads_several_answers_by_turns(together):
    engine = engine_of()
    right = [answer(engine, i) for i in range(4)]
    prompts = [engine.build_prompt(f"{TEXT * (i % 3 + 1)} Question {i}?") for i in range(4)]
    streams = {i: engine.stream(prompt, Sampling(max_new_tokens=40 - i)) for i, prompt in enumerate(prompts)}
    got: list[list[int]] = [[] for _ in streams]
    while streams:
        for i, stream in list(streams.items()):
            chunk = next(stream, None)
            if chunk is None:
                del streams[i]
            else:
                got[i] += chunk.token_ids
    assert got == [right[i][: 40 - i] for i in range(4)]
    assert together[:20] == [4] * 20
    assert not engine._steps._waiting
    assert not engine._steps._missing


def test_each_keeps_its_own_settings(together):
    engine = engine_of()
    settings = [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}, {"temperature": 0.7, "seed": 4}]
    right = [answer(engine, i, **settings[i]) for i in range(4)]
    assert at_once(4, lambda i: answer(engine, i, **settings[i])) == right
    assert max(together) == 4


def test_readers_who_leave_change_nothing_for_the_others(together):
    engine = engine_of()
    right = [answer(engine, i) for i in range(8)]

    def read(i: int) -> list[int]:
        chunks = engine.stream(engine.build_prompt(f"{TEXT * (i % 3 + 1)} Question {i}?"), Sampling(max_new_tokens=40))
        found = []
        for chunk in chunks:
            found += chunk.token_ids
            if i % 2 and len(found) == 5 + i:
                chunks.close()
        return found

    got = at_once(8, read)
    assert got[::2] == right[::2]
    assert all(right[i][: 5 + i] == got[i] for i in range(1, 8, 2))
    assert together


def test_a_slow_reader_delays_the_others_little(together):
    engine = engine_of()
    answer(engine, 0)
    began = time.perf_counter()
    answer(engine, 0, 60)
    alone = time.perf_counter() - began
    stop = threading.Event()

    def slowly() -> None:
        chunks = engine.stream(engine.build_prompt("Slow?"), Sampling(max_new_tokens=200))
        for _ in chunks:
            if stop.wait(0.05):
                return

    slow = threading.Thread(target=slowly)
    slow.start()
    began = time.perf_counter()
    answer(engine, 0, 60)
    taken = time.perf_counter() - began
    stop.set()
    slow.join(20)
    assert taken < 3 * alone + 0.5


def test_a_shared_step_that_fails_is_taken_one_by_one(monkeypatch):
    own, failed = HFEngine._together, []

    def failing(self: HFEngine, tokens: list[Any], caches: list[Any]) -> list[Prediction]:
        if len(failed) < 3:
            failed.append(1)
            raise torch.OutOfMemoryError("no room")
        return own(self, tokens, caches)

    monkeypatch.setattr(HFEngine, "_together", failing)
    engine = engine_of()
    right = [answer(engine, i) for i in range(3)]
    assert at_once(3, lambda i: answer(engine, i)) == right
    assert len(failed) == 3


def test_a_step_that_fails_in_the_middle_leaves_the_caches_as_they_were(monkeypatch):
    engine = engine_of()
    right = [answer(engine, i) for i in range(3)]
    layer, failures = engine.model.model.layers[1], []

    def fail(module: object, given: tuple[torch.Tensor, ...]) -> None:
        if given[0].shape[0] > 1 and len(failures) < 2:
            failures.append(1)
            raise RuntimeError("in the middle")

    with layer.register_forward_pre_hook(fail):
        assert at_once(3, lambda i: answer(engine, i)) == right
    assert len(failures) == 2


def test_who_waits_for_a_step_can_leave():
    engine = engine_of()
    chunks = engine.stream(engine.build_prompt("One?"), Sampling(max_new_tokens=9))
    next(chunks)
    other = engine.stream(engine.build_prompt("Two?"), Sampling(max_new_tokens=9))
    next(other)
    left, raised = Cancellation(), []

    def read() -> None:
        CANCELLATION.set(left)
        try:
            next(chunks)
        except Cancelled as error:
            raised.append(error)

    with engine.exclusive():
        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.05)
        left.cancel()
        thread.join(10)
    assert raised
    assert len(list(other)) >= 8


def test_ask_all_answers_in_order_what_ask_answers(together):
    memory = KVCacheMemory(engine_of(), instruction="Answer.")
    memory.add(["The library opens at nine.", "The park closes at ten."])
    questions = ["When does it open?", "And close?", [{"role": "user", "content": "Who?"}]]
    right = [memory.ask(each, strategy="exact", max_new_tokens=20).text for each in questions]
    answers = memory.ask_all(questions, strategy="exact", max_new_tokens=20)
    assert [each.text for each in answers] == right
    assert max(together) == 3
    assert memory.ask_all([]) == []


def test_ask_all_raises_the_first_error_and_stops_the_others():
    memory = KVCacheMemory(engine_of())
    memory.add("The library opens at nine.")
    before = threading.active_count()
    with pytest.raises(ContextLengthError):
        memory.ask_all(["Short?", "x" * 3000, "Also short?"], strategy="exact", max_new_tokens=200)
    assert threading.active_count() == before


def test_a_batch_of_a_chat_model_is_what_invoke_gives_one_by_one(together):
    langchain = pytest.importorskip("kvcag.langchain")
    model = langchain.ChatKVCAG(engine=engine_of(), max_tokens=20)
    questions = ["When?", "Where to?", "Why not?"]
    right = [model.invoke(each).content for each in questions]
    assert [each.content for each in model.batch(questions)] == right
    assert max(together) == 3
    one = model.batch([*questions, "x" * 3000], {"max_concurrency": 1}, return_exceptions=True)
    assert [each.content for each in one[:3]] == right
    assert isinstance(one[3], ContextLengthError)


async def test_n_answers_of_a_chat_model_are_made_together(together):
    """They were made one after another."""
    langchain = pytest.importorskip("kvcag.langchain")
    from langchain_core.messages import HumanMessage

    model = langchain.ChatKVCAG(engine=engine_of(), max_tokens=30, temperature=1.5, seed=1)
    right = [model.invoke("When?", seed=seed).text for seed in (1, 2, 3)]
    asked = [[HumanMessage("When?")]]
    for generate in (model.generate, model.agenerate):
        together.clear()
        generated = generate(asked, n=3)
        generated = await generated if inspect.isawaitable(generated) else generated
        assert [each.text for each in generated.generations[0]] == right
        assert max(together) == 3
