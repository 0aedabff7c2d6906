"""A small server of vLLM's wire format, over any engine: real sockets on 127.0.0.1, and a prefix cache by blocks.

Answers and error messages follow vLLM 0.32: `/v1/models`, `/v1/completions` with server-sent events, `/tokenize`,
`/detokenize` and `/metrics`. `flavour="openai"` is a server that ignores vLLM's own fields. Tests set `Faults`.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kvcag.chat_template import Prompt
from kvcag.engines.base import Engine, Sampling
from kvcag.engines.constrain import Choices, Grammar, JsonSchema, Regex
from kvcag.errors import ConstraintError
from tests.waits import joined


@dataclass
class Faults:
    """What shall go wrong. Counters count down with each fault.

    Attributes:
        status, times, retry_after: the next `times` answers have this status.
        drop_after: the connection of the next answer breaks after so many events; None never.
        reset: how many connections are cut before anything is answered.
        silence: seconds before the first token of every answer.
        pause: seconds between two tokens.
        garbage: the next answer's events are not JSON.
        error_event: sent instead of the next answer, within the stream, as vLLM does.
    """

    status: int = 503
    times: int = 0
    retry_after: str | None = None
    drop_after: int | None = None
    reset: int = 0
    silence: float = 0.0
    pause: float = 0.0
    garbage: bool = False
    error_event: dict[str, Any] | None = None


@dataclass
class WireServer:
    """The server. Use it in a `with` block; `stop` and `start` restart it on the same port, with nothing cached.

    Attributes:
        engine: answers; its tokenizer and template are the server's.
        flavour: `"vllm"` or `"openai"`.
        reports: whether usage says how many tokens were cached.
        constrains: what it enforces: `"lark"`, `"json"` (no grammars), `"response_format"`, or nothing.
        bodies: every request, as `(path, body)`.
        aborted: set when a client disconnects during its answer.
    """

    engine: Engine
    model: str = "tiny"
    flavour: str = "vllm"
    reports: bool = True
    constrains: str | None = "lark"
    api_key: str | None = None
    block_size: int = 16
    max_model_len: int = 2048
    faults: Faults = field(default_factory=Faults)
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port = 0
        self.aborted = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> WireServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start with an empty cache and a new start time."""
        self.blocks: set[bytes] = set()
        self.started_at = time.time()
        self.http = _Server(("127.0.0.1", self.port), _handler(self))
        self.port = self.http.server_address[1]
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), name="wire-server", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Close every connection, as a killed process does, and wait for the threads."""
        self.http.shutdown()
        self.http.cut()
        self.http.server_close()
        joined([self.thread, *self.http.threads])

    def prompts(self) -> list[list[int]]:
        """The prompts that were sent, in order."""
        return [body["prompt"] for path, body in self.bodies if path == "/v1/completions"]

    def cached(self, token_ids: list[int], salt: str) -> int:
        """How many tokens are cached, in whole blocks. All whole blocks are cached from now on.

        If a whole prompt is cached, its last block is computed again, since an answer needs at least one token to run.
        """
        with self.lock:
            digest, known, whole = sha256(salt.encode()), 0, True
            for start in range(0, len(token_ids) - self.block_size + 1, self.block_size):
                digest.update(repr(token_ids[start : start + self.block_size]).encode())
                whole = whole and digest.digest() in self.blocks
                known += self.block_size if whole else 0
                self.blocks.add(digest.digest())
        return known if known < len(token_ids) else known - self.block_size


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self.open: set[socket.socket] = set()
        self.threads: list[threading.Thread] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        """Like the base class, but `server_close` there waits for threads without a limit."""
        self.open.add(request)
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self.threads.append(thread)
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        for request in list(self.open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing: tests break connections on purpose."""


class _Refused(Exception):  # noqa: N818 - an answer, not a failure
    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": status}


