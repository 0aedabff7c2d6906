"""One OpenAI-compatible server: requests with retries and typed errors, and constraints in its words."""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel

from kvcag.engines.constrain import Choices, Grammar, JsonSchema, Regex, ServerConstraint, close_objects, lark_literal
from kvcag.errors import (
    ConstraintError,
    ContextLengthError,
    EngineError,
    InvalidInputError,
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


def _refusal(url: str, status: int, text: str) -> InvalidInputError | EngineError:
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


# --- constraints -----------------------------------------------------------------------------------------------

ConstraintSupport: TypeAlias = Literal["lark", "structured_outputs", "response_format", "none"]
"""What a server can enforce: any grammar; JSON schemas, regular expressions and choices; JSON schemas; nothing."""

_GUIDANCE = "%llguidance {}\n"
"""Only llguidance accepts this first line. vLLM's other backends accept some Lark too and enforce less of it; vLLM
uses llguidance if its first choice refuses a grammar."""

_REGEX_SPECIAL = re.compile(r"\\.|/|\n", re.DOTALL)


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
        except (EngineError, InvalidInputError, ValueError):  # refused, or a free answer that is not JSON
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
    lark, fields = _in_the_servers_words(constraint)
    if thinking:
        raise ConstraintError(
            "the answer begins within a thinking block, and a server would apply the constraint to the thinking. "
            "Switch thinking off, for example with template_variables={'enable_thinking': False}."
        )
    if support == "lark":
        return ServerConstraint({"structured_outputs": {"grammar": _GUIDANCE + lark}})
    if support == "structured_outputs" and fields:
        return ServerConstraint({"structured_outputs": fields})
    if support == "response_format" and "json" in fields:
        schema = {"name": "answer", "schema": fields["json"]}
        return ServerConstraint({"response_format": {"type": "json_schema", "json_schema": schema}})
    raise ConstraintError(
        f"the server cannot enforce a constraint of this kind ({next(iter(fields), 'grammar')}); it supports: "
        f"{support}. vLLM enforces every kind if the backend in --structured-outputs-config is auto or guidance."
    )


def _in_the_servers_words(constraint: Any) -> tuple[str, dict[str, Any]]:
    """The constraint in llguidance's Lark, and as vLLM's `structured_outputs` without Lark; empty if it has no such."""
    if isinstance(constraint, type) and issubclass(constraint, BaseModel):
        constraint = JsonSchema(constraint.model_json_schema(), closed=True)
    elif isinstance(constraint, Mapping):
        constraint = JsonSchema(constraint)
    if isinstance(constraint, Grammar):
        return constraint.lark, {}
    if isinstance(constraint, Regex):
        escaped = {"/": "\\/", "\n": "\\n"}  # both would end a Lark regex
        pattern = _REGEX_SPECIAL.sub(lambda found: escaped.get(found[0], found[0]), constraint.pattern)
        return f"start: /{pattern}/", {"regex": constraint.pattern}
    if isinstance(constraint, Choices):
        if not constraint.options or not all(isinstance(option, str) and option for option in constraint.options):
            raise ConstraintError(f"choices must be one or more non-empty strings, not {constraint.options!r}")
        options = list(dict.fromkeys(constraint.options))
        return "start: " + " | ".join(map(lark_literal, options)), {"choice": options}
    if isinstance(constraint, JsonSchema):
        schema = dict(close_objects(constraint.schema) if constraint.closed else constraint.schema)
        spaced = {**schema, "x-guidance": {"whitespace_flexible": constraint.whitespace}}
        try:
            return f"start: %json {json.dumps(spaced, ensure_ascii=False, allow_nan=False)}", {"json": schema}
        except (TypeError, ValueError) as malformed:
            raise ConstraintError(f"the schema is not JSON: {malformed}") from malformed
    raise ConstraintError(
        "a constraint must be a pydantic model class, a JSON schema, Regex(…), Choices([…]) or Grammar(…), "
        f"not {constraint!r:.80}"
    )
