"""Conversion between LlamaIndex's messages, tools and answers, and kvcag's."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict
from typing import Any, TypeAlias, TypeVar

from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    ChatMessage,
    ChatResponse,
    CitableBlock,
    CitationBlock,
    CompletionResponse,
    ContentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool
from pydantic_core import from_json

from kvcag.chat_template import Document, Message, segment
from kvcag.concurrency import iterate
from kvcag.core import Chunk
from kvcag.tools import CallParser, Parsed, ToolCall

R = TypeVar("R", ChatResponse, CompletionResponse)
Chunks: TypeAlias = Generator[Chunk, None, None]
Opener: TypeAlias = Callable[[], Chunks]
"""A function that prepares the context, which can take seconds, and returns the answer's chunks."""

DOCUMENT_END = CachePoint(cache_control=CacheControl(type="document"))
"""A content block that marks the text block just before it as a document."""

JOINED = CachePoint(cache_control=CacheControl(type="joined"))
"""A content block that joins the blocks before and after it without a line break."""

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}


def document_blocks(texts: str | Iterable[str], *, exact: bool = False) -> list[ContentBlock]:
    """Content blocks in which each text is a document, followed by a blank line.

    Args:
        texts: the documents. A str is one document.
        exact: join the texts into one document, in this order, so that it is reused exactly.
    """
    documents = [segment(text) for text in ([texts] if isinstance(texts, str) else texts)]
    if exact and documents:
        documents = ["".join(documents)]
    # to_messages adds the second line break when it joins the blocks
    return [block for text in documents for block in (TextBlock(text=text.removesuffix("\n")), DOCUMENT_END)]


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Convert LlamaIndex messages to the messages that `KVCacheMemory.stream` takes."""
    return [{**_frame(message), "content": _content(message)} for message in messages]


def _frame(message: ChatMessage) -> dict[str, Any]:
    """The role, tool calls and names of a message: everything except its content."""
    frame: dict[str, Any] = {"role": _ROLES.get(message.role, message.role.value)}
    calls = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    if calls:
        frame["tool_calls"] = [
            {
                "type": "function",
                "id": call.tool_call_id or "",
                "function": {"name": call.tool_name, "arguments": call.tool_kwargs},
            }
            for call in calls
        ]
    return {**frame, **{name: message.additional_kwargs[name] for name in _CARRIED & message.additional_kwargs.keys()}}


_CARRIED = {"tool_call_id", "name"}
"""The further fields of a message that chat templates read, in addition to role, content and tool calls."""


def _content(message: ChatMessage) -> Any:
    """The text, or a list of texts and documents. `kvcag.chat_template` refuses parts that are not text."""
    parts: list[Any] = []
    documents: list[int] = []
    joined: set[int] = set()
    keep = 0
    for block in message.blocks:
        if not isinstance(block, CachePoint):
            parts += _read(block)
        elif block.cache_control.type == JOINED.cache_control.type:
            joined.add(len(parts) - 1)
        else:
            keep = len(parts)
            if block.cache_control.type == DOCUMENT_END.cache_control.type and parts:
                documents.append(len(parts) - 1)
    if not all(isinstance(part, str) for part in parts):
        return parts
    ends = range(len(parts) - 1)
    if documents:
        last = documents[-1]
        lines = [part + "\n" * ((at in ends or at in documents) and at not in joined) for at, part in enumerate(parts)]
        shown = [Document(line) if at in documents else line for at, line in enumerate(lines)]
        if last in joined or not parts[last].endswith("\n"):  # the line break after the document is not part of it
            shown[last] = Document(parts[last], segment(parts[last])[len(parts[last]) :])
            shown[last + 1 :] = [lines[last][len(parts[last]) :] * (last in ends), *shown[last + 1 :]]
        return shown
    lines = [part + "\n" * (at in ends) for at, part in enumerate(parts)]
    if any(lines[:keep]):
        return [Document("".join(lines[:keep])), *lines[keep:]]
    return "".join(lines)


def _read(block: ContentBlock) -> list[Any]:
    """A block's texts; for a block that is not text, a part that `kvcag.chat_template` refuses."""
    if isinstance(block, TextBlock):
        return [block.text]
    if isinstance(block, CitableBlock):
        return [part for inner in block.content for part in _read(inner)]
    if isinstance(block, CitationBlock):
        return _read(block.cited_content)
    if isinstance(block, ThinkingBlock | ToolCallBlock):  # not text; `_frame` reads the calls
        return []
    return [{"type": block.block_type}]


# --- answers for LlamaIndex ---------------------------------------------------------------------------------------


