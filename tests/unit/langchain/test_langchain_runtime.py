"""LangChain at run time: response cache, callbacks, events, threads, closing, the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import FakeListChatModel
from langchain_core.load import dumps
from langchain_core.messages import HumanMessage, SystemMessage

from kvcag import HFEngine
from kvcag.langchain import ChatKVCAG
from kvcag.testing import EchoEngine, byte_tokenizer, tiny_model
from tests.waits import awaited, set_by

DOCUMENTS = [SystemMessage(["one. ", "two. ", "Answer."]), HumanMessage("why?")]


def says(text: str) -> str:
    """Say something."""
    return text


# --- LangChain's response cache and traces ----------------------------------------------------------------------------


def test_the_response_cache_never_crosses_corpora_models_or_settings(tiny_engine: HFEngine) -> None:
    cache = InMemoryCache()
    llm = ChatKVCAG(engine=tiny_engine, max_tokens=8, cache=cache)
    context, other_context = llm.create_context(["corpus one"]), llm.create_context(["corpus two"])
    calls = [
        llm,
        llm.bind(cached_content=context),
        llm.bind(cached_content=other_context),
        ChatKVCAG(engine=HFEngine(tiny_model(seed=3), byte_tokenizer()), max_tokens=8, cache=cache),
        ChatKVCAG(engine=HFEngine(tiny_model(dtype=torch.bfloat16), byte_tokenizer()), max_tokens=8, cache=cache),
        ChatKVCAG(engine=tiny_engine, max_tokens=8, cache=cache, merge_strategy="rotate"),
        ChatKVCAG(engine=tiny_engine, max_tokens=8, cache=cache, stop=["q"]),
    ]
    for call in calls:
        call.invoke("hello")
    assert len(cache._cache) == len(calls)
    llm.invoke("hello")
    assert len(cache._cache) == len(calls)


def test_revision_dtype_and_adapter_change_what_identifies_a_model() -> None:
    base = ChatKVCAG(model="some/model")._identifying_params
    for settings in ({"revision": "v2"}, {"dtype": "bfloat16"}, {"model_kwargs": {"adapter": "lora"}}):
        assert ChatKVCAG(model="some/model", **settings)._identifying_params != base


class Everything(BaseCallbackHandler):
    """Stores everything that a tracer receives."""

    raise_error = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def on_chat_model_start(self, *given: Any, **more: Any) -> None:
        self.seen.append(("start", (given, more)))

    def on_llm_new_token(self, *given: Any, **more: Any) -> None:
        self.seen.append(("token", (given, more)))

    def on_llm_end(self, *given: Any, **more: Any) -> None:
        self.seen.append(("end", (given, more)))

    def on_llm_error(self, *given: Any, **more: Any) -> None:
        self.seen.append(("error", (given, more)))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.seen]


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor that can be reached from a value's plain containers and pydantic models."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from tensors(part)
    elif hasattr(value, "model_fields_set"):
        yield from tensors(dict(value))


def test_no_tensor_is_in_messages_traces_or_dumps(llm: ChatKVCAG) -> None:
    handler = Everything()
    answer = llm.invoke(DOCUMENTS, config={"callbacks": [handler]})
    assert handler.names == ["start", "end"]
    assert list(tensors(handler.seen)) == []
    assert list(tensors(answer)) == []
    assert len(dumps(answer)) < 3000
    assert len(dumps(llm)) < 2000


async def events_of(model: Any) -> list[tuple[str, str]]:
    events = [event async for event in model.astream_events("abc", version="v2")]
    kinds = [(event["event"], event["name"]) for event in events]
    return [kind for index, kind in enumerate(kinds) if index == 0 or kind != kinds[index - 1]]


async def test_events_come_as_from_a_core_model() -> None:
    fake = FakeListChatModel(responses=["abc"], name="model")
    ours = ChatKVCAG(engine=EchoEngine(), max_tokens=8, name="model")
    assert await events_of(ours) == await events_of(fake)


async def test_callbacks_come_as_from_a_core_model() -> None:
    async def names(model: Any) -> list[list[str]]:
        handlers = [Everything() for _ in range(4)]
        model.invoke("abc", config={"callbacks": [handlers[0]]})
        list(model.stream("abc", config={"callbacks": [handlers[1]]}))
        await model.ainvoke("abc", config={"callbacks": [handlers[2]]})
        async for _ in model.astream("abc", config={"callbacks": [handlers[3]]}):
            pass
        return [handler.names for handler in handlers]

    fake = FakeListChatModel(responses=["abc"])
    assert await names(ChatKVCAG(engine=EchoEngine(), max_tokens=8)) == [
        [*kinds[:-1], *(["token"] * ("token" in kinds)), kinds[-1]] for kinds in await names(fake)
    ]  # ours has one chunk more: usage and finish reason come after the last token


def test_tracing_parameters_name_provider_and_model(llm: ChatKVCAG) -> None:
    params = llm._get_ls_params(stop=["x"])
    assert (params["ls_provider"], params["ls_model_name"], params["ls_stop"]) == ("kvcag", llm.model, ["x"])
    assert llm._get_ls_params(model="other")["ls_model_name"] == "other"


# --- threads, closing, the event loop ---------------------------------------------------------------------------------


def test_closing_a_stream_stops_the_model_and_reports_once(llm: ChatKVCAG) -> None:
    handler, threads = Everything(), threading.active_count()
    stream = llm.stream("hello", config={"callbacks": [handler]}, max_tokens=500)
    next(stream)
    steps = count_steps(llm.engine)
    stream.close()
    assert (handler.names.count("error"), threading.active_count(), steps()) == (1, threads, 0)


@pytest.mark.parametrize("forced", [False, True], ids=["text", "a call, which is held back"])
async def test_cancelling_a_stream_stops_the_model_and_reports_once(llm: ChatKVCAG, forced: bool) -> None:
    asked: Any = llm.bind_tools([says], tool_choice="any") if forced else llm
    handler, started, steps = Everything(), asyncio.Event(), count_steps(llm.engine)

    async def consume() -> None:
        async for _ in asked.astream("hello", config={"callbacks": [handler]}, max_tokens=1200):
            started.set()

    task = asyncio.create_task(consume())
    await set_by(task, started)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await awaited(task)
    at_cancel = steps()
    await asyncio.sleep(0.5)
    assert steps() <= at_cancel + 1  # the step that was running
    assert handler.names.count("error") == 1


async def test_gradients_are_off_in_the_model_and_on_around_it(llm: ChatKVCAG) -> None:
    modes: list[bool] = []
    llm.engine.model.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))

    async def consume() -> list[bool]:
        return [torch.is_grad_enabled() async for _ in llm.astream("hello")]

    around = await awaited(asyncio.gather(*(consume() for _ in range(4))))
    assert modes
    assert not any(modes)
    assert all(all(seen) for seen in around)
    assert torch.is_grad_enabled()


async def test_the_event_loop_keeps_ticking_during_prefill() -> None:
    engine = HFEngine(tiny_model(hidden_size=256, intermediate_size=512, num_hidden_layers=4), byte_tokenizer())
    llm = ChatKVCAG(engine=engine, max_tokens=1)
    ticks, done = 0, False

    async def tick() -> None:
        nonlocal ticks
        while not done:
            await asyncio.sleep(0.001)
            ticks += 1

    ticking = asyncio.create_task(tick())
    await awaited(llm.ainvoke("a long question. " * 100))
    done = True
    await awaited(ticking)
    assert ticks >= 3


def test_an_engine_error_reaches_the_consumer_at_once(llm: ChatKVCAG) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the device is lost")

    llm.engine.model.register_forward_pre_hook(fail)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="the device is lost"):
        asyncio.run(llm.ainvoke("hello"))
    assert time.monotonic() - started < 5


def count_steps(engine: HFEngine) -> Any:
    """A function that returns how many times the model ran since."""
    runs: list[int] = []
    engine.model.register_forward_pre_hook(lambda *_: runs.append(1))
    return lambda: len(runs)
