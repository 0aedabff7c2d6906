"""What can be encoded before anybody asks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage

from kvcag.errors import InvalidInputError
from kvcag.langchain.documents_chain import DocumentsPrompt, noted_documents, with_documents
from kvcag.langchain.messages import to_messages
from kvcag.memory import KVCacheMemory


def encode_ahead(
    memory: KVCacheMemory, documents: Iterable[Document], prompt: DocumentsPrompt | None, separator: str
) -> Iterator[str]:
    """Encode and keep documents, one a step, and give the id of each.

    Args:
        memory: where they are kept.
        documents: what a retriever may find.
        prompt: what they will stand in; None for a system message that holds documents alone.
        separator: stands after each document, where there is no prompt.
    """
    for document in documents:
        messages = _asking(prompt, document) if prompt else _alone(document.page_content + separator)
        metadata = json.loads(json.dumps(document.metadata, default=str))
        yield from memory.keep(to_messages(messages), [metadata])


def _alone(text: str) -> list[BaseMessage]:
    return [with_documents(SystemMessage(""), "", [text], ""), HumanMessage("…")]


def _asking(prompt: DocumentsPrompt, document: Document) -> list[BaseMessage]:
    """The prompt with one document and nothing asked yet."""
    unknown = uuid.uuid4().hex
    values: dict[str, Any] = {
        name: [] if "Message" in str(prompt.input_types.get(name, "")) else unknown
        for name in prompt.input_variables
        if name != prompt.document_variable_name
    }
    messages = prompt.format_prompt(**{prompt.document_variable_name: [document]}, **values).to_messages()
    holder = next(index for index, message in enumerate(messages) if noted_documents(message))
    [first] = noted_documents(messages[holder]) or [0]
    before = [*messages[:holder], *messages[holder].content[:first]]
    if any(unknown in str(part) for part in before):
        raise InvalidInputError(
            f"the prompt shows {sorted(values)} before {{{prompt.document_variable_name}}}, so what stands before the "
            "documents is not known until somebody asks, and nothing can be encoded ahead. Move the documents to the "
            "front, best into the system message."
        )
    return messages