class Answer:
    """Builds LlamaIndex responses from an answer's chunks. Each response has the answer so far.

    Args:
        model: the model's name, for `raw["model"]`.
        parser: separates tool calls from text. None: the answer cannot call tools.
        thinks: put the model's thinking into the responses.
    """

    def __init__(self, model: str, parser: CallParser | None = None, *, thinks: bool = True) -> None:
        self._model = model
        self._parser = parser
        self._thinks = thinks
        self._text = ""
        self._thinking = ""
        self._calls: list[ToolCallBlock] = []
        self._before: ChatResponse | CompletionResponse | None = None

    def chat(self, chunk: Chunk) -> ChatResponse | None:
        """The answer up to this chunk, including tool calls that are still being written; None if nothing is new.

        The `raw` of the last response has the usage. It is set when the answer ends, which may be after that response
        was sent.
        """
        delta, parsed = self._read(chunk)
        self._text += delta
        thought, calls, raw = self._thought(chunk), self._calls_so_far(parsed), self._raw(chunk, parsed)
        if not (delta or thought or calls != self._calls or self._is_first(raw)):
            return None
        self._calls = calls
        blocks: list[ContentBlock] = [ThinkingBlock(content=self._thinking)] if self._thinking else []
        blocks += [TextBlock(text=self._text)] if self._text or not calls else []
        blocks += calls
        # LlamaIndex's streamed structured prediction looks for calls here, and not in the blocks
        known = {"tool_calls": [{"id": call.tool_call_id, "name": call.tool_name} for call in calls]} if calls else {}
        response = ChatResponse(
            message=ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=known),
            delta=delta,
            raw=raw,
            additional_kwargs=thought,
        )
        self._before = response
        return response

    def completion(self, chunk: Chunk) -> CompletionResponse | None:
        """As `chat`, but returns a completion."""
        self._text += chunk.text
        thought, raw = self._thought(chunk), self._raw(chunk)
        if not (chunk.text or thought or self._is_first(raw)):
            return None
        response = CompletionResponse(text=self._text, delta=chunk.text, raw=raw, additional_kwargs=thought)
        self._before = response
        return response

    def _is_first(self, raw: dict[str, Any] | None) -> bool:
        """Whether the answer ends without any earlier response. If there was one, it is the last: set its `raw`."""
        if raw is not None and self._before is not None:
            self._before.raw = raw
        return raw is not None and self._before is None

    def _thought(self, chunk: Chunk) -> dict[str, Any]:
        if not (chunk.thinking and self._thinks):
            return {}
        self._thinking += chunk.thinking
        return {"thinking_delta": chunk.thinking}

    def _calls_so_far(self, parsed: Parsed | None) -> list[ToolCallBlock]:
        if parsed is not None:
            calls = list(parsed.calls)
        else:
            calls = [ToolCall(name, _so_far(text)) for name, text in self._parser.written()] if self._parser else []
        known = [call.tool_call_id for call in self._calls]  # a call keeps its id while it is written
        known += [call.id for call in calls[len(known) :]]
        return [
            ToolCallBlock(tool_call_id=id, tool_name=call.name, tool_kwargs=call.arguments)
            for call, id in zip(calls, known, strict=False)
        ]

    def _read(self, chunk: Chunk) -> tuple[str, Parsed | None]:
        """The text that this chunk adds; with the last chunk, also the calls. An invalid call stays text."""
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
        usage = {**chunk.usage.as_dict(), "prompt_tokens_details": {"cached_tokens": chunk.usage.cached_tokens}}
        raw: dict[str, Any] = {"model": self._model, "finish_reason": finish, "usage": usage}
        if parsed and parsed.invalid_calls:
            raw["invalid_tool_calls"] = [asdict(call) for call in parsed.invalid_calls]
        return raw


def _so_far(arguments: str) -> dict[str, Any]:
    """Parse a call's arguments, whose JSON may be cut off anywhere."""
    try:
        found = from_json(arguments, allow_partial="trailing-strings")
    except ValueError:  # within a word such as `true`
        return {}
    return found if isinstance(found, dict) else {}


def each(chunks: Chunks, respond: Callable[[Chunk], R | None]) -> Generator[R, None, None]:
    """Yield a response for each chunk that adds something to the answer."""
    with closing(chunks):
        for chunk in chunks:
            response = respond(chunk)
            if response is not None:
                yield response


async def aeach(opener: Opener, respond: Callable[[Chunk], R | None]) -> AsyncGenerator[R, None]:
    """Asynchronous `each`. The model runs in worker threads."""
    async with aclosing(iterate(opener)) as chunks:
        async for chunk in chunks:
            response = respond(chunk)
            if response is not None:
                yield response


def last(responses: Generator[R, None, None]) -> R:
    """Read all responses, and return the last one, which has the whole answer."""
    *_, whole = responses
    return whole


async def alast(responses: AsyncGenerator[R, None]) -> R:
    """Asynchronous `last`."""
    return [response async for response in responses][-1]


def tool_specs(tools: Sequence[BaseTool]) -> list[dict[str, Any]]:
    """The tools in OpenAI's form. They are JSON, so that LlamaIndex's events with these tools can be serialised."""
    return [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools]


def selections(response: ChatResponse) -> list[ToolSelection]:
    """The tool calls in a response."""
    return [
        ToolSelection(tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=_arguments(block))
        for block in response.message.blocks
        if isinstance(block, ToolCallBlock)
    ]


def _arguments(call: ToolCallBlock) -> dict[str, Any]:
    return call.tool_kwargs if isinstance(call.tool_kwargs, dict) else dict(json.loads(call.tool_kwargs))
