"""A server that sends what it should not: typed errors, limits of time and size, and no secret in any message."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import pytest

from kvcag import KVCAGError
from kvcag.engines.vllm.client import _LARGEST_LINE, _SPARE_EVENTS
from kvcag.engines.vllm.engine import VLLMEngine
from kvcag.errors import EngineError, InvalidInputError, ServerError, ServerTimeoutError
from kvcag.testing import byte_tokenizer

WORD = b'data: {"choices": [{"text": "x"}]}\n\n'
END = b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
KEY = "sk-very-secret"


def engine_over(
    answer: Iterable[bytes] | Callable[[], Iterable[bytes]], paths: dict[str, bytes] | None = None, **settings: Any
) -> VLLMEngine:
    """An engine whose server answers prompts with these bytes, and other paths with what is given for them."""
    answers = {"/v1/models": b'{"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 999}]}', **(paths or {})}

    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/completions":
            return httpx.Response(200, content=iter(answer() if callable(answer) else answer))
        known = answers.get(request.url.path)
        return httpx.Response(404) if known is None else httpx.Response(200, content=known)

    client = httpx.Client(transport=httpx.MockTransport(respond))
    engine = VLLMEngine(client=client, **{"tokenizer": byte_tokenizer(), "max_retries": 0, **settings})
    engine._tokens_checked = True
    return engine


def events(*parts: object) -> list[bytes]:
    return [b"data: " + (part if isinstance(part, bytes) else json.dumps(part).encode()) + b"\n\n" for part in parts]


MALFORMED: list[object] = [
    *(1, "text", None, [], [1], True, 1.5),
    *({"choices": value} for value in (1, "x", {}, [1], [None], [[]], ["x"])),
    *({"choices": [{"text": value}]} for value in (1, [], {})),
    *({"choices": [{"text": "", "finish_reason": value}]} for value in (1, [], {"a": 1})),
    *({"choices": [], "usage": value} for value in (1, "x", [1])),
    *({"choices": [], "usage": {"completion_tokens": value}} for value in ("x", -1, 1.5, [], 10**400)),
    *({"choices": [], "usage": {"prompt_tokens_details": value}} for value in (1, "x", {"cached_tokens": "x"})),
    *({"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": value}}} for value in (-1, 2**80)),
    *({"error": value} for value in (1, "x", [], {}, {"code": "x"}, {"message": [], "code": 10**30})),
    *(b"{not json", b"", b"\xff\xfe", b'"\\ud800"', b"9" * 5000, b"[" * 100_000, b'{"a":' * 100_000),
    b'{"choices": [{"text": "\\ud800"}]}',
]


@pytest.mark.parametrize("event", MALFORMED, ids=lambda event: str(event)[:40])
def test_a_malformed_event_is_an_error_of_ours(event: object) -> None:
    """Fifteen of these raised AttributeError, TypeError, ValueError or RecursionError."""
    with engine_over([*events(event), END]) as engine, pytest.raises(EngineError):
        engine.generate("?", max_new_tokens=4)


@pytest.mark.filterwarnings("ignore::kvcag.errors.ServerWarning")
@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "said",
    [
        *(b"1", b'"x"', b"[]", b"[" * 100_000, b"", b"\xff", b'{"data": 1}', b'{"data": [1]}', b'{"data": [{}]}'),
        *(b'{"data": [{"id": []}]}', b'{"data": [{"id": "m", "max_model_len": "x"}]}', b'{"tokens": 1}'),
        *(b'{"tokens": ["x"]}', b'{"tokens": [-1]}', b'{"prompt": 1}', b'{"tokens": [1.5]}'),
    ],
    ids=lambda said: str(said)[:40],
)
def test_a_malformed_answer_is_an_error_of_ours(path: str, said: bytes) -> None:
    with engine_over([WORD, END], {path: said}, tokenizer=None) as engine:
        try:
            engine.generate("?", max_new_tokens=4)
        except KVCAGError:
            assert True


@pytest.mark.parametrize(
    "said", [b"process_start_time_seconds x", b"process_start_time_seconds " + b"9" * 5000, b"\xff"]
)
def test_malformed_metrics_say_nothing(said: bytes) -> None:
    with engine_over([WORD, END], {"/metrics": said}) as engine:
        assert engine._http.start_time() in (None, float("inf"))
    with engine_over([], {"/metrics": b"a\nprocess_start_time_seconds 1.75e+09\n"}) as engine:
        assert engine._http.start_time() == 1.75e9


@pytest.mark.parametrize("pause", ["²", "-1", "1e9", "x", "9" * 5000])
def test_a_malformed_retry_after_is_ignored(pause: str) -> None:
    def busy(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503, headers=[(b"retry-after", pause.encode())])

    client = httpx.Client(transport=httpx.MockTransport(busy))
    with (
        VLLMEngine(client=client, model="m", tokenizer=byte_tokenizer(), max_retries=1, retry_wait=0.01) as engine,
        pytest.raises(EngineError),
    ):
        engine.generate("?")


# --- secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\r\nX-Injected: 1", f"{KEY}\0", f"{KEY}ü"])
def test_a_key_with_a_line_break_is_refused_without_being_shown(key: str) -> None:
    """httpx's message, and so ours, held the key."""
    with pytest.raises(InvalidInputError, match="line break") as refused:
        VLLMEngine("http://127.0.0.1:9", "m", api_key=key)
    assert KEY not in "".join(traceback.format_exception(refused.value))


