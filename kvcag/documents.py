"""Texts of documents: of a str, several, a conversation, or another library's document."""

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
    """The texts, one for each message of a conversation."""
    if isinstance(text, str):
        return [text]
    return [part if isinstance(part, str) else _line(part) for part in text]


def _line(message: Message) -> str:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise InvalidInputError(f"extract takes a str, a list of str or chat messages, not {type(message).__name__}")
    return f"{message['role']}: {message['content']}"


def documents_of(documents: object) -> list[Any]:
    """One document or several as a list. A str is one document, and so is an object that has a text.

    Raises:
        InvalidInputError: neither a document nor an iterable of documents.
    """
    if isinstance(documents, str | EncodedItem | Mapping) or _has_text(documents):
        return [documents]
    if isinstance(documents, Iterable):
        return list(documents)
    raise _not_a_text(documents)


def text_and_metadata(memory: object) -> tuple[str, dict[str, Any]]:
    """The text and the metadata of a str, a `Document`, a textual memory, or a node as LlamaIndex shows it to an LLM.

    Raises:
        InvalidInputError: it has no text, or one that is not Unicode.
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
    """Metadata in the types of JSON; dates and paths become str.

    Raises:
        InvalidInputError: a key is not a str or a number, or a value contains itself.
    """
    try:
        return dict(json.loads(json.dumps(metadata, default=str)))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"a document's metadata cannot be written as JSON: {error}") from error


_TEXT_FIELDS = ("page_content", "memory")
"""Where LangChain's documents, and MemOS's and our own textual memories, have their text."""


def _has_text(value: object) -> bool:
    """LlamaIndex's nodes have `get_content`."""
    return callable(getattr(value, "get_content", None)) or any(hasattr(value, field) for field in _TEXT_FIELDS)


def _not_a_text(value: object) -> InvalidInputError:
    return InvalidInputError(
        f"cannot read a text from {type(value).__name__}: pass a str, a LangChain Document, a LlamaIndex node, "
        f"or a {TextualMemoryItem.__name__}"
    )
