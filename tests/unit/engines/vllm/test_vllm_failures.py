"""A server that is down, slow, overloaded, restarted or wrong: typed errors, retries, and no thread left."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from collections.abc import Iterator

import pytest

from kvcag import HFEngine
from kvcag.chat_template import Prompt
from kvcag.concurrency import iterate
from kvcag.engines.vllm.engine import VLLMEngine
from kvcag.engines.vllm.preloads import Preloads
from kvcag.errors import (
    ContextLengthError,
    EngineError,
    InvalidInputError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
)
from kvcag.testing import EchoEngine, byte_tokenizer
from tests.waits import auntil, awaited, joined
from tests.wire_server import WireServer

QUICK = {"retry_wait": 0.02, "tokenizer": byte_tokenizer()}


@pytest.fixture
def server() -> Iterator[WireServer]:
    with WireServer(EchoEngine(lambda _: "one two three")) as running:
        yield running


@pytest.fixture
def engine(server: WireServer) -> Iterator[VLLMEngine]:
    with VLLMEngine(server.url, **QUICK) as made:
        made.check_server()
        server.bodies.clear()
        yield made
    assert wait_until(lambda: not any(thread.name.startswith("kvcag") for thread in threading.enumerate()))


def prompt(engine: VLLMEngine, text: str = "Count.") -> Prompt:
    return engine.template.prompt([{"role": "user", "content": text}])


def wait_until(holds, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < until:
        time.sleep(0.01)
    return held


# --- not there, or not yet -------------------------------------------------------------------------------------


def test_a_server_that_is_down_is_named() -> None:
    with VLLMEngine("http://127.0.0.1:9/v1", "m", **QUICK) as engine:
        with pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:9 cannot be reached") as down:
            engine.generate("?")
        assert isinstance(down.value, ConnectionError)
        with pytest.raises(ServerUnavailableError):
            engine.check_server(timeout=0.1)
    with VLLMEngine("http://127.0.0.1:9", max_retries=0) as engine, pytest.raises(ServerUnavailableError):
        engine.check_server()  # also without a local tokenizer


def test_an_overloaded_server_is_asked_again(server: WireServer, engine: VLLMEngine) -> None:
    server.faults.times, server.faults.status = 2, 503
    assert engine.generate("Count.", max_new_tokens=20) == "one two three"
    assert len(server.prompts()) == 3


def test_a_server_that_stays_overloaded_is_given_up(server: WireServer, engine: VLLMEngine) -> None:
    server.faults.times = 99
    with pytest.raises(ServerUnavailableError, match="503: The engine is not ready"):
        engine.generate("Count.")
    assert len(server.prompts()) == 4  # once, and three times again


def test_the_wait_that_a_server_asks_for_is_waited(server: WireServer, engine: VLLMEngine) -> None:
    server.faults.times, server.faults.status, server.faults.retry_after = 1, 429, "1"
    began = time.monotonic()
    assert engine.generate("Count.", max_new_tokens=20) == "one two three"
    assert time.monotonic() - began >= 1


def test_a_connection_that_breaks_before_an_answer_is_made_again(server: WireServer, engine: VLLMEngine) -> None:
    server.faults.reset = 2
    assert engine.generate("Count.", max_new_tokens=20) == "one two three"


def test_an_answer_that_broke_off_before_its_first_word_is_asked_again(server: WireServer, engine: VLLMEngine) -> None:
    server.faults.drop_after = 0
    assert engine.generate("Count.", max_new_tokens=20) == "one two three"
    assert len(server.prompts()) == 2


def test_an_answer_that_breaks_off_in_the_middle_is_no_answer(server: WireServer, engine: VLLMEngine) -> None:
    server.faults.drop_after = 4
    said: list[str] = []
    with pytest.raises(ServerUnavailableError, match="stopped during the answer"):
        said.extend(chunk.text for chunk in engine.stream(prompt(engine), engine.sampling()))
    assert "".join(said) == "one "
    assert len(server.prompts()) == 1  # a part of the answer was read already
    assert engine.generate("Count.", max_new_tokens=20) == "one two three"


def test_a_server_that_is_starting_is_waited_for(server: WireServer, engine: VLLMEngine) -> None:
    server.stop()
    starting = threading.Timer(0.3, server.start)
    starting.start()
    engine.check_server(timeout=10)
    joined([starting])
    assert engine.generate("Count.", max_new_tokens=20) == "one two three"


# --- silent ----------------------------------------------------------------------------------------------------


def test_a_server_that_says_nothing_is_given_up(server: WireServer) -> None:
    with VLLMEngine(server.url, timeout=0.2, **QUICK) as engine:
        engine.check_server()
        server.faults.silence = 5
        began = time.monotonic()
        with pytest.raises(ServerTimeoutError, match="raise timeout="):
            engine.generate("Count.")
        assert time.monotonic() - began < 2
        assert isinstance(ServerTimeoutError("x"), TimeoutError)
    assert wait_until(server.aborted.is_set)


def test_closing_a_stream_closes_its_request(server: WireServer, engine: VLLMEngine) -> None:
    server.faults.pause = 0.05
    chunks = engine.stream(prompt(engine), engine.sampling())
    next(chunks)
    chunks.close()
    assert wait_until(server.aborted.is_set)


async def test_cancelling_before_the_first_word_closes_the_request_at_once(
    server: WireServer, engine: VLLMEngine
) -> None:
    server.faults.silence = 30

    async def consume() -> None:
        async for _ in iterate(lambda: engine.stream(prompt(engine), engine.sampling())):
            pass

    task = asyncio.create_task(consume())
    await auntil(server.prompts)
    await asyncio.sleep(0.1)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await awaited(task)
    assert await asyncio.to_thread(wait_until, server.aborted.is_set)
    assert time.monotonic() - began < 5
    assert engine._http.interruptions == 0  # the server did not go away


async def test_cancelling_while_a_request_waits_to_be_made_again_ends_the_wait(server: WireServer) -> None:
    with VLLMEngine("http://127.0.0.1:9", "m", context_length=999, tokenizer=byte_tokenizer(), retry_wait=30) as engine:
        asked = prompt(engine)
        stream = iterate(lambda: engine.stream(asked, engine.sampling()))
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await awaited(task)
        await awaited(stream.aclose())
        await awaited(asyncio.get_running_loop().shutdown_default_executor())  # waits for the worker thread
        assert time.monotonic() - began < 5


def test_closing_an_engine_ends_what_is_under_way(server: WireServer) -> None:
    engine = VLLMEngine(server.url, **QUICK)
    engine.generate("Count.", max_new_tokens=3)
    engine.close()
    with pytest.raises(EngineError, match="was closed"):
        engine.generate("Count.")
    engine.close()


# --- wrong -----------------------------------------------------------------------------------------------------


def test_a_context_that_is_too_long_is_named_when_only_the_server_knows(server: WireServer) -> None:
    server.max_model_len = 40
    with VLLMEngine(server.url, context_length=10_000, **QUICK) as engine:
        with pytest.raises(ContextLengthError, match="40") as refused:
            engine.generate("x" * 100)
        assert refused.value.prompt_tokens == len(prompt(engine, "x" * 100).token_ids)
        assert refused.value.limit == 40


def test_an_error_within_the_stream_is_an_error(server: WireServer, engine: VLLMEngine) -> None:
    server.faults.error_event = {
        "message": "Token id 999999 is out of vocabulary",
        "type": "BadRequestError",
        "code": 400,
    }
    with pytest.raises(ServerError, match="out of vocabulary") as refused:
        engine.generate("Count.")
    assert refused.value.status == 400
    server.faults.error_event = {"message": "EngineCore encountered an issue.", "code": 500}
    assert engine.generate("Count.", max_new_tokens=20) == "one two three"  # failures of the server are repeated


def test_events_that_are_no_json_are_an_error(server: WireServer, engine: VLLMEngine) -> None:
    server.faults.garbage = True
    with pytest.raises(ServerError, match="not JSON"):
        engine.generate("Count.")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_line_separator_in_an_answer_ends_no_event(separator: str) -> None:
    """JSON may hold them as they are, and `str.splitlines` breaks lines at them."""
    with (
        WireServer(EchoEngine(lambda _: f"one{separator}two")) as server,
        VLLMEngine(server.url, **QUICK) as engine,
    ):
        assert engine.generate("?", max_new_tokens=20) == f"one{separator}two"


def test_a_refusal_is_not_repeated(server: WireServer, engine: VLLMEngine) -> None:
    server.faults.times, server.faults.status = 9, 418
    with pytest.raises(ServerError, match="418"):
        engine.generate("Count.")
    assert len(server.prompts()) == 1


def test_a_server_that_is_no_such_server_says_so(server: WireServer) -> None:
    with VLLMEngine(server.url + "/v2", **QUICK) as engine, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ServerError, match="Not Found"):
            engine.generate("?")


# --- restarted -------------------------------------------------------------------------------------------------


def preload(engine: VLLMEngine, *texts: str) -> None:
    for text in texts:
        engine.build_vllm_kv_cache(text * 100)


def cached(engine: VLLMEngine, text: str) -> int:
    *_, last = engine.stream(prompt(engine, text), engine.sampling(max_new_tokens=1))
    return last.usage.cached_tokens


def restart(server: WireServer, engine: VLLMEngine) -> None:
    """Restart it, and ask while it is down."""
    server.stop()
    with pytest.raises(ServerUnavailableError):
        engine.generate("Count.")
    server.bodies.clear()
    server.start()


def test_after_a_restart_everything_that_was_sent_ahead_is_sent_again(server: WireServer, engine: VLLMEngine) -> None:
    preload(engine, "First. ", "Second. ", "Third. ")
    sent = server.prompts()
    restart(server, engine)
    assert engine.generate("Count.", max_new_tokens=20) == "one two three"
    assert wait_until(lambda: all(one in server.prompts() for one in sent))
    context = engine.build_vllm_kv_cache("First. " * 100)
    *_, last = engine.stream(engine.build_prompt("Count.", context), engine.sampling(max_new_tokens=1), context)
    assert last.usage.cached_tokens >= len(context.token_ids) // 16 * 16


def test_a_restart_between_two_questions_is_seen_by_what_the_server_forgot(server: WireServer) -> None:
    """No connection is refused and none breaks: only the missing cached tokens show it."""
    with VLLMEngine(server.url, **QUICK) as engine:
        preload(engine, "First. ", "Second. ")
        context = engine.build_vllm_kv_cache("Third. " * 100)
        engine._http._client.close()  # drops idle connections, as after a minute
        engine._http._client = type(engine._http._client)()
        sent = server.prompts()
        server.stop()
        server.bodies.clear()
        server.start()
        engine.generate("Count.", context, max_new_tokens=2)
        assert engine._http.interruptions == 0
        assert wait_until(lambda: all(one in server.prompts() for one in sent))


def test_an_eviction_is_no_restart(server: WireServer, engine: VLLMEngine) -> None:
    preload(engine, "First. ", "Second. ")
    context = engine.build_vllm_kv_cache("Third. " * 100)
    server.blocks.clear()
    server.bodies.clear()
    engine.generate("Count.", context, max_new_tokens=2)
    assert wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("kvcag")])
    assert len(server.prompts()) == 1


def test_what_is_forgotten_is_not_sent_again(server: WireServer, engine: VLLMEngine) -> None:
    preload(engine, "First. ")
    engine.forget()
    restart(server, engine)
    engine.generate("Count.", max_new_tokens=2)
    assert wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("kvcag")])
    assert len(server.prompts()) == 1


def test_a_server_restarted_with_another_tokenizer_is_found_out(tiny_engine: HFEngine) -> None:
    with WireServer(tiny_engine) as server, VLLMEngine(server.url, **QUICK) as engine:
        preload(engine, "First. ")
        server.engine.template.tokenizer.add_tokens(["Count", "def"])
        restart(server, engine)
        engine.generate("Count.", max_new_tokens=2)
        assert wait_until(lambda: not engine._tokens_checked)
        with pytest.raises(InvalidInputError, match="different token ids"):
            engine.generate("Count.")


def test_closing_does_not_wait_for_ever_for_a_server_that_says_nothing(
    server: WireServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller's own client may have no timeout."""
    monkeypatch.setattr(Preloads, "CLOSING_SECONDS", 0.1)
    engine = VLLMEngine(server.url, **QUICK)
    asked, go = threading.Event(), threading.Event()
    preload(engine, "First. ")
    restart(server, engine)

    def silent() -> None:
        asked.set()
        go.wait(30)

    monkeypatch.setattr(engine._http, "start_time", silent)
    engine.generate("Count.", max_new_tokens=2)
    assert asked.wait(30)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 5
    go.set()
    joined(thread for thread in threading.enumerate() if thread.name.startswith("kvcag"))


def test_closing_an_engine_ends_sending_again(server: WireServer) -> None:
    engine = VLLMEngine(server.url, **QUICK)
    preload(engine, *(f"Number {n}. " for n in range(20)))
    restart(server, engine)
    engine.generate("Count.", max_new_tokens=2)
    server.faults.silence = 0.2
    engine.close()
    assert wait_until(lambda: not any(thread.name.startswith("kvcag") for thread in threading.enumerate()))
