"""HTTP requests to one OpenAI-compatible server, with retries, limits and typed errors."""

from __future__ import annotations

import base64
import json
import random
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, Field, ValidationError

from kvcag.concurrency import cancellation
from kvcag.errors import (
    ContextLengthError,
    EngineError,
    InvalidInputError,
    KVCAGError,
    MissingExtraError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
)

try:
    import httpx
except ModuleNotFoundError:
    raise MissingExtraError("VLLMEngine", "vllm") from None

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_OVERLOADED = {429, 502, 503, 504}
_ABSENT = {404, 405, 501}
_LONGEST_PAUSE, _METRICS_TIMEOUT = 20.0, 5.0  # seconds
_LARGEST_LINE, _LARGEST_BODY = 1 << 20, 64 << 20  # bytes
_SPARE_EVENTS = 16
"""The number of events that an answer may have besides one per token: the finish reason, the usage, empty events."""
_CONTEXT_LENGTH = re.compile(r"maximum context length is (\d{1,9})")
_PROMPT_LENGTH = re.compile(r"contains (?:at least )?(\d{1,9}) input tokens|requested (\d{1,9}) tokens")
_START_TIME = re.compile(rb"^process_start_time_seconds (\d+(?:\.\d+)?(?:e\+?\d+)?)$", re.MULTILINE)

# --- responses of a server -------------------------------------------------------------------------------------

Count: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 40)]


class Choice(BaseModel):
    """A piece of an answer."""

    text: str | None = None
    finish_reason: str | None = None


class CachedTokens(BaseModel):
    """How many tokens of a prompt were cached."""

    cached_tokens: Count | None = None


class Counts(BaseModel):
    """Counts of tokens."""

    completion_tokens: Count | None = None
    prompt_tokens_details: CachedTokens | None = None


class Event(BaseModel):
    """An event of an answer's stream. `n` is 1, so there is one choice at most."""

    choices: Annotated[list[Choice], Field(max_length=1)] | None = None
    usage: Counts | None = None
    error: Any = None


class Card(BaseModel):
    """A model's entry in `/v1/models`."""

    id: str
    owned_by: str | None = None
    max_model_len: Annotated[int, Field(gt=0)] | None = None


class Cards(BaseModel):
    """The response of `/v1/models`."""

    data: list[Card] | None = None


class Tokens(BaseModel):
    """The response of `/tokenize`."""

    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]]


class Text(BaseModel):
    """The response of `/detokenize`."""

    prompt: str


