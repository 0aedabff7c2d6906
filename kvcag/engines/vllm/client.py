"""HTTP to one OpenAI-compatible server: retries, server-sent events, and every failure as one of our errors."""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any

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
from kvcag.streams import cancellation

try:
    import httpx
except ModuleNotFoundError:
    raise MissingExtraError("VLLMEngine", "vllm") from None

_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_OVERLOADED = {429, 502, 503, 504}
_ABSENT = {404, 405, 501}
_LONGEST_WAIT, _METRICS_SECONDS = 20.0, 5.0
_CONTEXT = re.compile(r"maximum context length is (\d+)")
_ASKED = re.compile(r"contains (?:at least )?(\d+) input tokens|requested (\d+) tokens")
_STARTED = re.compile(r"^process_start_time_seconds (\S+)$", re.MULTILINE)


class HTTPClient:
    """Requests to one server. Safe to use from several threads.

    What failed before anything came back is tried again, after a pause that doubles: a server that is down, starting
    or overloaded (408, 425, 429, 5xx). What failed in the middle of an answer is not.

    Args:
        base_url: where the API is, with `/v1` or without.
        api_key: sent as a bearer token.
        timeout: seconds of silence after which a server is given up.
        connect_timeout: seconds in which a connection must be made.
        max_retries: how often a request is made again.
        retry_wait: seconds before the first time; doubled before each other.
        client: one of your own, for certificates, proxies or headers. It is not closed here, and its timeouts count.

    Attributes:
        interruptions: how often the server could not be reached, or went away. Who sees it grow suspects a restart.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        connect_timeout: float = 5.0,
        max_retries: int = 3,
        retry_wait: float = 0.5,
        client: httpx.Client | None = None,
    ) -> None:
        self.root = base_url.rstrip("/").removesuffix("/v1")
        if not self.root.startswith(("http://", "https://")):
            raise InvalidInputError(f"base_url {base_url!r} is no URL: pass one like http://127.0.0.1:8000/v1")
        self.max_retries, self.retry_wait = max_retries, retry_wait
        self.interruptions = 0
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._own, self._closed = client is None, False
        self._client = client or httpx.Client(
            timeout=httpx.Timeout(timeout, connect=connect_timeout),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
        )

    def close(self) -> None:
        """Close the connections. Another request is an error."""
        self._closed = True
        if self._own:
            self._client.close()

    def get(self, path: str) -> Any:
        """JSON; None where the server has no such path."""
        return self._json("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """JSON; None where the server has no such path."""
        return self._json("POST", path, body)

    def events(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """A streamed answer, event by event. Closing it closes the request, and the server stops.

        Raises:
            ServerUnavailableError: the server cannot be reached, or the answer broke off.
            ServerTimeoutError: it fell silent.
            ContextLengthError, InvalidInputError, ServerError: it refused.
        """
        retries = self._retries()
        while True:
            came = False
            try:
                with closing(self._events(path, body, retries)) as events:
                    for event in events:
                        came = True
                        yield event
                return
            except (ServerUnavailableError, ServerError) as failure:
                if came or (isinstance(failure, ServerError) and failure.status not in _RETRIED):
                    raise
                retries.wait_after(failure)

    def started_at(self) -> float | None:
        """When the server process started, in seconds since 1970; None where the server does not say."""
        try:
            response = self._client.get(f"{self.root}/metrics", headers=self._headers, timeout=_METRICS_SECONDS)
        except httpx.HTTPError:
            return None
        found = _STARTED.search(response.text) if response.is_success else None
        return float(found[1]) if found else None

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            with closing(self._send(method, path, body, self._retries())) as response, self._failures():
                response.read()
        except ServerError as refused:
            if refused.status in _ABSENT:
                return None
            raise
        try:
            return response.json()
        except ValueError as malformed:
            raise ServerError(self._shown(path), response.status_code, f"no JSON ({malformed})") from malformed

    def _retries(self) -> _Retries:
        return _Retries(self.max_retries, self.retry_wait)

    def _events(self, path: str, body: Mapping[str, Any], retries: _Retries) -> Generator[dict[str, Any], None, None]:
        going, ended = cancellation(), False
        response = self._send("POST", path, body, retries)
        with closing(response), going.waking(lambda: _shut(response)), self._failures():
            for line in response.iter_lines():
                name, _, data = line.partition(":")
                if name != "data":  # comments keep a connection alive, blank lines end an event
                    continue
                if data.strip() == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    code = event["error"].get("code") if isinstance(event["error"], dict) else None
                    raise refusal(self._shown(path), code if isinstance(code, int) else 500, data)
                ended = ended or any(choice.get("finish_reason") for choice in event.get("choices", ()))
                yield event
        if not ended:
            self._interrupted()
            raise ServerUnavailableError(f"{self._shown(path)} broke off: the answer has no end. {_BROKE}")

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None, retries: _Retries) -> httpx.Response:
        """A response that was begun and is a success; the caller closes it."""
        if self._closed:
            raise EngineError(f"this engine of {self.root} was closed: make another one")
        while True:
            try:
                with self._failures():
                    request = self._client.build_request(method, self.root + path, json=body, headers=self._headers)
                    response = self._client.send(request, stream=True)
                    if response.is_success:
                        return response
                    with closing(response):
                        response.read()
            except ServerUnavailableError as down:
                retries.wait_after(down)
                continue
            error = refusal(self._shown(path), response.status_code, response.text)
            if response.status_code not in _RETRIED:
                raise error
            if response.status_code in _OVERLOADED:
                error = ServerUnavailableError(f"{error}. It is starting, stopping or overloaded.")
            retries.wait_after(error, response.headers.get("retry-after"))

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """What fails in httpx, as our errors."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as down:
            self._interrupted()
            raise ServerUnavailableError(
                f"{self.root} cannot be reached: {down or 'no answer'}. Check base_url, and that the server runs."
            ) from down
        except httpx.TimeoutException as silent:
            raise ServerTimeoutError(
                f"{self.root} said nothing for longer than it may ({type(silent).__name__}). It may be reading a long "
                "prompt, or have many before yours: raise timeout=, or look at its load."
            ) from silent
        except httpx.TransportError as broken:
            self._interrupted()
            raise ServerUnavailableError(f"the connection to {self.root} broke: {broken}. {_BROKE}") from broken
        except json.JSONDecodeError as malformed:
            raise ServerError(self.root, 200, f"an event that is no JSON: {malformed}") from malformed

    def _interrupted(self) -> None:
        if not cancellation().cancelled:  # else it was this side that broke the connection
            self.interruptions += 1

    def _shown(self, path: str) -> str:
        return self.root + path


