"""Who has the model, who waits, and what a long prefill costs the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kvcag import HFEngine
from kvcag.concurrency import _TURN_SECONDS, CANCELLATION, Cancellation, Cancelled, ModelLock, iterate
from kvcag.testing import byte_tokenizer, tiny_model
from tests.waits import awaited, joined, until

LONG = tuple(i % 250 for i in range(1500))


@contextmanager
def slow_layers(engine: HFEngine, seconds: float) -> Iterator[list[str]]:
    """Each layer takes so long. Gives the names of the threads whose layers ran, in order."""
    ran: list[str] = []

    def layer(*_: object) -> None:
        ran.append(threading.current_thread().name)
        time.sleep(seconds)

    hooks = [layer_.register_forward_pre_hook(layer) for layer_ in engine.model.model.layers]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def in_threads(**work: object) -> list[threading.Thread]:
    threads = [threading.Thread(target=function, name=name) for name, function in work.items()]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    return threads


def test_an_answer_goes_on_between_the_layers_of_a_long_prefill(tiny_engine: HFEngine) -> None:
    tiny_engine._chunk_tokens = 64
    with slow_layers(tiny_engine, 0.02) as ran:
        long = in_threads(long=lambda: tiny_engine.prefill(LONG))
        until(lambda: len(ran) > 1)
        short = in_threads(short=lambda: tiny_engine.generate("hi", max_new_tokens=2))
        joined([*long, *short])
    first, last = ran.index("short"), len(ran) - 1 - ran[::-1].index("short")
    assert "long" in ran[first:last], "they took turns"
    assert "long" in ran[last:], "the short one ended first"


def test_background_work_runs_in_shorter_passes(tiny_engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_engine._chunk_tokens = 1024
    monkeypatch.setattr(tiny_engine, "_fit_chunk", lambda *_: None)
    tiny_engine.prefill(LONG, namespace="first")  # tries how the model attends
    with slow_layers(tiny_engine, 0.0) as ran:
        tiny_engine.prefill(LONG, namespace="answer")
        answer = len(ran)
        with tiny_engine.in_background():
            tiny_engine.prefill(LONG, namespace="background")
    assert len(ran) - answer > 2 * answer


def test_answers_that_take_turns_within_a_pass_are_what_they_are_alone() -> None:
    engine = HFEngine(tiny_model(), byte_tokenizer())
    questions = ["Who?", "a" * 300, "Where is the library of Alexandria?", "b" * 150]
    alone = [HFEngine(tiny_model(), byte_tokenizer()).generate(one, max_new_tokens=12) for one in questions]
    engine.build_kv_cache(["a shared prefix " * 20])
    together: dict[int, str] = {}

    def ask(index: int) -> None:
        together[index] = engine.generate(questions[index], max_new_tokens=12)

    with slow_layers(engine, 0.001):
        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(questions))]
        for thread in threads:
            thread.start()
        joined(threads)
    assert [together[index] for index in range(len(questions))] == alone


def test_background_work_waits_while_an_answer_needs_the_model(tiny_engine: HFEngine) -> None:
    def encode() -> None:
        with tiny_engine.in_background():
            tiny_engine.prefill(LONG)

    with slow_layers(tiny_engine, 0.01) as ran:
        background = in_threads(background=encode)
        until(lambda: "background" in ran)
        tiny_engine.generate("What?", max_new_tokens=10)
        answered = len(ran)
        joined(background)
    mine = [name for name in ran[:answered] if name != "background"]
    start = ran.index(mine[0])
    assert ran[start:answered].count("background") <= 1, "a layer that was running, and no other"
    assert tiny_engine.known_prefix(LONG) == len(LONG)


async def test_a_cancelled_prefill_stops_between_two_layers_and_gives_the_model_away(tiny_engine: HFEngine) -> None:
    with slow_layers(tiny_engine, 0.05) as ran:
        prompt = tiny_engine.build_prompt("x" * 1500)
        stream = iterate(lambda: tiny_engine.stream(prompt, tiny_engine.sampling(max_new_tokens=4)))
        reading = asyncio.ensure_future(anext(stream))
        while not ran:
            await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        layers = len(ran)
        await awaited(asyncio.to_thread(until, lambda: tiny_engine.lock._holder is None), 5)
        assert len(ran) <= layers + 1
    assert await awaited(asyncio.to_thread(tiny_engine.generate, "hi", max_new_tokens=1), 5) is not None


async def test_cancelled_answers_that_wait_leave_no_thread(tiny_engine: HFEngine) -> None:
    before = threading.active_count()
    with tiny_engine.lock.acquire():
        streams = [iterate(lambda: tiny_engine.stream(tiny_engine.build_prompt("hi"), tiny_engine.sampling()))]
        streams *= 1
        readings = [asyncio.ensure_future(anext(stream)) for stream in streams]
        while not tiny_engine.lock._answers:
            await asyncio.sleep(0.01)
        for reading in readings:
            reading.cancel()
        await asyncio.gather(*readings, return_exceptions=True)
        end = time.monotonic() + 2
        while threading.active_count() > before:
            assert time.monotonic() < end, "a thread still waits for the model"
            await asyncio.sleep(0.01)
    assert not tiny_engine.lock._answers


def test_the_model_may_be_acquired_again_within_and_by_others_after_an_error() -> None:
    lock = ModelLock()
    with pytest.raises(ValueError, match="in the middle"), lock.acquire(), lock.acquire():
        raise ValueError("in the middle")
    joined(in_threads(other=lambda: lock.acquire().__enter__()), 2)


def test_a_reader_that_left_while_it_had_paused_keeps_nothing() -> None:
    lock, left, paused = ModelLock(), Cancellation(), []

    def work() -> None:
        CANCELLATION.set(left)
        with lock.acquire():
            until(lambda: lock._answers)
            paused.append(True)
            time.sleep(2 * _TURN_SECONDS)  # a turn that is shorter does not pause
            with pytest.raises(Cancelled):
                lock.pause()

    first = in_threads(first=work)
    until(lambda: lock._holder is not None)

    def other() -> None:
        with lock.acquire():
            until(lambda: paused and lock._answers)
            left.cancel()
            time.sleep(0.05)

    joined([*first, *in_threads(second=other)], 5)
    assert lock._holder is None
    assert not lock._answers


def test_a_pass_that_is_broken_off_leaves_no_implementation_behind(tiny_engine: HFEngine) -> None:
    config = tiny_engine.model.config
    own = config._attn_implementation
    tiny_engine.prefill(LONG[:100])
    hook = tiny_engine.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_engine.prefill(LONG[:200])
    hook.remove()
    assert config._attn_implementation == own


def test_grouped_heads_of_one_query_attend_as_transformers_does() -> None:
    engine = HFEngine(tiny_model(num_attention_heads=4, num_key_value_heads=2), byte_tokenizer())
    ids = torch.randint(0, 250, (1, 40))
    with torch.no_grad():
        wanted = engine.model(ids).logits[0, -1]
    layers, _ = engine.prefill(ids[0, :-1].tolist())
    from kvcag.cache.layers import generation_cache

    got = engine.forward(ids[0, -1:].tolist(), generation_cache([layers], room=1))[0]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
