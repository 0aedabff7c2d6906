"""KVCAGMiddleware: an agent answers from documents, and its checkpoints do not contain them."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, get_args

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.prompts import BasePromptTemplate, format_document
from langchain_core.retrievers import BaseRetriever

from kvcag.chat_template import SEPARATOR, segment
from kvcag.cube.memory_cube import MemoryCube
from kvcag.errors import InvalidInputError, UnsupportedModelError
from kvcag.langchain.chat_model import chat_model_in
from kvcag.langchain.cube import CubeRetriever
from kvcag.langchain.documents_chain import DOCUMENT_PROMPT, read_documents
from kvcag.langchain.messages import with_documents

Behavior = Literal["ignore", "warn", "raise"]


class KVCAGMiddleware(AgentMiddleware[Any, Any, Any]):
    """Puts documents into the agent's system message, each as a text block that a `ChatKVCAG` encodes once.

    The documents are only in the request to the model, and not in the agent's state, checkpoints or messages. The model
    may be wrapped: bound, configured, or with fallbacks. List this middleware after any middleware that sets the system
    message. It warns if the documents did not reach the model.

    ```python
    agent = create_agent(llm, tools, middleware=[KVCAGMiddleware(corpus=documents)])
    ```

    Args:
        retriever: finds documents for the user's last message.
        corpus: the same documents for every question, as one block in this order. The block and the conversation
            after it are reused exactly. A str is one document.
        memory: a `MemoryCube` that finds documents for the user's last message. With the cube's strategy `"exact"`
            they are one block. A `ChatKVCAG(memory=cube)` uses and fills the cube's caches.
        document_prompt: renders one document; by default its `page_content` alone.
        document_separator: appended to each document that does not end with it.
        unsupported_model_behavior: what to do with a model that is not a `ChatKVCAG`. `"ignore"` and `"warn"` give it
            the documents as text, without and with a warning; `"raise"` refuses it.

    Raises:
        InvalidInputError: not exactly one of `retriever`, `corpus` and `memory` is given, or
            `unsupported_model_behavior` is unknown.
        UnsupportedModelError: at a call with `"raise"`, if the model is not a `ChatKVCAG`.
    """

    def __init__(
        self,
        *,
        retriever: BaseRetriever | None = None,
        corpus: str | Document | Sequence[str | Document] | None = None,
        memory: MemoryCube | None = None,
        document_prompt: BasePromptTemplate[str] | None = None,
        document_separator: str = SEPARATOR,
        unsupported_model_behavior: Behavior = "warn",
    ) -> None:
        super().__init__()
        if sum(given is not None for given in (retriever, corpus, memory)) != 1:
            raise InvalidInputError("KVCAGMiddleware needs documents: pass exactly one of retriever, corpus and memory")
        if unsupported_model_behavior not in get_args(Behavior):
            known = ", ".join(get_args(Behavior))
            raise InvalidInputError(f"unsupported_model_behavior {unsupported_model_behavior!r}: use one of {known}")
        self.retriever = retriever if memory is None else CubeRetriever(cube=memory)
        self._together = memory.strategy == "exact" if memory is not None else retriever is None
        self.corpus = read_documents(corpus or [])
        self.document_prompt = document_prompt or DOCUMENT_PROMPT
        self.document_separator = document_separator
        self.unsupported_model_behavior = unsupported_model_behavior

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Add the documents to the system message of this call."""
        found = self.retriever.invoke(_question(request)) if self.retriever else self.corpus
        return _arrived(found, handler(self._with(request, found)))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Add the documents to the system message of this call."""
        found = await self.retriever.ainvoke(_question(request)) if self.retriever else self.corpus
        return _arrived(found, await handler(self._with(request, found)))

    def _with(self, request: ModelRequest[Any], documents: Sequence[Document]) -> ModelRequest[Any]:
        shown_documents = (format_document(document, self.document_prompt) for document in documents)
        texts = [segment(text, self.document_separator) for text in shown_documents]
        if not texts:
            return request
        if self._together:
            texts = ["".join(texts)]
        instruction = f"{request.system_message.text}\n\n" if request.system_message else ""
        system = request.system_message or SystemMessage("")
        if self._keeps_caches(request):
            shown = with_documents(system, instruction, texts)
        else:
            shown = system.model_copy(update={"content": instruction + "".join(texts)})
        return request.override(system_message=shown)

    def _keeps_caches(self, request: ModelRequest[Any]) -> bool:
        if chat_model_in(request.model) is not None:
            return True
        problem = (
            f"a {type(request.model).__name__} does not cache documents and reads all of them at every call. "
            'Use a ChatKVCAG, or set unsupported_model_behavior="ignore".'
        )
        if self.unsupported_model_behavior == "raise":
            raise UnsupportedModelError(problem)
        if self.unsupported_model_behavior == "warn":
            warnings.warn(problem, UserWarning, stacklevel=4)
        return False


def _arrived(documents: Sequence[Document], response: ModelResponse[Any]) -> ModelResponse[Any]:
    """Return the response, and warn if the model was asked without the documents."""
    reports = [report for message in response.result if (report := message.response_metadata.get("kvcag"))]
    if documents and reports and not any("context_tokens" in report for report in reports):
        warnings.warn(
            "the documents of KVCAGMiddleware did not reach the model: a later middleware replaced the system "
            "message. Put KVCAGMiddleware at the end of the list of middleware.",
            UserWarning,
            stacklevel=4,
        )
    return response


def _question(request: ModelRequest[Any]) -> str:
    """The user's last message."""
    asked = [message for message in request.messages if isinstance(message, HumanMessage)]
    return asked[-1].text if asked else ""