class HTTPClient:
    """Requests to one server. Safe to use from several threads. `VLLMEngine` describes the arguments.

    Attributes:
        root: `base_url` without `/v1` and without a password.
        interruptions: how often the server could not be reached or dropped a connection.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        timeout: float,
        deadline: float,
        connect_timeout: float,
        max_retries: int,
        retry_wait: float,
        client: httpx.Client | None,
    ) -> None:
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            shown = re.sub(r".*@", "", base_url)  # without a password
            raise InvalidInputError(f"base_url {shown!r} is not a URL. Pass a URL such as http://127.0.0.1:8000/v1.")
        self.root = str(url.copy_with(userinfo=b"") if url.userinfo else base_url).rstrip("/").removesuffix("/v1")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise InvalidInputError(
                "api_key has a character that an HTTP header cannot have, such as a line break at its end. Remove it."
            )
        login = f"Basic {base64.b64encode(url.userinfo).decode()}" if url.userinfo else None
        self._headers = {"Authorization": value} if (value := f"Bearer {api_key}" if api_key else login) else {}
        self._secrets = [secret for secret in (api_key, url.password) if secret]
        self.interruptions = 0
        self._timeout, self._deadline = timeout, deadline
        self._max_retries, self._retry_wait = max_retries, retry_wait
        self._owns_client, self._closed = client is None, False
        self._client = client or httpx.Client(
            timeout=httpx.Timeout(timeout, connect=connect_timeout),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
        )

    def close(self) -> None:
        """Close the connections. Further requests raise `EngineError`."""
        self._closed = True
        if self._owns_client:
            self._client.close()

    def json(self, kind: type[M], path: str, body: Mapping[str, Any] | None = None) -> M | None:
        """Send a POST request, or a GET request without a body, and return the response.

        Returns:
            The response; None if the server does not have this path.

        Raises:
            ServerUnavailableError: the server cannot be reached or is overloaded.
            ServerTimeoutError: the response did not come within `timeout` seconds.
            ContextLengthError, InvalidInputError, ServerError: the server refused the request, or the response is not
                of this kind.
        """

        def attempt(until: float) -> M:
            with self._open(path, body) as response:
                data = b"".join(self._pieces(response, _Limit(until, self._timeout), _LARGEST_BODY))
            return self._parsed(kind, data, path)

        try:
            return self._retry(attempt)
        except ServerError as refused:
            if refused.status in _ABSENT:
                return None
            raise

    def events(self, path: str, body: Mapping[str, Any]) -> Generator[Event, None, None]:
        """Send a POST request and yield the server-sent events of the answer. Closing the generator ends the request.

        The stream is cut if the server sends more events than `max_tokens` allows. A request that failed after its
        first event is not repeated. Raises the errors of `json`, and `ServerTimeoutError` also after `deadline`
        seconds.
        """

        def attempt(until: float) -> tuple[list[Event], Generator[Event, None, None]]:
            events = self._events(path, body, until)
            return [event for event in [next(events, None)] if event is not None], events

        first, rest = self._retry(attempt)
        with closing(rest):
            yield from first
            yield from rest

    def start_time(self) -> float | None:
        """Return when the server process started, in seconds since 1970; None if the server does not publish it."""
        found = _START_TIME.search(self._metrics())
        return float(found[1]) if found else None

    def counts_transfers(self) -> bool:
        """Whether the server's metrics have a count of tokens from a KV connector, as those of vLLM always have."""
        return b"vllm:external_prefix_cache_queries" in self._metrics()

    def _metrics(self) -> bytes:
        """Return the server's `/metrics`; empty if it does not publish them."""
        limit, url = _Limit(float("inf"), _METRICS_TIMEOUT), f"{self.root}/metrics"
        try:
            with self._client.stream("GET", url, headers=self._headers, timeout=_METRICS_TIMEOUT) as response:
                return b"".join(self._pieces(response, limit, _LARGEST_BODY)) if response.is_success else b""
        except (httpx.HTTPError, EngineError):
            return b""

    def _retry(self, attempt: Callable[[float], T]) -> T:
        """Repeat an attempt that fails because the server is down, starting or overloaded. A cancellation ends a pause.

        Each attempt gets the time by which all attempts must end. `httpx.HTTPTransport(retries=…)` is not used: it
        repeats only connections, and its pauses cannot be cancelled.
        """
        left, wait, until = self._max_retries, self._retry_wait, time.monotonic() + self._deadline
        while True:
            try:
                return attempt(until)
            except (ServerUnavailableError, ServerError) as failure:
                if isinstance(failure, ServerError) and failure.status not in _RETRIED:
                    raise
                pause = min(getattr(failure, "retry_after", 0.0) or wait * random.uniform(0.8, 1.2), _LONGEST_PAUSE)
                if not left or time.monotonic() + pause > until or cancellation().sleep(pause):
                    raise
            left, wait = left - 1, wait * 2

    def _events(self, path: str, body: Mapping[str, Any], until: float) -> Generator[Event, None, None]:
        finished, left = False, body["max_tokens"] + _SPARE_EVENTS
        with self._open(path, body) as response, cancellation().waking(lambda: _shut_down(response)):
            limit = _Limit(until, self._timeout)
            for line in self._lines(response, limit):
                field, _, data = line.partition(b":")
                if field != b"data":  # a comment, which keeps the connection alive, or the end of an event
                    continue
                if data.strip() == b"[DONE]":
                    return
                event = self._parsed(Event, data, path)
                if event.error is not None:
                    code = event.error.get("code") if isinstance(event.error, dict) else None
                    raise self._refusal(path, code if isinstance(code, int) else 500, data)
                finished = finished or any(choice.finish_reason for choice in event.choices or ())
                yield event
                left -= 1
                if not left:
                    return
                limit.extend()
            if not finished:
                raise httpx.RemoteProtocolError("the answer ended without a finish reason")

    def _lines(self, response: httpx.Response, limit: _Limit) -> Iterator[bytes]:
        """Yield the lines of an event stream. `iter_lines` has no size limit, and also splits at U+2028 in JSON."""
        line = bytearray()
        for piece in self._pieces(response, limit):
            *whole, rest = piece.split(b"\n")
            for each in whole:
                yield bytes(line + each)
                line.clear()
            line += rest
            if len(line) > _LARGEST_LINE:
                raise ServerError(str(response.url), 200, f"with a line of more than {_LARGEST_LINE:,} bytes")
        yield bytes(line)

    def _pieces(self, response: httpx.Response, limit: _Limit, most: float = float("inf")) -> Iterator[bytes]:
        """Yield the bytes of a response as they arrive, within limits of time and size."""
        for piece in response.iter_bytes():
            most -= len(piece)
            if most < 0:
                raise ServerError(str(response.url), response.status_code, "with more bytes than such an answer has")
            if time.monotonic() > limit.at:
                raise ServerTimeoutError(
                    f"{self.root} took too long: it sends data, but no further token of the answer. Check its load, or "
                    "raise timeout= (between two tokens) or deadline= (for a whole answer)."
                )
            yield piece

    def _parsed(self, kind: type[M], data: bytes, path: str) -> M:
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            what = f"not JSON of the form {kind.__name__}: {where} {first['msg']}"
            raise ServerError(self.root + path, 200, self._without_secrets(what)) from None

    @contextmanager
    def _open(self, path: str, body: Mapping[str, Any] | None) -> Iterator[httpx.Response]:
        """Yields a successful response. Within the block, every error of httpx becomes an error of kvcag."""
        if self._closed:
            raise EngineError(f"the engine of {self.root} was closed. Make a new one.")
        method, url = "GET" if body is None else "POST", self.root + path
        try:
            with self._client.stream(method, url, json=body, headers=self._headers) as response:
                if not response.is_success:
                    said = b"".join(self._pieces(response, _Limit(float("inf"), self._timeout), _LARGEST_BODY))
                    raise self._refusal(path, response.status_code, said, response.headers.get("retry-after", ""))
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout) as down:
            self._count_interruption()
            raise ServerUnavailableError(
                f"{self.root} cannot be reached: {down or 'no answer'}. Check base_url, and that the server is running."
            ) from down
        except httpx.TimeoutException as silent:
            raise ServerTimeoutError(
                f"timed out waiting for {self.root} ({type(silent).__name__}). It may be reading a long prompt or "
                "answering others first: raise timeout=, or check its load."
            ) from silent
        except httpx.LocalProtocolError:  # not chained: its message has the header, which may be a secret
            raise EngineError(f"the request to {self.root} cannot be sent. Check the headers of client=.") from None
        except httpx.TransportError as broken:
            self._count_interruption()
            raise ServerUnavailableError(
                f"the connection to {self.root} broke: {broken}. The server stopped during the answer. Ask again when "
                "it is back."
            ) from broken
        except (httpx.HTTPError, httpx.StreamError, RuntimeError) as other:  # undecodable data, or a closed client
            raise EngineError(f"the request to {self.root} failed ({type(other).__name__}: {other}).") from other

    def _count_interruption(self) -> None:
        if not cancellation().cancelled:  # else this side ended the request
            self.interruptions += 1

    def _refusal(self, path: str, status: int, said: bytes, pause: str = "") -> KVCAGError:
        """Return the error for an unsuccessful response."""
        url, detail = self.root + path, self._without_secrets(said.decode(errors="replace"))
        with suppress(ValueError, RecursionError):  # the form of OpenAI, old vLLM or FastAPI; or plain text
            answer = json.loads(detail)
            inner = answer.get("error", answer) if isinstance(answer, dict) else answer
            detail = str((inner.get("message") or inner.get("detail") or inner) if isinstance(inner, dict) else inner)
        detail = detail[:500]
        if limit := _CONTEXT_LENGTH.search(detail):
            length = _PROMPT_LENGTH.search(detail)
            return ContextLengthError(int(length[1] or length[2]) if length else 0, 0, int(limit[1]))
        if status == 404 and "model" in detail and "exist" in detail:  # other 404s: the path does not exist
            return InvalidInputError(f"{url} serves another model: {detail} Pass one that it serves as model=.")
        if status in (401, 403):
            return ServerError(url, status, f"{detail}. Pass the server's key: api_key=")
        if status not in _OVERLOADED:
            return ServerError(url, status, detail)
        busy = ServerUnavailableError(f"{url} answered {status}: {detail}. It is starting, stopping or overloaded.")
        busy.retry_after = float(pause) if re.fullmatch(r"\d{1,6}", pause, re.ASCII) else 0.0
        return busy

    def _without_secrets(self, text: str) -> str:
        """Hide secrets in a text of the server, which may quote a refused key."""
        for secret in self._secrets:
            text = text.replace(secret, "[hidden]")
        return text


class _Limit:
    """The time at which a request must end: its deadline, or `seconds` after the last event."""

    def __init__(self, until: float, seconds: float) -> None:
        self._until, self._seconds = until, seconds
        self.extend()

    def extend(self) -> None:
        """Start the `seconds` again, after an event."""
        self.at = min(self._until, time.monotonic() + self._seconds)


def _shut_down(response: httpx.Response) -> None:
    """Wake the thread that reads this response. Closing the socket would not wake it."""
    stream = response.extensions.get("network_stream")
    connection = stream.get_extra_info("socket") if stream is not None else None
    if connection is not None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
