"""One answer of a server: the request, and its events as chunks."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from kvcag.chat_template import Prompt
from kvcag.core import Chunk, FinishReason, Usage
from kvcag.engines.decode import Account, FoundPrefix, StopStrings, ThinkingFilter
from kvcag.engines.sampling import Sampling
from kvcag.errors import EngineError

_STOPS_OF_OPENAI = 4


@dataclass(frozen=True, slots=True)
class Asked:
    """An answer that was asked for.

    Attributes:
        prompt: the whole prompt.
        sampling: its settings.
        max_new_tokens: the budget.
        started: `time.perf_counter()` of the call.
    """

    prompt: Prompt
    sampling: Sampling
    max_new_tokens: int
    started: float

    @property
    def stops_here(self) -> bool:
        """Whether stop strings are looked for on this side alone: a server would find them in the thinking, too."""
        return self.sampling.strip_thinking

    def request(self, model: str, *, is_vllm: bool, salt: str | None, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a `/v1/completions` request.

        Every setting is sent to a vLLM server, as it would else take the model's own defaults, which an `HFEngine`
        does not; to others only those that were given, since some refuse what they do not know.

        Args:
            model: the model's name on the server.
            is_vllm: whether the server knows vLLM's own fields.
            salt: the namespace's; its hits are shared with nobody who has another.
            fields: of a constraint.
        """
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(self.prompt.token_ids),
            "max_tokens": self.max_new_tokens,
            "temperature": sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }
        given = {
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed,
        }
        neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0} if is_vllm else {}
        body |= neutral | {name: value for name, value in given.items() if value is not None}
        if sampling.stop and not self.stops_here:
            body["stop"] = list(sampling.stop if is_vllm else sampling.stop[:_STOPS_OF_OPENAI])
        if salt is not None and is_vllm:
            body["cache_salt"] = salt
        return body

    def chunks(
        self,
        events: Generator[dict[str, Any], None, None],
        told: Callable[[int | None], None],
    ) -> Generator[Chunk, None, None]:
        """The answer as text, a chunk an event; the last chunk says why it ended and what it took.

        Args:
            events: the server's; closed with this generator.
            told: called at the end with the cached tokens that the server reports; None if it does not.
        """
        thinking = ThinkingFilter(self.prompt.thinking) if self.sampling.strip_thinking else None
        stop = StopStrings(self.sampling.stop)
        finish: FinishReason | None = None
        usage: Mapping[str, Any] = {}
        first_at, said = 0.0, 0
        with closing(events):
            for event in events:
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    first_at, said = first_at or time.perf_counter(), said + 1
                    piece = choice.get("text") or ""
                    text = stop.push(thinking.push(piece) if thinking else piece)
                    if stop.found:
                        yield Chunk(text, (), "stop", self._usage(usage, said, first_at))
                        return
                    yield Chunk(text)
                    finish = _finish(choice) or finish
        told(_cached(usage))
        text = stop.push(thinking.flush() if thinking else "")
        text += "" if stop.found else stop.flush()
        yield Chunk(text, (), "stop" if stop.found else finish, self._usage(usage, said, first_at))

    def _usage(self, usage: Mapping[str, Any], said: int, first_at: float) -> Usage:
        """What the server counted; where it did not, what was seen of it."""
        size = len(self.prompt.token_ids)
        reported = _cached(usage)
        cached = min(reported or 0, size - 1)
        created = 0 if reported is None else size - cached
        account = Account.of(self.prompt, None, FoundPrefix(cached, [], is_merged=False), created, self.started)
        now = time.perf_counter()
        return Usage(
            prompt_tokens=size,
            cached_tokens=account.cached_tokens,
            created_tokens=account.created_tokens,
            completion_tokens=int(usage.get("completion_tokens") or said),
            ttft_s=(first_at or now) - self.started,
            total_s=now - self.started,
            context=account.context,
        )


def salt_of(secret: str, namespace: str) -> str | None:
    """A namespace's salt: 256 bits that nobody can tell without the secret. None where there is neither.

    It goes into the hash of every block (vLLM's `cache_salt`), so namespaces share none and timing tells nothing
    of each other.
    """
    if not secret and not namespace:
        return None
    made = hmac.new(secret.encode(), namespace.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(made).decode().rstrip("=")


def _cached(usage: Mapping[str, Any]) -> int | None:
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens")
    return None if cached is None else int(cached)


def _finish(choice: Mapping[str, Any]) -> FinishReason | None:
    reason = choice.get("finish_reason")
    if reason in ("abort", "error"):
        raise EngineError(f"the server gave the answer up ({reason}): it may be stopping, or out of memory. Ask again.")
    return None if reason is None else "length" if reason == "length" else "stop"
