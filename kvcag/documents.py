"""What can be read as a text: a str, several, a conversation, or another library's document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import BaseModel

from kvcag.chat_template import Message
from kvcag.core import TextualMemoryItem
from kvcag.errors import InvalidInputError

Texts: TypeAlias = str | Sequence[str] | Sequence[Message]


def texts_of(text: Texts) -> list[str]:
    """The texts, one for each message of a conversation."""
    if isinstance(text, str):
        return [text]
    return [part if isinstance(part, str) else _line(part) for part in text]


def _line(message: Message) -> str:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise InvalidInputError(f"extract takes a str, a list of str or chat messages, not {type(message).__name__}")
    return f"{message['role']}: {message['content']}"


def text_and_metadata(memory: object) -> tuple[str, dict[str, Any]]:
    """What a str, a `Document`, a node or a textual memory says, and what it says about itself."""
    if isinstance(memory, str):
        return memory, {}
    metadata = getattr(memory, "metadata", None) or {}
    if isinstance(metadata, BaseModel):
        metadata = metadata.model_dump(mode="json")
    for field in ("page_content", "memory"):  # LangChain's Document; MemOS's and our own textual memories
        text = getattr(memory, field, None)
        if isinstance(text, str):
            return text, dict(metadata)
    get_content = getattr(memory, "get_content", None)  # LlamaIndex's nodes
    if callable(get_content):
        return str(get_content()), dict(metadata)
    raise InvalidInputError(
        f"cannot read a text from {type(memory).__name__}: pass a str, a LangChain Document, a LlamaIndex node, "
        f"or a {TextualMemoryItem.__name__}"
    )
