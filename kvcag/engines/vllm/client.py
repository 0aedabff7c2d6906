"""One OpenAI-compatible server: requests with retries and typed errors, preloaded contexts, constraints."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel

from kvcag.concurrency import CANCELLATION, Cancellation, cancellation
from kvcag.engines.constrain import Choices, Grammar, JsonSchema, Regex, ServerConstraint, close_objects, to_lark
from kvcag.errors import (
    ConstraintError,
    ContextLengthError,
    EngineError,
    InvalidInputError,
    KVCAGError,
    MissingExtraError,
    PromptError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
    WarnOnce,
)

try:
    import httpx
except ModuleNotFoundError:
    raise MissingExtraError("VLLMEngine", "vllm") from None

T = TypeVar("T")

_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_OVERLOADED = {429, 502, 503, 504}
_ABSENT = {404, 405, 501}
_LONGEST_PAUSE, _METRICS_TIMEOUT = 20.0, 5.0  # seconds
_CONTEXT_LENGTH = re.compile(r"maximum context length is (\d+)")
_PROMPT_LENGTH = re.compile(r"contains (?:at least )?(\d+) input tokens|requested (\d+) tokens")
_START_TIME = re.compile(r"^process_start_time_seconds (\S+)$", re.MULTILINE)


class HTTPClient:
    """Requests to one server. Safe to use from several threads. `VLLMEngine` describes the arguments.

    Attributes:
        root: `base_url` without `/v1`.
        interruptions: how often the server could not be reached or dropped a connection.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        timeout: float,
        connect_timeout: float,
        max_retries: int,
        retry_wait: float,
        client: httpx.Client | None,
    ) -> None:
        self.root = base_url.rstrip("/").removesuffix("/v1")
        if not self.root.startswith(("http://", "https://")):
            raise InvalidInputError(f"base_url {base_url!r} is not a URL. Pass a URL such as http://127.0.0.1:8000/v1.")
        self.interruptions = 0
        self._max_retries, self._retry_wait = max_retries, retry_wait
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
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

    def json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a POST request, or a GET request without a body, and return the JSON of the answer.

        Returns:
            The JSON, or None if the server does not have this path.

        Raises:
            ServerUnavailableError: the server cannot be reached or is overloaded.
            ServerTimeoutError: the server sent nothing for `timeout` seconds.
            ContextLengthError, InvalidInputError, ServerError: the server refused the request.
        """

        def attempt() -> Any:
            with self._open(path, body) as response:
                response.read()
                return response.json()

        try:
            return self._retry(attempt)
        except ServerError as refused:
            if refused.status in _ABSENT:
                return None
            raise

    def events(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Send a POST request and yield the server-sent events of the answer. Closing the generator ends the request.

        A request that failed after its first event is not repeated. Raises the same errors as `json`.
        """

        def attempt() -> tuple[list[dict[str, Any]], Generator[dict[str, Any], None, None]]:
            events = self._events(path, body)
            return [event for event in [next(events, None)] if event is not None], events

        first, rest = self._retry(attempt)
        with closing(rest):
            yield from first
            yield from rest

    def start_time(self) -> float | None:
        """When the server process started, in seconds since 1970. None if the server does not publish it."""
        try:
            response = self._client.get(f"{self.root}/metrics", headers=self._headers, timeout=_METRICS_TIMEOUT)
        except httpx.HTTPError:
            return None
        found = _START_TIME.search(response.text) if response.is_success else None
        return float(found[1]) if found else None

    def _retry(self, attempt: Callable[[], T]) -> T:
        """Repeat what fails because the server is down, starting or overloaded; a cancelled reader ends the pauses.

        `httpx.HTTPTransport(retries=…)` repeats only connections, and its pauses cannot be cancelled.
        """
        left, wait = self._max_retries, self._retry_wait
        while True:
            try:
                return attempt()
            except (ServerUnavailableError, ServerError) as failure:
                if isinstance(failure, ServerError) and failure.status not in _RETRIED:
                    raise
                pause = _requested_pause(failure) or wait * random.uniform(0.8, 1.2)
                if not left or cancellation().sleep(min(pause, _LONGEST_PAUSE)):
                    raise
            left, wait = left - 1, wait * 2

    def _events(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        finished = False
        with self._open(path, body) as response, cancellation().waking(lambda: _shut_down(response)):
            for line in _lines(response):
                field, _, data = line.partition(":")
                if field != "data":  # comments keep a connection alive, blank lines end an event
                    continue
                if data.strip() == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    code = event["error"].get("code") if isinstance(event["error"], dict) else None
                    raise _refusal(self.root + path, code if isinstance(code, int) else 500, data)
                finished = finished or any(choice.get("finish_reason") for choice in event.get("choices", ()))
                yield event
            if not finished:
                raise httpx.RemoteProtocolError("the answer ended without a finish reason")

    @contextmanager
    def _open(self, path: str, body: Mapping[str, Any] | None) -> Iterator[httpx.Response]:
        """A successful response. Within the block, every error of httpx becomes an error of kvcag."""
        if self._closed:
            raise EngineError(f"the engine of {self.root} was closed. Make a new one.")
        method, url = "GET" if body is None else "POST", self.root + path
        try:
            with self._client.stream(method, url, json=body, headers=self._headers) as response:
                if not response.is_success:
                    response.read()
                    response.raise_for_status()
                yield response
        except httpx.HTTPStatusError as refused:
            raise _refusal(url, refused.response.status_code, refused.response.text) from refused
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
        except httpx.TransportError as broken:
            self._count_interruption()
            raise ServerUnavailableError(
                f"the connection to {self.root} broke: {broken}. The server stopped while it answered. Ask again when "
                "it is back."
            ) from broken
        except json.JSONDecodeError as malformed:
            raise ServerError(url, 200, f"something that is not JSON: {malformed}") from malformed

    def _count_interruption(self) -> None:
        if not cancellation().cancelled:  # a cancelled request was broken off by this side
            self.interruptions += 1


def _lines(response: httpx.Response) -> Iterator[str]:
    """The lines of an event stream. `iter_lines` would also break lines at U+2028 and U+0085 within JSON strings."""
    rest = ""
    for text in response.iter_text():
        *lines, rest = (rest + text).split("\n")
        yield from lines
    yield rest


def _shut_down(response: httpx.Response) -> None:
    """Wake the thread that reads this response. Closing the socket would not wake it."""
    stream = response.extensions.get("network_stream")
    connection = stream.get_extra_info("socket") if stream is not None else None
    if connection is not None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def _requested_pause(failure: EngineError) -> float:
    """The seconds of a `Retry-After` header; 0 without one."""
    refused = failure.__cause__
    asked = refused.response.headers.get("retry-after", "") if isinstance(refused, httpx.HTTPStatusError) else ""
    return float(asked) if asked.isdigit() else 0.0


def _refusal(url: str, status: int, text: str) -> InvalidInputError | PromptError | EngineError:
    """The error for an answer that is not a success."""
    detail = text[:500]
    with suppress(ValueError):  # OpenAI's shape, an older one of vLLM, FastAPI's, or plain text
        answer = json.loads(text)
        inner = answer.get("error", answer) if isinstance(answer, dict) else answer
        detail = str((inner.get("message") or inner.get("detail") or inner) if isinstance(inner, dict) else inner)
    if limit := _CONTEXT_LENGTH.search(detail):
        length = _PROMPT_LENGTH.search(detail)
        return ContextLengthError(int(length[1] or length[2]) if length else 0, 0, int(limit[1]))
    if status == 404 and "model" in detail and "exist" in detail:  # other 404s: the path does not exist
        return InvalidInputError(f"{url} serves another model: {detail} Pass one that it serves as model=.")
    if status in (401, 403):
        return ServerError(url, status, f"{detail}. Pass the server's key: api_key=")
    if status in _OVERLOADED:
        return ServerUnavailableError(f"{url} answered {status}: {detail}. It is starting, stopping or overloaded.")
    return ServerError(url, status, detail)


# --- preloaded contexts ----------------------------------------------------------------------------------------


class Preloads:
    """Remembers preloaded contexts, and sends them again after the server restarted.

    The server's start time shows a restart. It is read when the server was out of reach, or when it has fewer cached
    tokens of a context than expected. A thread that lives only that long sends the contexts one by one.

    Args:
        http: the server.
        send: sends a context of a namespace.
        restarted: called when the server was restarted.
        warnings: used if a context cannot be sent again.
    """

    MOST = 1024
    """Contexts that are remembered; the least recently used are dropped first."""
    SHORTFALL = 512
    """Tokens of a context that may be missing without a sign of a restart: a server caches whole blocks."""
    CLOSING_SECONDS = 5.0
    """How long `close` waits for the thread. Connecting, and waiting for response headers, cannot be interrupted."""

    def __init__(
        self,
        http: HTTPClient,
        send: Callable[[Sequence[int], str], object],
        restarted: Callable[[], None],
        warnings: WarnOnce,
    ) -> None:
        self._http, self._send, self._restarted, self._warnings = http, send, restarted, warnings
        self._sent: OrderedDict[tuple[str, bytes], None] = OrderedDict()  # the least recently used first
        self._start_times: set[float] = set()  # of every process seen: there may be several behind one address
        self._interruptions = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = Cancellation()

    def add(self, token_ids: Sequence[int], namespace: str) -> None:
        """Remember a context that was sent."""
        if not self._start_times and (started := self._http.start_time()):
            self._start_times.add(started)
        with self._lock:
            key = (namespace, _packed(token_ids))
            self._sent[key] = None
            self._sent.move_to_end(key)
            if len(self._sent) > self.MOST:
                self._sent.popitem(last=False)

    def forget(self, namespace: str) -> None:
        """Send no context of a namespace again."""
        with self._lock:
            for key in [key for key in self._sent if key[0] == namespace]:
                del self._sent[key]

    def longest(self, token_ids: Sequence[int], namespace: str) -> int:
        """The tokens of the longest context that a prompt begins with."""
        packed = _packed(token_ids)
        with self._lock:
            found = [key for key in self._sent if key[0] == namespace and packed.startswith(key[1])]
            for key in found:
                self._sent.move_to_end(key)
        return max((len(context) for _, context in found), default=0) // array("I").itemsize

    def check(self, token_ids: Sequence[int], namespace: str, cached: int | None) -> None:
        """After an answer, look for signs of a restart; send all contexts again if there was one.

        Args:
            token_ids: the prompt.
            namespace: of the prompt.
            cached: how many of its tokens the server had cached; None if the server does not say.
        """
        interrupted = self._http.interruptions != self._interruptions
        self._interruptions = self._http.interruptions
        short = cached is not None and self.longest(token_ids, namespace) - cached > self.SHORTFALL
        with self._lock:
            if not (interrupted or short) or self._closing.cancelled or not self._sent or self._thread is not None:
                return
            thread = threading.Thread(target=self._resend, args=(interrupted,), name="kvcag-preloads", daemon=True)
            thread.start()  # if it cannot start, the next answer tries again
            self._thread = thread

    def close(self) -> None:
        """Stop sending, and wait a few seconds for the thread."""
        self._closing.cancel()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(self.CLOSING_SECONDS)

    def _resend(self, interrupted: bool) -> None:
        CANCELLATION.set(self._closing)  # of this thread alone
        try:
            if not self._was_restarted(interrupted):
                return
            self._restarted()
            with self._lock:
                contexts = list(reversed(self._sent))
            for namespace, packed in contexts:
                if self._closing.cancelled:
                    return
                self._send(array("I", packed).tolist(), namespace)
        except KVCAGError as failed:
            if not self._closing.cancelled:
                with suppress(Warning):  # where warnings are errors, this thread has no caller to catch one
                    self._warnings.once(f"a context could not be sent again after a restart: {failed}")
        finally:
            with self._lock:
                self._thread = None

    def _was_restarted(self, interrupted: bool) -> bool:
        """Without a start time, every interruption counts as a restart."""
        started = self._http.start_time()
        if started is None:
            return interrupted
        known = started in self._start_times
        self._start_times.add(started)
        return not known


def _packed(token_ids: Sequence[int]) -> bytes:
    return array("I", token_ids).tobytes()


# --- constraints -----------------------------------------------------------------------------------------------

ConstraintSupport: TypeAlias = Literal["lark", "structured_outputs", "response_format", "none"]
"""What a server can enforce: any grammar; JSON schemas, regular expressions and choices; JSON schemas; nothing."""

_GUIDANCE = "%llguidance {}\n"
"""Only llguidance accepts this first line. vLLM's other backends accept some Lark too and enforce less of it; vLLM
uses llguidance if its first choice refuses a grammar."""


def constraint_support(complete: Callable[[Mapping[str, Any]], str]) -> ConstraintSupport:
    """Find out what a server enforces, by asking for answers that a model gives only if it is forced to.

    A server ignores fields that it does not know: a constraint that it does not enforce would go unnoticed.

    Args:
        complete: returns a short greedy answer to a request with the given fields.
    """
    probe = JsonSchema(
        {"type": "object", "properties": {"word": {"enum": ["kvcag"]}}, "required": ["word"]}, closed=True
    )
    supports: tuple[ConstraintSupport, ...] = ("lark", "structured_outputs", "response_format")
    for support in supports:
        try:
            if json.loads(complete(server_constraint(probe, support, False).fields)) == {"word": "kvcag"}:
                return support
        except (ServerUnavailableError, ServerTimeoutError):
            raise
        except (EngineError, PromptError, ValueError):  # refused, or a free answer that is not JSON
            continue
    return "none"


def server_constraint(constraint: Any, support: ConstraintSupport, thinking: bool) -> ServerConstraint:
    """A constraint as fields of a request. vLLM compiles the same llguidance grammar as `HFEngine`.

    Args:
        constraint: as `Engine.stream` takes it.
        support: what the server enforces.
        thinking: the answer begins within a thinking block.

    Raises:
        ConstraintError: it is not a constraint, is malformed, or the server cannot enforce it.
    """
    if isinstance(constraint, ServerConstraint):
        return constraint
    if isinstance(constraint, type) and issubclass(constraint, BaseModel):
        constraint = JsonSchema(constraint.model_json_schema(), closed=True)
    elif isinstance(constraint, Mapping):
        constraint = JsonSchema(constraint)
    lark = to_lark(constraint)
    if thinking:
        raise ConstraintError(
            "the answer begins within a thinking block, and a server would apply the constraint to the thinking. "
            "Switch thinking off, for example with template_variables={'enable_thinking': False}."
        )
    if support == "lark":
        return ServerConstraint({"structured_outputs": {"grammar": _GUIDANCE + lark}})
    fields = _without_lark(constraint)
    if support == "structured_outputs" and fields:
        return ServerConstraint({"structured_outputs": fields})
    if support == "response_format" and "json" in fields:
        schema = {"name": "answer", "schema": fields["json"]}
        return ServerConstraint({"response_format": {"type": "json_schema", "json_schema": schema}})
    raise ConstraintError(
        f"the server cannot enforce a constraint of this kind ({next(iter(fields), 'grammar')}); it supports: "
        f"{support}. vLLM enforces every kind if the backend in --structured-outputs-config is auto or guidance."
    )


def _without_lark(constraint: JsonSchema | Regex | Choices | Grammar) -> dict[str, Any]:
    """A constraint as vLLM's `structured_outputs` without Lark; empty for a grammar."""
    if isinstance(constraint, Grammar):
        return {}
    if isinstance(constraint, Regex):
        return {"regex": constraint.pattern}
    if isinstance(constraint, Choices):
        return {"choice": list(dict.fromkeys(constraint.options))}
    return {"json": dict(close_objects(constraint.schema) if constraint.closed else constraint.schema)}
