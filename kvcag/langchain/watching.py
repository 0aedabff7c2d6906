"""SchedulerCallback: tells a `CacheScheduler` what a chain's retrievers find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.prompts import BasePromptTemplate, format_document

from kvcag.langchain.documents_chain import DOCUMENT_PROMPT
from kvcag.scheduler import CacheScheduler


class SchedulerCallback(BaseCallbackHandler):
    """Counts what retrievers find, and lets whatever is being encoded ahead pause as soon as a question comes.

    ```python
    chain.invoke({"input": question}, config={"callbacks": [SchedulerCallback(scheduler)]})
    ```

    Args:
        scheduler: is told.
        document_prompt: the chain's, if it has one. Without it, the first question shows how documents are rendered,
            and until then none is encoded ahead.
    """

    run_inline = True  # also in an asynchronous chain: it takes microseconds, and a thread would take more

    def __init__(
        self, scheduler: CacheScheduler, *, document_prompt: BasePromptTemplate[str] = DOCUMENT_PROMPT
    ) -> None:
        self.scheduler = scheduler
        self.document_prompt = document_prompt

    def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
        """A question has come."""
        self.scheduler.step_aside()

    def on_retriever_start(self, *args: Any, **kwargs: Any) -> None:
        """A retriever may need the machine, for embeddings say."""
        self.scheduler.step_aside()

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        """The model is asked."""
        self.scheduler.step_aside()

    def on_retriever_end(self, documents: Sequence[Document], **kwargs: Any) -> None:
        """Count what was found, as prompts show it."""
        if self.document_prompt is DOCUMENT_PROMPT:
            self.scheduler.observe(documents)
            return
        shown = [format_document(document, self.document_prompt) for document in documents]
        pairs = zip(documents, shown, strict=True)
        self.scheduler.observe([document.model_copy(update={"page_content": text}) for document, text in pairs])