def test_a_key_that_a_server_repeats_is_hidden() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            401, json={"error": {"message": f"Incorrect API key: {request.headers['authorization']}"}}
        )

    client = httpx.Client(transport=httpx.MockTransport(refuse))
    with (
        VLLMEngine(client=client, model="m", api_key=KEY, tokenizer=byte_tokenizer()) as engine,
        pytest.raises(ServerError, match="hidden") as refused,
    ):
        engine.generate("?")
    assert KEY not in "".join(traceback.format_exception(refused.value))


def test_a_key_in_the_headers_of_a_client_is_not_shown() -> None:
    client = httpx.Client(headers={"X-Key": f"{KEY}\n"})
    with (
        VLLMEngine("http://127.0.0.1:9", "m", client=client, tokenizer=byte_tokenizer()) as engine,
        pytest.raises(EngineError) as refused,
    ):
        engine.generate("?")
    assert KEY not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    "url", [f"http://me:{KEY}@127.0.0.1:9/v1", f"htp://me:{KEY}@x", f"http://me:{KEY}@[", f"me:{KEY}@x"]
)
def test_a_password_in_the_url_is_in_no_message_and_no_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(KVCAGError) as failed:
        VLLMEngine(url, "m", tokenizer=byte_tokenizer(), max_retries=0).generate("?")
    assert KEY not in "".join(traceback.format_exception(failed.value))
    assert KEY not in caplog.text


def test_a_password_in_the_url_is_sent() -> None:
    asked: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(500)

    client = httpx.Client(transport=httpx.MockTransport(respond))
    with VLLMEngine("http://me:pw@x/v1", "m", client=client, max_retries=0) as engine, pytest.raises(ServerError):
        engine.generate("?")
    assert asked[0].headers["authorization"] == "Basic bWU6cHc="
    assert str(asked[0].url).startswith("http://x/")


# --- limits --------------------------------------------------------------------------------------------------------


def slowly(parts: Iterable[bytes], pause: float) -> Callable[[], Iterator[bytes]]:
    def send() -> Iterator[bytes]:
        for part in parts:
            time.sleep(pause)
            yield part

    return send


def forever(part: bytes) -> Iterator[bytes]:
    while True:
        yield part


def within(seconds: float, engine: VLLMEngine, error: type[Exception], tokens: int = 99) -> None:
    with engine:
        began = time.monotonic()
        with pytest.raises(error):
            engine.generate("?", max_new_tokens=tokens)
        assert time.monotonic() - began < seconds


@pytest.mark.parametrize("part", [b": alive\n\n", b"\n", b"d", b"event: ping\n"])
def test_a_server_that_only_keeps_the_connection_alive_is_given_up(part: bytes) -> None:
    within(3, engine_over(slowly(forever(part), 0.01), timeout=0.2), ServerTimeoutError)


def test_a_whole_answer_has_a_deadline() -> None:
    within(3, engine_over(slowly(forever(WORD), 0.01), deadline=0.3), ServerTimeoutError, tokens=900)


def test_repetitions_end_at_the_deadline() -> None:
    client = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(503)))
    settings: dict[str, Any] = {"max_retries": 1000, "retry_wait": 0.05, "deadline": 0.3, "context_length": 999}
    engine = VLLMEngine(client=client, model="m", tokenizer=byte_tokenizer(), **settings)
    began = time.monotonic()
    with engine, pytest.raises(EngineError):
        engine.generate("?")
    assert time.monotonic() - began < 3


def test_a_line_without_an_end_is_given_up() -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b"data: "
        for part in forever(b"x" * 4096):
            sent += len(part)
            yield part

    within(10, engine_over(endless), ServerError)
    assert sent < 2 * _LARGEST_LINE


def test_an_answer_without_an_end_is_given_up() -> None:
    def flood(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=forever(b" " * (1 << 20)))

    with (
        VLLMEngine(client=httpx.Client(transport=httpx.MockTransport(flood)), tokenizer=byte_tokenizer()) as engine,
        pytest.raises(ServerError, match="more bytes"),
    ):
        engine.check_server()


@pytest.mark.parametrize("part", [WORD, b'data: {"choices": []}\n\n', b"data: {}\n\n"], ids=["words", "empty", "bare"])
def test_no_more_events_are_read_than_were_asked_for(part: bytes) -> None:
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        for each in forever(part):
            read += 1
            yield each

    with engine_over(endless) as engine:
        *_, last = engine.stream(
            engine.template.prompt([{"role": "user", "content": "?"}]), engine.sampling(max_new_tokens=8)
        )
    assert last.finish_reason == "length"
    assert read <= 8 + _SPARE_EVENTS
