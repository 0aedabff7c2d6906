"""SchedulerCallback: reports what a chain's retrievers find to a `CacheScheduler`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.prompts import BasePromptTemplate, format_document

from kvcag.langchain.documents_chain import DOCUMENT_PROMPT
from kvcag.scheduler import CacheScheduler


class SchedulerCallback(BaseCallbackHandler):
    """Reports retrieved documents to a scheduler, and pauses its encoding as soon as a question comes.

    ```python
    chain.invoke({"input": question}, config={"callbacks": [SchedulerCallback(scheduler)]})
    ```

    Args:
        scheduler: the scheduler of the chain's memory.
        document_prompt: the chain's `document_prompt`. If the chain has one and it is not passed here, the scheduler
            encodes ahead only after the first question, which shows how the chain renders documents.
    """

    run_inline = True  # in asynchronous chains, too: starting a thread would take longer than the call

    def __init__(
        self, scheduler: CacheScheduler, *, document_prompt: BasePromptTemplate[str] = DOCUMENT_PROMPT
    ) -> None:
        self.scheduler = scheduler
        self.document_prompt = document_prompt

    def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
        """Pause encoding ahead: a question has come."""
        self.scheduler.step_aside()

    def on_retriever_start(self, *args: Any, **kwargs: Any) -> None:
        """Pause encoding ahead: a retriever may need the machine, for embeddings for example."""
        self.scheduler.step_aside()

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        """Pause encoding ahead: the model answers now."""
        self.scheduler.step_aside()

    def on_retriever_end(self, documents: Sequence[Document], **kwargs: Any) -> None:
        """Report the documents, rendered as the chain's prompt renders them."""
        if self.document_prompt is DOCUMENT_PROMPT:
            self.scheduler.observe(documents)
            return
        shown = [format_document(document, self.document_prompt) for document in documents]
        pairs = zip(documents, shown, strict=True)
        self.scheduler.observe([document.model_copy(update={"page_content": text}) for document, text in pairs])
