"""LlamaIndex's messages as the neutral ones of `kvcag.chat_template`, with what their cache points mean.

A `CachePoint` says: what stands before it in this message is worth keeping. It is encoded once, as one segment, and
the answer stays that of a full prefill. `DOCUMENT_END`, a cache point of type `document`, says more: the text block
just before it is a document of its own, encoded once under its own content and found again in whatever order documents
stand.

Text blocks are joined by a line break, as `ChatMessage.content` joins them; a document always ends with one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    ContentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from kvcag.chat_template import Document, Message

DOCUMENT_END = CachePoint(cache_control=CacheControl(type="document"))
"""Ends a document: the text block just before it."""

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}


def document_blocks(texts: Iterable[str], *, exact: bool = False) -> list[ContentBlock]:
    """Content blocks in which each text is a document of its own, a blank line after each.

    Args:
        texts: the documents.
        exact: close them all by one ordinary cache point instead: one segment, in this order.
    """
    if exact:
        return [
            *(TextBlock(text=f"{text}\n") for text in texts),
            CachePoint(cache_control=CacheControl(type="ephemeral")),
        ]
    return [block for text in texts for block in (TextBlock(text=f"{text}\n"), DOCUMENT_END)]


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Messages for `KVCacheMemory.stream`."""
    return [{**_frame(message), "content": _content(message)} for message in messages]


def _frame(message: ChatMessage) -> dict[str, Any]:
    """Everything of a message but its content."""
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
"""What chat templates know of a message beyond its role and content."""


def _content(message: ChatMessage) -> Any:
    """The text, or the parts with the documents among them. What is no text is passed on, to be refused by name."""
    parts: list[Any] = []
    documents: set[int] = set()
    keep = 0
    for block in message.blocks:
        if isinstance(block, CachePoint):
            keep = len(parts)
            if block.cache_control.type == DOCUMENT_END.cache_control.type and parts:
                documents.add(len(parts) - 1)
        else:
            parts += _read(block)
    if not all(isinstance(part, str) for part in parts):
        return parts
    lines = [part + "\n" * (at < len(parts) - 1 or at in documents) for at, part in enumerate(parts)]
    if documents:
        return [Document(line) if at in documents else line for at, line in enumerate(lines)]
    if any(lines[:keep]):
        return [Document("".join(lines[:keep])), *lines[keep:]]
    return "".join(lines)


def _read(block: ContentBlock) -> list[Any]:
    """A block's texts; a part that `kvcag.chat_template` refuses for what is no text."""
    if isinstance(block, TextBlock):
        return [block.text]
    if isinstance(block, CitableBlock):
        return [part for inner in block.content for part in _read(inner)]
    if isinstance(block, CitationBlock):
        return _read(block.cited_content)
    if isinstance(block, ThinkingBlock | ToolCallBlock):  # no part of what was said; calls go into the frame
        return []
    return [{"type": block.block_type}]