def _handler(wire: WireServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        server_of = wire

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: WireServer
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        wire = self.server_of
        if self._faulty():
            return
        if self.path == "/v1/models":
            card: dict[str, Any] = {"id": wire.model, "object": "model", "owned_by": wire.flavour}
            if wire.flavour == "vllm":
                card |= {"root": "/models/tiny", "max_model_len": wire.max_model_len}
            self._json(200, {"object": "list", "data": [card]})
        elif self.path == "/metrics" and wire.flavour == "vllm":
            self._send(200, f"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds {wire.started_at}\n")
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        wire = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        wire.bodies.append((self.path, body))
        if self._faulty():
            return
        if wire.api_key is not None and self.headers.get("authorization") != f"Bearer {wire.api_key}":
            self._json(401, {"error": "Unauthorized"})
            return
        try:
            if self.path == "/v1/completions":
                self._complete(body)
            elif self.path in ("/tokenize", "/detokenize") and wire.flavour == "vllm":
                self._json(200, self._tokens(body))
            else:
                self._json(404, {"detail": "Not Found"})
        except _Refused as refused:
            self._json(refused.status, {"error": refused.error})

    def _faulty(self) -> bool:
        faults = self.server_of.faults
        if faults.reset:
            faults.reset -= 1
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return True
        if faults.times:
            faults.times -= 1
            retry = {"retry-after": faults.retry_after} if faults.retry_after else {}
            self._json(faults.status, {"error": {"message": "The engine is not ready", "code": faults.status}}, retry)
            return True
        return False

    # --- tokens ------------------------------------------------------------------------------------------------

    def _tokens(self, body: dict[str, Any]) -> dict[str, Any]:
        wire = self.server_of
        tokenizer = wire.engine.template.tokenizer
        self._check_model(body)
        if "tokens" in body:
            return {"prompt": tokenizer.decode(body["tokens"])}
        text = body.get("prompt")
        if text is None:
            if not tokenizer.chat_template:
                raise _Refused(400, "As of transformers v4.44, default chat template is no longer allowed")
            try:
                text = tokenizer.apply_chat_template(
                    body["messages"],
                    tools=body.get("tools"),
                    tokenize=False,
                    add_generation_prompt=body["add_generation_prompt"],
                    **body.get("chat_template_kwargs", {}),
                )
            except Exception as refused:  # whatever a template raises, as vLLM
                raise _Refused(400, str(refused)) from refused
        ids = tokenizer(text, add_special_tokens=body.get("add_special_tokens", False))["input_ids"]
        return {"count": len(ids), "max_model_len": wire.max_model_len, "tokens": ids, "token_strs": None}

    def _check_model(self, body: dict[str, Any]) -> None:
        wire = self.server_of
        if body.get("model", wire.model) != wire.model:
            message = f"The model `{body['model']}` does not exist. Valid aliases: {wire.model}."
            raise _Refused(404, message, "NotFoundError", "model")

    # --- completions -------------------------------------------------------------------------------------------

    def _complete(self, body: dict[str, Any]) -> None:
        wire = self.server_of
        self._check_model(body)
        ids = body["prompt"]
        if len(ids) >= wire.max_model_len:
            raise _Refused(
                400,
                f"This model's maximum context length is {wire.max_model_len} tokens. However, your prompt contains "
                f"{len(ids)} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
                f"length of the input prompt. (parameter=input_tokens, value={len(ids)})",
                param="input_tokens",
            )
        if body.get("cache_salt") == "":
            raise _Refused(400, "Parameter 'cache_salt' must be a non-empty string if provided.", param="cache_salt")
        salt = body.get("cache_salt", "") if wire.flavour == "vllm" else ""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        faults = wire.faults
        cut, faults.drop_after = faults.drop_after, None
        for sent, event in enumerate(self._events(body, ids, wire.cached(ids, salt))):
            if cut is not None and sent >= cut:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self._chunk(f"data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n")
        self._chunk("")

    def _events(self, body: dict[str, Any], ids: list[int], cached: int) -> Iterator[dict[str, Any] | str]:
        wire, faults = self.server_of, self.server_of.faults
        said, faults.error_event = faults.error_event, None
        if said is not None:
            yield {"error": said}
            yield "[DONE]"
            return
        if faults.garbage:
            faults.garbage = False
            yield "{not json"
            return
        self._wait(faults.silence)
        settings = {
            name: body[name]
            for name in ("temperature", "top_p", "min_p", "repetition_penalty", "seed", "stop")
            if body.get(name) is not None
        }
        if body.get("top_k", -1) > 0:
            settings["top_k"] = body["top_k"]
        sampling = Sampling.of(max_new_tokens=body["max_tokens"], **settings)
        completion = 0
        try:
            constraint = self._constraint(body)
            chunks = wire.engine.stream(Prompt((), (), tuple(ids)), sampling, constraint=constraint)
            with contextlib.closing(chunks):
                for chunk in chunks:
                    completion = chunk.usage.completion_tokens if chunk.usage else completion
                    yield self._event([{"index": 0, "text": chunk.text, "finish_reason": chunk.finish_reason}])
                    self._wait(faults.pause)
        except ConstraintError as refused:
            yield {"error": {"message": f"Grammar error: {refused}", "type": "BadRequestError", "code": 400}}
            yield "[DONE]"
            return
        details = {"prompt_tokens_details": {"cached_tokens": cached}} if wire.reports else {}
        usage = {"prompt_tokens": len(ids), "completion_tokens": completion, "total_tokens": len(ids) + completion}
        if (body.get("stream_options") or {}).get("include_usage"):
            yield self._event([], usage=usage | details)
        yield "[DONE]"

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": "cmpl-1", "object": "text_completion", "model": self.server_of.model, "choices": choices, **more}

    def _constraint(self, body: dict[str, Any]) -> Any:
        """The constraint that this server enforces. It ignores or refuses others, as such servers do."""
        constrains = self.server_of.constrains
        form = (body.get("response_format") or {}).get("json_schema")
        if constrains and form is not None:
            return JsonSchema(form["schema"], whitespace=True)
        asked = body.get("structured_outputs")
        if asked is None or constrains not in ("lark", "json"):
            return None
        if "grammar" in asked:
            if constrains == "json":
                raise ConstraintError("this backend takes no Lark")
            return Grammar(asked["grammar"])
        if "regex" in asked:
            return Regex(asked["regex"])
        return Choices(asked["choice"]) if "choice" in asked else JsonSchema(asked["json"], whitespace=True)

    # --- the socket --------------------------------------------------------------------------------------------

    def _wait(self, seconds: float) -> None:
        """Wait, unless the client disconnects."""
        until = time.monotonic() + seconds
        while seconds and time.monotonic() < until:
            readable, _, _ = select.select([self.connection], [], [], 0.01)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                self.server_of.aborted.set()
                raise BrokenPipeError

    def _chunk(self, text: str) -> None:
        data = text.encode()
        try:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        except OSError:
            self.server_of.aborted.set()
            raise

    def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(body), {"content-type": "application/json", **(headers or {})})

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
