"""Prompts in which each document is a text block, and functions that encode documents before a question comes."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.language_models import LanguageModelLike
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.prompt_values import ChatPromptValue, PromptValue
from langchain_core.prompts import (
    BasePromptTemplate,
    ChatPromptTemplate,
    PromptTemplate,
    aformat_document,
    format_document,
)
from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import Field, SkipValidation

from kvcag.adapters import checked_fields
from kvcag.chat_template import SEPARATOR, segment
from kvcag.chat_template import Document as TextDocument
from kvcag.contexts import Behind, Read
from kvcag.documents import as_json, documents_of, text_and_metadata
from kvcag.errors import ContextLengthError, EmptyPromptError, InvalidInputError
from kvcag.langchain.messages import noted_documents, to_messages, with_documents
from kvcag.memory import KVCacheMemory
from kvcag.stores.base import SOURCE_FIELDS
from kvcag.sync import Context, in_context

DOCUMENTS_KEY = "context"
DOCUMENT_PROMPT: BasePromptTemplate[str] = PromptTemplate.from_template("{page_content}")

_ANY_PROMPT = ChatPromptTemplate.from_messages([("system", f"{{{DOCUMENTS_KEY}}}"), ("human", "…")])


class DocumentsPrompt(BasePromptTemplate[PromptValue]):
    """Wraps a prompt, and replaces its documents variable with one text block per document.

    The separator follows each document except the last. The cache of every document includes the separator, so a cached
    document is found at any position.

    Attributes:
        prompt: the wrapped prompt. One of its messages contains the documents' variable, unchanged.
        document_prompt: renders one document; its variables are `page_content` and metadata keys.
        document_separator: stands between documents.
        document_variable_name: the variable that holds the list of documents.

    Raises:
        InvalidInputError: the prompt has no variable `document_variable_name`, or a field is wrong or unknown.
    """

    input_variables: list[str] = Field(default_factory=list)
    prompt: SkipValidation[BasePromptTemplate[Any]]
    document_prompt: SkipValidation[BasePromptTemplate[str]] = DOCUMENT_PROMPT
    document_separator: str = SEPARATOR
    document_variable_name: str = DOCUMENTS_KEY

    def __init__(
        self, *, prompt: BasePromptTemplate[Any], document_variable_name: str = DOCUMENTS_KEY, **fields: Any
    ) -> None:
        if not isinstance(prompt, BasePromptTemplate):
            raise InvalidInputError(
                f"the prompt is a {type(prompt).__name__}: pass a ChatPromptTemplate or a PromptTemplate"
            )
        shown = fields.get("document_prompt", DOCUMENT_PROMPT)
        if not isinstance(shown, BasePromptTemplate):
            raise InvalidInputError(f"document_prompt is a {type(shown).__name__}: pass a PromptTemplate")
        if unknown := sorted(fields.keys() - type(self).model_fields.keys()):
            raise InvalidInputError(f"unknown argument {', '.join(unknown)}")
        if document_variable_name not in prompt.input_variables:
            raise InvalidInputError(
                f"the prompt has no variable {document_variable_name!r} for the documents, only "
                f"{sorted(prompt.input_variables)}. Add it, or set document_variable_name."
            )
        taken = {name: getattr(prompt, name) for name in ("input_variables", "optional_variables", "input_types")}
        own = {"prompt": prompt, "document_variable_name": document_variable_name}
        with checked_fields():
            super().__init__(**{**taken, **fields, **own})

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """The module from which `langchain_core.load` imports this class."""
        return cls.__module__.split(".")

    @property
    def _prompt_type(self) -> str:
        return "kvcag-documents"

    def invoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> PromptValue:
        """`Runnable.invoke`. Warns if arguments were bound to the chain: only this first step receives them."""
        _warn_not_passed_on(kwargs)
        return super().invoke(input, config)

    async def ainvoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> PromptValue:
        """Asynchronous `invoke`."""
        _warn_not_passed_on(kwargs)
        return await super().ainvoke(input, config)

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
                    f"{self.document_variable_name!r} is empty: the retriever found no documents, so the model "
                    "answers without any. Check the retriever's index and its score threshold.",
                    UserWarning,
                    stacklevel=3,
                )
            return list(documents)
        raise InvalidInputError(
            f"{self.document_variable_name!r} is a {type(documents).__name__}, not a list, and each "
            "document is encoded on its own. Pass a list of Documents, as a retriever returns it, without joining them."
        )

    def _split(self, value: PromptValue, mark: str, documents: Sequence[str]) -> PromptValue:
        """Replace the mark with the documents."""
        *others, last = documents or [""]
        texts = [*(f"{document}{self.document_separator}" for document in others), last]
        ending = segment(last, self.document_separator)[len(last) :]
        messages = [_split_message(message, mark, texts, ending) for message in value.to_messages()]
        if messages == value.to_messages():
            raise InvalidInputError(
                f"the prompt does not contain {{{self.document_variable_name}}} unchanged: its template changes the "
                "value, or has it in a message that is not text. Use document_prompt to format the documents."
            )
        return ChatPromptValue(messages=messages)


def _warn_not_passed_on(bound: Mapping[str, Any]) -> None:
    if bound:
        warnings.warn(
            f"{', '.join(sorted(bound))} is bound to the chain and does not reach the model: LangChain passes a "
            "chain's arguments to its first step only, which is the prompt. Bind them to the model: llm.bind(…).",
            UserWarning,
            stacklevel=3,
        )


def _split_message(message: BaseMessage, mark: str, documents: Sequence[str], ending: str) -> BaseMessage:
    """The message with the documents as blocks at the first mark, and as plain text at every further mark."""
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
    after = after.replace(mark, "".join(documents))
    return with_documents(message, before, documents, after, ending=ending) if found else message


def create_cag_documents_chain(
    llm: LanguageModelLike,
    prompt: BasePromptTemplate[Any],
    *,
    output_parser: BaseOutputParser[Any] | None = None,
    document_prompt: BasePromptTemplate[str] | None = None,
    document_separator: str = SEPARATOR,
    document_variable_name: str = DOCUMENTS_KEY,
) -> Runnable[dict[str, Any], Any]:
    r"""LangChain's `create_stuff_documents_chain`, with each document as a text block of its own.

    The arguments and the output are the same. A `ChatKVCAG` looks up the cache of each document by its content, in any
    order, and merges the caches by its `merge_strategy`. Any other chat model reads the blocks as text.

    Args:
        llm: the chat model.
        prompt: contains `{context}` (see `document_variable_name`) in one of its messages.
        output_parser: `StrOutputParser` by default.
        document_prompt: renders one document from `page_content` and its metadata; by default the content alone.
        document_separator: stands between documents.
        document_variable_name: the variable that holds the list of documents.

    Raises:
        InvalidInputError: the prompt has no variable `document_variable_name`.

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


