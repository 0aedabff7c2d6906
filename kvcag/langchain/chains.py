"""Chains over documents that were encoded once."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import LanguageModelLike
from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable

from kvcag.langchain.documents import DOCUMENT_PROMPT, DOCUMENT_SEPARATOR, DOCUMENTS_KEY, DocumentsPrompt


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
