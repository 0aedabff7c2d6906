"""An engine's chunks as LlamaIndex's responses."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from dataclasses import asdict
from typing import Any, TypeAlias, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)

from kvcag.core import Chunk, Usage
from kvcag.streams import iterate
from kvcag.tools import CallParser, Parsed

R = TypeVar("R", ChatResponse, CompletionResponse)
Chunks: TypeAlias = Generator[Chunk, None, None]
Opener: TypeAlias = Callable[[], Chunks]
"""Prepares the context, which may take a while, and returns the answer's chunks."""


def usage_of(usage: Usage) -> dict[str, Any]:
    """Usage as `raw["usage"]` has it. `cached_tokens` and `created_tokens` are parts of `prompt_tokens`.

    `context` says how the documents were put together: `exact` or `merged`, and what was reused and recomputed.
    """
    return {**asdict(usage), "total_tokens": usage.prompt_tokens + usage.completion_tokens}


class Answer:
    """An answer as it grows.

    Args:
        model: what `raw["model"]` says.
        parser: tells tool calls from text, where tools may be called.
    """

    def __init__(self, model: str, parser: CallParser | None = None) -> None:
        self._model = model
        self._parser = parser
        self._text = ""

    def chat(self, chunk: Chunk) -> ChatResponse:
        """The answer up to and with this chunk. The last one has the tool calls, and the usage in `raw`."""
        delta, parsed = self._read(chunk)
        self._text += delta
        calls = parsed.calls if parsed else ()
        blocks: list[ContentBlock] = [TextBlock(text=self._text)] if self._text or not calls else []
        blocks += [
            ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=call.arguments) for call in calls
        ]
        # the blocks say it; core's streamed structured prediction looks for calls here alone
        known = {"tool_calls": [{"id": call.id, "name": call.name} for call in calls]} if calls else {}
        message = ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=known)
        return ChatResponse(message=message, delta=delta, raw=self._raw(chunk, parsed))

    def completion(self, chunk: Chunk) -> CompletionResponse:
        """As `chat`."""
        self._text += chunk.text
        return CompletionResponse(text=self._text, delta=chunk.text, raw=self._raw(chunk))

    def _read(self, chunk: Chunk) -> tuple[str, Parsed | None]:
        """What this chunk adds to the text, and with the last chunk the calls. A call that is none stays text."""
        if self._parser is None:
            return chunk.text, None
        delta = self._parser.push(chunk.text)
        if chunk.usage is None:
            return delta, None
        parsed = self._parser.close()
        return delta + self._parser.rest + "".join(call.text for call in parsed.invalid_calls), parsed

    def _raw(self, chunk: Chunk, parsed: Parsed | None = None) -> dict[str, Any] | None:
        if chunk.usage is None:
            return None
        finish = "tool_calls" if parsed and parsed.calls else chunk.finish_reason
        raw: dict[str, Any] = {"model": self._model, "finish_reason": finish, "usage": usage_of(chunk.usage)}
        if parsed and parsed.invalid_calls:
            raw["invalid_tool_calls"] = [asdict(call) for call in parsed.invalid_calls]
        return raw


def each(chunks: Chunks, respond: Callable[[Chunk], R]) -> Generator[R, None, None]:
    """The responses, one for each chunk that says something."""
    with closing(chunks):
        for chunk in chunks:
            response = respond(chunk)
            if response.delta or response.raw:
                yield response


async def aeach(opener: Opener, respond: Callable[[Chunk], R]) -> AsyncGenerator[R, None]:
    """`each`, in worker threads."""
    async with aclosing(iterate(opener)) as chunks:
        async for chunk in chunks:
            response = respond(chunk)
            if response.delta or response.raw:
                yield response


def last(responses: Generator[R, None, None]) -> R:
    """The whole answer."""
    *_, whole = responses
    return whole


async def alast(responses: AsyncGenerator[R, None]) -> R:
    """The whole answer."""
    return [response async for response in responses][-1]