# --- before a question comes -------------------------------------------------------------------------------------


def read_documents(documents: object) -> list[Document]:
    """Convert one document or several to LangChain Documents. A str is one document.

    Raises:
        InvalidInputError: a document has no text.
    """
    found = []
    for document in documents_of(documents):
        if not isinstance(document, Document):
            text, metadata = text_and_metadata(document)
            document = Document(page_content=text, metadata=metadata)
        found.append(document)
    return found


def encode_ahead(
    memory: KVCacheMemory,
    documents: Sequence[Document],
    prompt: BasePromptTemplate[Any] | None,
    context: Context | None = None,
    **settings: Any,
) -> Iterator[str | None]:
    """Encode and store documents, one per step, and yield the id of each, or None if it is left out.

    Args:
        memory: stores the caches.
        documents: the documents that a retriever may find. A document that is empty, or that exceeds the model's
            context, is left out with a warning.
        prompt: the prompt that will contain the documents. None: a system message that contains nothing else.
        context: as for `KVCacheMemory.add`.
        **settings: further attributes of `DocumentsPrompt`.

    Raises:
        InvalidInputError: the prompt has another variable before the documents.
    """
    shown = DocumentsPrompt(prompt=prompt or _ANY_PROMPT, **settings)
    memory.documents.check_context(context)
    reads = in_context([Read((), one.page_content, one.metadata) for one in documents], context, memory.read)
    for number, (document, read) in enumerate(zip(documents, reads, strict=True), start=1):
        id = None
        try:
            id = _keep(memory, shown, document, read.behind)
        except EmptyPromptError:
            _warn_left_out(number, document, "it is empty")
        except ContextLengthError as error:
            _warn_left_out(number, document, f"it exceeds the model's context of {error.limit:,} tokens. Split it")
        yield id


