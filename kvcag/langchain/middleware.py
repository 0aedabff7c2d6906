"""KVCAGMiddleware: an agent that answers from documents, without its checkpoints ever holding them."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.prompts import BasePromptTemplate, format_document
from langchain_core.retrievers import BaseRetriever

from kvcag.cube.memory_cube import MemoryCube
from kvcag.errors import InvalidInputError, UnsupportedModelError
from kvcag.langchain.chat_model import ChatKVCAG
from kvcag.langchain.cube import CubeRetriever
from kvcag.langchain.documents_chain import DOCUMENT_PROMPT, DOCUMENT_SEPARATOR, with_documents

Behavior = Literal["ignore", "warn", "raise"]


class KVCAGMiddleware(AgentMiddleware[Any, Any, Any]):
    """Puts documents into the agent's system message, as segments that a `ChatKVCAG` has encoded before.

    They are in the request to the model and nowhere else: not in the agent's state, its checkpoints or its messages.

    ```python
    agent = create_agent(llm, tools, middleware=[KVCAGMiddleware(corpus=documents)])
    ```

    Args:
        retriever: finds documents for what the user said last.
        corpus: the same documents for every question: one segment, in this order, so that it is reused exactly, and
            with it every turn of the conversation.
        memory: a `MemoryCube`: what it finds for what the user said last; under its strategy `"exact"`, one segment.
            A `ChatKVCAG(memory=cube)` uses and fills the cube's caches.
        document_prompt: renders one document; its `page_content` alone by default.
        document_separator: stands after each document.
        unsupported_model_behavior: what to do with a model that keeps no caches. `"ignore"` gives it the documents as
            text, `"warn"` says so too, `"raise"` refuses it.

    Raises:
        InvalidInputError: none or several of `retriever`, `corpus` and `memory`.
    """

    def __init__(
        self,
        *,
        retriever: BaseRetriever | None = None,
        corpus: Sequence[Document] | None = None,
        memory: MemoryCube | None = None,
        document_prompt: BasePromptTemplate[str] | None = None,
        document_separator: str = DOCUMENT_SEPARATOR,
        unsupported_model_behavior: Behavior = "warn",
    ) -> None:
        super().__init__()
        if sum(given is not None for given in (retriever, corpus, memory)) != 1:
            raise InvalidInputError("pass either a retriever or a corpus, or a memory, to KVCAGMiddleware")
        self.retriever = retriever if memory is None else CubeRetriever(cube=memory)
        self._together = memory.strategy == "exact" if memory is not None else retriever is None
        self.corpus = list(corpus or [])
        self.document_prompt = document_prompt or DOCUMENT_PROMPT
        self.document_separator = document_separator
        self.unsupported_model_behavior = unsupported_model_behavior

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Add the documents to the system message of this call."""
        found = self.retriever.invoke(_question(request)) if self.retriever else self.corpus
        return handler(self._with(request, found))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Add the documents to the system message of this call."""
        found = await self.retriever.ainvoke(_question(request)) if self.retriever else self.corpus
        return await handler(self._with(request, found))

    def _with(self, request: ModelRequest[Any], documents: Sequence[Document]) -> ModelRequest[Any]:
        texts = [format_document(document, self.document_prompt) + self.document_separator for document in documents]
        if not texts:
            return request
        if self._together:
            texts = ["".join(texts)]
        instruction = f"{request.system_message.text}\n\n" if request.system_message else ""
        system = request.system_message or SystemMessage("")
        if self._keeps_caches(request):
            shown = with_documents(system, instruction, texts, "")
        else:
            shown = system.model_copy(update={"content": instruction + "".join(texts)})
        return request.override(system_message=shown)

    def _keeps_caches(self, request: ModelRequest[Any]) -> bool:
        if isinstance(request.model, ChatKVCAG):
            return True
        problem = (
            f"{type(request.model).__name__} keeps no caches, so it reads all documents again at every call. "
            "Use ChatKVCAG, or set unsupported_model_behavior."
        )
        if self.unsupported_model_behavior == "raise":
            raise UnsupportedModelError(problem)
        if self.unsupported_model_behavior == "warn":
            warnings.warn(problem, UserWarning, stacklevel=4)
        return False


def _question(request: ModelRequest[Any]) -> str:
    """What the user said last."""
    asked = [message for message in request.messages if isinstance(message, HumanMessage)]
    return asked[-1].text if asked else ""
