"""LangChain's messages as the neutral ones of `kvcag.chat_template`, with their documents found.

Which parts of a conversation are documents, each a segment that is encoded once under its own content:

1. Blocks that say so: text blocks with `cache_control={"type": "ephemeral"}`, `text-plain` blocks, and those that
   `kvcag.langchain.documents_chain.with_documents` put there.
2. Where nothing says so, system and human messages of two or more text blocks: every block is a segment, but for the
   last one of a human message, which is what the human says.

Texts are joined as they are: a block that shall not run into the next one ends with its own line break.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from kvcag.chat_template import Document, Message
from kvcag.errors import InvalidInputError, UnsupportedContentError
from kvcag.langchain.documents_chain import noted_documents

_OWN_BLOCKS = {
    "tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call",  # said again in tool_calls
    "reasoning", "thinking", "redacted_thinking", "non_standard",  # not part of what was answered
}  # fmt: skip


def to_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """Messages for `KVCacheMemory.stream`.

    Raises:
        UnsupportedContentError: a message holds an image, audio, a file or another block that is not text.
        InvalidInputError: a message of a kind that is not a part of a conversation.
    """
    marked = any(noted_documents(message) is not None or any(_marks(message)) for message in messages)
    return [{**_frame(message), "content": _content(message, marked)} for message in messages]


def _frame(message: BaseMessage) -> dict[str, Any]:
    """Everything of a message but its content."""
    if isinstance(message, SystemMessage):
        return {"role": "system"}
    if isinstance(message, HumanMessage):
        return {"role": "user", **({"name": message.name} if message.name else {})}
    if isinstance(message, AIMessage):
        calls = [
            {"type": "function", "id": call["id"], "function": {"name": call["name"], "arguments": call["args"]}}
            for call in message.tool_calls
        ]
        return {"role": "assistant", **({"tool_calls": calls} if calls else {})}
    if isinstance(message, ToolMessage):
        return {"role": "tool", "tool_call_id": message.tool_call_id, "name": message.name}
    if isinstance(message, FunctionMessage):
        return {"role": "tool", "name": message.name}
    if isinstance(message, ChatMessage):
        return {"role": message.role}
    raise InvalidInputError(
        f"a {type(message).__name__} is not a part of a conversation: pass system, human, AI and tool messages"
    )


def _content(message: BaseMessage, marked: bool) -> str | list[str]:
    """The text, or the parts with the documents among them."""
    blocks = _blocks(message)
    texts = [_text(block, message) for block in blocks]
    if not isinstance(message, SystemMessage | HumanMessage):
        return "".join(texts)
    if marked:
        documents = _marks(message)
    elif len(texts) > 1:
        documents = [True] * (len(texts) - 1) + [isinstance(message, SystemMessage)]
    else:
        documents = [False] * len(texts)
    if not any(documents):
        return "".join(texts)
    return [Document(text) if document else text for text, document in zip(texts, documents, strict=True)]


def _blocks(message: BaseMessage) -> list[str | dict[str, Any]]:
    """The content as a list, without an AI message's own blocks that are no text."""
    content: list[Any] = [message.content] if isinstance(message.content, str) else list(message.content)
    if isinstance(message, AIMessage):
        return [block for block in content if isinstance(block, str) or block.get("type") not in _OWN_BLOCKS]
    return content


def _marks(message: BaseMessage) -> list[bool]:
    """Which blocks say that they are documents."""
    noted = noted_documents(message) or ()
    return [index in noted or _is_marked(block) for index, block in enumerate(_blocks(message))]


def _is_marked(block: str | Mapping[str, Any]) -> bool:
    if not isinstance(block, Mapping):
        return False
    extras = block.get("extras") or {}  # where LangChain's own block constructors put what they do not know
    return block.get("type") == "text-plain" or bool(block.get("cache_control") or extras.get("cache_control"))


def _text(block: str | Mapping[str, Any], message: BaseMessage) -> str:
    if isinstance(block, str):
        return block
    if isinstance(text := block.get("text"), str) and block.get("type") in ("text", "text-plain"):
        return text
    raise UnsupportedContentError(
        f"the {message.type} message holds a block of type {block.get('type')!r}, and a text model reads text alone. "
        'Pass {"type": "text", "text": …} blocks, or use a model that takes such content for this message.'
    )