def _keep(memory: KVCacheMemory, prompt: DocumentsPrompt, document: Document, behind: Behind) -> str:
    """Encode and store a document as the prompt renders it, and return its id."""
    given, place = _without_question(prompt, document)
    messages = to_messages(given)
    places = [
        (number, at)
        for number, message in enumerate(messages)
        for at, part in enumerate(message["content"])
        if isinstance(part, TextDocument) and part
    ]
    own = places.index(place)  # the prompt may mark other blocks as documents
    metadata = [as_json(document.metadata) if at == own else {} for at in range(len(places))]
    if behind is None:
        return memory.keep(messages, metadata)[own]
    before = [Document(page_content=near.text, metadata=dict(near.metadata)) for near in behind]
    return memory.keep(messages, metadata, context=lambda text: before)[own]


def fitting(memory: KVCacheMemory, documents: Sequence[Document], instruction: str) -> list[Document]:
    """The documents that fit into one context, in order. The others are left out, each with a warning."""
    template, context_length = memory.engine.template, memory.engine.context_length
    room = context_length - len(template.instruction_ids(None)) - 1
    if instruction:
        room -= len(template.encode_text(segment(instruction)))
    kept = []
    for number, document in enumerate(documents, start=1):
        size = len(template.encode_text(segment(document.page_content)))
        if not document.page_content.strip():
            _warn_left_out(number, document, "it is empty")
        elif size > room:
            why = f"it has {size:,} tokens, and only {room:,} of the model's {context_length:,} are left"
            _warn_left_out(number, document, why)
        else:
            room -= size
            kept.append(document)
    return kept


def _warn_left_out(number: int, document: Document, why: str) -> None:
    name = next((f" ({document.metadata[field]})" for field in SOURCE_FIELDS if document.metadata.get(field)), "")
    warnings.warn(f"document {number}{name} was left out: {why}.", UserWarning, stacklevel=4)


def _without_question(prompt: DocumentsPrompt, document: Document) -> tuple[list[BaseMessage], tuple[int, int]]:
    """The messages of the prompt with this document, and the document's place: the indices of its message and block.

    Placeholders stand for the prompt's other variables, whose values only the question brings.
    """
    unknown = uuid.uuid4().hex
    values: dict[str, Any] = {
        name: [] if "Message" in str(prompt.input_types.get(name, "")) else unknown
        for name in prompt.input_variables
        if name != prompt.document_variable_name
    }
    messages = prompt.format_prompt(**{prompt.document_variable_name: [document]}, **values).to_messages()
    places = [
        (index, next(iter(noted))) for index, message in enumerate(messages) if (noted := noted_documents(message))
    ]
    if not places or not document.page_content.strip():
        raise EmptyPromptError("a document is empty: leave it out")
    holder, first = places[0]
    before = [*messages[:holder], *messages[holder].content[:first]]
    if any(unknown in str(part) for part in before):
        raise InvalidInputError(
            f"the prompt has {sorted(values)} before {{{prompt.document_variable_name}}}, so the text before the "
            "documents depends on the question, and the documents cannot be encoded ahead. Move the documents to the "
            "front of the prompt, preferably into the system message."
        )
    return messages, places[0]