_BROKE = "The server went away while it answered; ask again once it is back."


class _Retries:
    """How often one request may be made again, and how long to wait before."""

    def __init__(self, most: int, first_wait: float) -> None:
        self._left, self._wait = most, first_wait

    def wait_after(self, failure: KVCAGError, asked: str | None = None) -> None:
        """Wait before the next try, as long as the server asked for, if it did.

        Raises:
            KVCAGError: the failure, where there is no other try, or nobody waits for it any more.
        """
        if not self._left:
            raise failure
        wait = float(asked) if asked and asked.isdigit() else self._wait * random.uniform(0.8, 1.2)
        self._left, self._wait = self._left - 1, self._wait * 2
        if cancellation().sleep(min(wait, _LONGEST_WAIT)):
            raise failure


def refusal(where: str, status: int, text: str) -> InvalidInputError | EngineError:
    """What a server says of a request that it does not answer, as an error of ours."""
    detail = _detail(text)
    if limit := _CONTEXT.search(detail):
        asked = _ASKED.search(detail)
        tokens = int(asked[1] or asked[2]) if asked else 0
        return ContextLengthError(tokens, 0, int(limit[1]))
    if status == 404 and "model" in detail and "exist" in detail:  # else it is the path that is not there
        return InvalidInputError(f"{where} has another model: {detail} Pass one that it serves as model=.")
    if status in (401, 403):
        return ServerError(where, status, f"{detail}. Pass the key that the server expects: api_key=")
    return ServerError(where, status, detail)


def _detail(text: str) -> str:
    """The message of an error: OpenAI's shape, vLLM's older one, FastAPI's, or the text as it is."""
    try:
        said = json.loads(text)
    except ValueError:
        return text[:500]
    inner = said.get("error", said) if isinstance(said, dict) else said
    if isinstance(inner, dict):
        inner = inner.get("message") or inner.get("detail") or inner
    return str(inner)


def _shut(response: httpx.Response) -> None:
    """Wake the thread that reads this response: closing a socket would not."""
    stream = response.extensions.get("network_stream")
    connected = stream.get_extra_info("socket") if stream is not None else None
    if connected is not None:
        with suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)
