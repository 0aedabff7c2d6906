"""Reads the text and the metadata of a str, a conversation, or a document of another library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import BaseModel

from kvcag.chat_template import Message, check_unicode
from kvcag.core import EncodedItem, TextualMemoryItem
from kvcag.errors import InvalidInputError

Texts: TypeAlias = str | Sequence[str] | Sequence[Message]


def texts_of(text: Texts) -> list[str]:
    """Return a list of texts; a chat message becomes `role: content`."""
    if isinstance(text, str):
        return [text]
    return [part if isinstance(part, str) else _line(part) for part in text]


def _line(message: Message) -> str:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise InvalidInputError(f"extract takes a str, a list of str or chat messages, not {type(message).__name__}")
    return f"{message['role']}: {message['content']}"


def documents_of(documents: object) -> list[Any]:
    """Return one or several documents as a list. A str is one document, and so is an object that has a text.

    Raises:
        InvalidInputError: `documents` is neither a document nor an iterable.
    """
    if isinstance(documents, str | EncodedItem | Mapping) or _has_text(documents):
        return [documents]
    if isinstance(documents, Iterable):
        return list(documents)
    raise _not_a_text(documents)


def text_and_metadata(memory: object) -> tuple[str, dict[str, Any]]:
    """Return the text and the metadata of a str, a LangChain `Document`, a textual memory or a LlamaIndex node.

    The text of a node is the one that LlamaIndex shows to an LLM.

    Raises:
        InvalidInputError: the object has no text, or the text is not Unicode.
    """
    text = _text_of(memory)
    check_unicode(text)
    metadata = getattr(memory, "metadata", None) or {}
    if isinstance(metadata, BaseModel):
        metadata = metadata.model_dump(mode="json")
    return text, dict(metadata)


def _text_of(memory: object) -> str:
    if isinstance(memory, str):
        return memory
    for field in _TEXT_FIELDS:
        text = getattr(memory, field, None)
        if isinstance(text, str):
            return text
    get_content = getattr(memory, "get_content", None)
    if callable(get_content):
        return str(get_content(metadata_mode="llm"))
    raise _not_a_text(memory)


def as_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Convert metadata to JSON types; dates and paths become str.

    Raises:
        InvalidInputError: a key is neither a str nor a number, or a value contains itself.
    """
    try:
        return dict(json.loads(json.dumps(metadata, default=str)))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"a document's metadata cannot be written as JSON: {error}") from error


_TEXT_FIELDS = ("page_content", "memory")
"""The attributes with the text: of LangChain's documents, and of textual memories of MemOS and kvcag."""


def _has_text(value: object) -> bool:
    """Whether an object has a text. LlamaIndex's nodes have the method `get_content`."""
    return callable(getattr(value, "get_content", None)) or any(hasattr(value, field) for field in _TEXT_FIELDS)


def _not_a_text(value: object) -> InvalidInputError:
    return InvalidInputError(
        f"cannot read a text from {type(value).__name__}: pass a str, a LangChain Document, a LlamaIndex node, "
        f"or a {TextualMemoryItem.__name__}"
    )
