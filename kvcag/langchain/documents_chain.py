"""Prompts whose documents travel one block each, so that each is found again by its own content."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from langchain_core.documents import Document
from langchain_core.language_models import LanguageModelLike
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from langchain_core.prompts import BasePromptTemplate, PromptTemplate, aformat_document, format_document
from langchain_core.runnables import Runnable
from pydantic import Field, SkipValidation, model_validator
from typing_extensions import Self

from kvcag.errors import InvalidInputError

DOCUMENTS_KEY = "context"
DOCUMENT_SEPARATOR = "\n\n"
DOCUMENT_PROMPT: BasePromptTemplate[str] = PromptTemplate.from_template("{page_content}")

_NOTE = "kvcag_documents"
"""In `additional_kwargs`: which blocks of a message are documents. Other chat models do not send this key on; a mark
within the blocks some would refuse."""


MessageT = TypeVar("MessageT", bound=BaseMessage)


def with_documents(message: MessageT, before: str, documents: Sequence[str], after: str) -> MessageT:
    """The message with a text block for each document, between what stands before and after them."""
    texts = [(before, False), *((document, True) for document in documents), (after, False)]
    shown = [(text, is_document) for text, is_document in texts if text]
    noted = [index for index, (_, is_document) in enumerate(shown) if is_document]
    return message.model_copy(
        update={
            "content": [{"type": "text", "text": text} for text, _ in shown] or "",
            "additional_kwargs": {**message.additional_kwargs, _NOTE: noted},
        }
    )


def noted_documents(message: BaseMessage) -> Sequence[int] | None:
    """Which blocks are documents, if `with_documents` made the message."""
    return message.additional_kwargs.get(_NOTE)


class DocumentsPrompt(BasePromptTemplate[PromptValue]):
    """A prompt into which documents are put one block each, where the prompt it wraps would have had one text.

    Every document ends with the separator, the last one too: so its tokens are the same in any place.

    Attributes:
        prompt: shows the documents' variable, as it is, in one of its messages.
        document_prompt: renders one document; its variables are `page_content` and metadata keys.
        document_separator: stands after each document.
        document_variable_name: the variable that holds the list of documents.
    """

    input_variables: list[str] = Field(default_factory=list)
    prompt: SkipValidation[BasePromptTemplate[Any]]
    document_prompt: SkipValidation[BasePromptTemplate[str]] = DOCUMENT_PROMPT
    document_separator: str = DOCUMENT_SEPARATOR
    document_variable_name: str = DOCUMENTS_KEY

    @model_validator(mode="before")
    @classmethod
    def _variables_of_the_prompt(cls, values: dict[str, Any]) -> dict[str, Any]:
        prompt = values["prompt"]
        taken = {name: getattr(prompt, name) for name in ("input_variables", "optional_variables", "input_types")}
        return {**taken, **values}

    @model_validator(mode="after")
    def _shows_the_documents(self) -> Self:
        if self.document_variable_name not in self.prompt.input_variables:
            raise InvalidInputError(
                f"the prompt has no variable {self.document_variable_name!r} for the documents, only "
                f"{sorted(self.prompt.input_variables)}. Add it, or set document_variable_name."
            )
        return self

    @property
    def _prompt_type(self) -> str:
        return "kvcag-documents"

    def format_prompt(self, **kwargs: Any) -> PromptValue:
        """The messages, with a block for each document."""
        documents = [format_document(document, self.document_prompt) for document in self._documents(kwargs)]
        mark = uuid.uuid4().hex
        value = self.prompt.format_prompt(**{**kwargs, self.document_variable_name: mark})
        return self._split(value, mark, documents)

    async def aformat_prompt(self, **kwargs: Any) -> PromptValue:
        """The messages, with a block for each document."""
        documents = [await aformat_document(document, self.document_prompt) for document in self._documents(kwargs)]
        mark = uuid.uuid4().hex
        value = await self.prompt.aformat_prompt(**{**kwargs, self.document_variable_name: mark})
        return self._split(value, mark, documents)

    def format(self, **kwargs: Any) -> PromptValue:
        """The messages, with a block for each document."""
        return self.format_prompt(**kwargs)

    def _documents(self, values: Mapping[str, Any]) -> list[Document]:
        documents = values[self.document_variable_name]
        if isinstance(documents, list | tuple) and all(isinstance(document, Document) for document in documents):
            if not documents:
                warnings.warn(
                    f"{self.document_variable_name!r} is empty, so the model answers without any document: the "
                    "retriever found none. Check that it has been filled, and its score threshold.",
                    UserWarning,
                    stacklevel=3,
                )
            return list(documents)
        raise InvalidInputError(
            f"{self.document_variable_name!r} holds {type(documents).__name__}, and each document is encoded by "
            "itself: pass a list of Documents, as a retriever gives it, without joining their texts."
        )

    def _split(self, value: PromptValue, mark: str, documents: Sequence[str]) -> PromptValue:
        """Put the documents in the place of the mark."""
        texts = [document + self.document_separator for document in documents]
        messages = [_split_message(message, mark, texts) for message in value.to_messages()]
        if messages == value.to_messages():
            raise InvalidInputError(
                f"the prompt does not show {{{self.document_variable_name}}} as it is: its template changes it, or "
                "shows it in a message that is no text. Let document_prompt shape the documents."
            )
        return ChatPromptValue(messages=messages)


def _split_message(message: BaseMessage, mark: str, documents: Sequence[str]) -> BaseMessage:
    """A message around its documents. A second place that shows them shows their text."""
    if not isinstance(message.content, str):
        if not any(mark in str(block) for block in message.content):
            return message
        blocks = [block if isinstance(block, str) else block.get("text", "") for block in message.content]
        if any(isinstance(block, dict) and block.get("type") != "text" for block in message.content):
            return message
        content = "".join(blocks)
    else:
        content = message.content
    before, found, after = content.partition(mark)
    return with_documents(message, before, documents, after.replace(mark, "".join(documents))) if found else message


def create_cag_documents_chain(
    llm: LanguageModelLike,
    prompt: BasePromptTemplate[Any],
    *,
    output_parser: BaseOutputParser[Any] | None = None,
    document_prompt: BasePromptTemplate[str] | None = None,
    document_separator: str = DOCUMENT_SEPARATOR,
    document_variable_name: str = DOCUMENTS_KEY,
) -> Runnable[dict[str, Any], Any]:
    r"""`create_stuff_documents_chain` for a model that has read the documents before.

    The same arguments and the same answer to the rest of a chain; but the documents travel as one text block each, so
    a `ChatKVCAG` finds each of them by its content, in whatever order they were retrieved. Any other chat model reads
    the blocks as text.

    Args:
        llm: the chat model.
        prompt: shows `{context}` (see `document_variable_name`) in one of its messages.
        output_parser: `StrOutputParser` by default.
        document_prompt: renders one document from `page_content` and its metadata; the content alone by default.
        document_separator: stands after each document, after the last one too.
        document_variable_name: the variable that holds the list of documents.

    Raises:
        InvalidInputError: the prompt has no such variable.

    Example:
        ```python
        prompt = ChatPromptTemplate.from_messages([("system", "Answer from:\n\n{context}"), ("human", "{input}")])
        chain = create_retrieval_chain(retriever, create_cag_documents_chain(llm, prompt))
        chain.invoke({"input": "When was the tower completed?"})["answer"]
        ```
    """
    documents = DocumentsPrompt(
        prompt=prompt,
        document_prompt=document_prompt or DOCUMENT_PROMPT,
        document_separator=document_separator,
        document_variable_name=document_variable_name,
    )
    return (documents | llm | (output_parser or StrOutputParser())).with_config(run_name="cag_documents_chain")
