"""CAGSynthesizer: answers from retrieved nodes, whose texts are encoded once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal, TypeAlias, cast, get_args

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseGen,
    ContentBlock,
    TextBlock,
)
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.instrumentation.events.synthesis import GetResponseStartEvent
from llama_index.core.llms import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_REFINE_PROMPT_SEL, DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.settings import Settings
from llama_index.core.types import RESPONSE_TEXT_TYPE
from llama_index_instrumentation import get_dispatcher
from pydantic import BaseModel

from kvcag.chat_template import segment
from kvcag.concurrency import in_thread, iterate
from kvcag.errors import CacheWarning, InvalidInputError
from kvcag.llama_index.llm import KVCacheLLM
from kvcag.llama_index.messages import DOCUMENT_END, JOINED, document_blocks

Order: TypeAlias = Literal["retrieval", "canonical"]

CONTEXT = "kvcag-context-7d2f90c1"
"""Stands for the documents while a template is rendered."""

_LABEL = re.compile(r"Source \d+:\n")
"""LlamaIndex's `CitationQueryEngine` writes this label before each passage. The cached document does not contain the
label, so that a passage's cache is found at every rank."""

_GENERATED = re.compile(r"Sub question: .*?\nResponse: |\nQuestion: .*?\nAnswer: ", re.DOTALL)
"""LlamaIndex's `SubQuestionQueryEngine` and `MultiStepQueryEngine` begin texts that they make from answers like
this. Such texts are not cached, since they do not come again."""

dispatcher = get_dispatcher(__name__)


class RoundsWarning(UserWarning):
    """The documents do not fit into the model's context together, so the model reads them in several rounds."""


class CAGSynthesizer(BaseSynthesizer):
    """Answers from the nodes of a retriever. Each node's text is a document that is encoded once.

    If the documents do not fit into the context together, the model reads them in several rounds. Each round refines
    the answer of the previous round, and a `RoundsWarning` is issued. The llm's `merge_strategy` says how caches are
    merged.

    ```python
    engine = index.as_query_engine(llm=llm, response_synthesizer=CAGSynthesizer(llm=llm))
    ```

    Args:
        llm: a `KVCacheLLM`, or its `as_structured_llm`; `Settings.llm` by default.
        text_qa_template: the prompt of the first round. Its variables are `context_str` and `query_str`.
        refine_template: the prompt of later rounds. Its variables are `context_msg`, `existing_answer` and `query_str`.
        order: `"retrieval"` keeps the order of the nodes, best first, which gives the best merged answers.
            `"canonical"` sorts the texts, so that the same nodes in any order make the same context.
        exact: encode all documents of a question as one document. The answer is that of a full prefill, but the cache
            is reused only for the same documents in the same order.
        streaming: answer with a `StreamingResponse`.
        output_cls: answer with an object of this class.
        empty_response: the answer if there are no nodes.
        callback_manager: receives the events.

    Raises:
        InvalidInputError: the llm is not a `KVCacheLLM`, or `order` is unknown.
    """

    def __init__(
        self,
        llm: LLM | None = None,
        *,
        text_qa_template: BasePromptTemplate | None = None,
        refine_template: BasePromptTemplate | None = None,
        order: Order = "retrieval",
        exact: bool = False,
        streaming: bool = False,
        output_cls: type[BaseModel] | None = None,
        empty_response: str | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        llm = llm or Settings.llm
        inner = llm.llm if isinstance(llm, StructuredLLM) else llm
        if not isinstance(inner, KVCacheLLM):
            raise InvalidInputError(f"llm is a {type(inner).__name__}: CAGSynthesizer needs a KVCacheLLM")
        if order not in get_args(Order):
            raise InvalidInputError(f"order {order!r}: use one of {', '.join(get_args(Order))}")
        super().__init__(
            llm=llm.as_structured_llm(output_cls) if output_cls and llm is inner else llm,
            callback_manager=callback_manager,
            streaming=streaming,
            output_cls=output_cls,
            empty_response=empty_response,
        )
        self.cag = inner  # without the structured wrapper
        self._text_qa_template: BasePromptTemplate = text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL
        self._refine_template: BasePromptTemplate = refine_template or DEFAULT_REFINE_PROMPT_SEL
        self._order = order
        self.exact = exact

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes the copy from the arguments: copying LlamaIndex's tokenizer, which is unused, may need the network."""
        made = partial(
            type(self),
            self._llm,
            text_qa_template=self._text_qa_template,
            refine_template=self._refine_template,
            order=self._order,
            exact=self.exact,
            streaming=self._streaming,
            output_cls=self._output_cls,
            empty_response=self._empty_response,
        )
        return made, ()

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template, "refine_template": self._refine_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._text_qa_template = prompts.get("text_qa_template", self._text_qa_template)
        self._refine_template = prompts.get("refine_template", self._refine_template)

    @property
    def _streams(self) -> bool:
        """Whether the answer is streamed. A structured answer is not."""
        return self._streaming and not isinstance(self._llm, StructuredLLM)

    def synthesize(self, *args: Any, **kwargs: Any) -> RESPONSE_TYPE:
        """Answer a question from nodes. Each node's text is a document."""
        return super().synthesize(*args, **kwargs, documents=True)

    async def asynthesize(self, *args: Any, **kwargs: Any) -> RESPONSE_TYPE:
        """Asynchronous `synthesize`."""
        return await super().asynthesize(*args, **kwargs, documents=True)

    def get_response(
        self, query_str: str, text_chunks: Sequence[str], documents: bool = False, **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Answer a question from texts.

        Args:
            query_str: the question.
            text_chunks: the texts.
            documents: cache the texts as documents. False by default, since LlamaIndex's engines also call this method
                with earlier answers.
            **response_kwargs: further variables of the template.
        """
        dispatcher.event(GetResponseStartEvent(query_str=query_str, text_chunks=list(text_chunks)))
        rounds = self._rounds(query_str, text_chunks, response_kwargs)
        if not rounds:
            return self._empty_response_generator() if self._streams else self._empty_response
        shown: dict[str, Any] = {**response_kwargs, "documents": documents}
        answer: str | None = None
        for texts in rounds[:-1]:
            answer = _said(self._llm.chat(self.messages(query_str, texts, answer, **shown)))
        messages = self.messages(query_str, rounds[-1], answer, **shown)
        if self._streams:
            return _deltas(self._llm.stream_chat(messages))
        return _said(self._llm.chat(messages)) or self._empty_response

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], documents: bool = False, **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Asynchronous `get_response`."""
        response = await in_thread(self.get_response, query_str, text_chunks, documents, **response_kwargs)
        return iterate(lambda: cast("Generator[str, None, None]", response)) if self._streams else response

    def messages(
        self,
        query_str: str,
        texts: Sequence[str],
        answer: str | None = None,
        documents: bool = True,
        **response_kwargs: Any,
    ) -> list[ChatMessage]:
        """The messages for the model: the template, with each text as a document.

        Args:
            query_str: the question.
            texts: the texts of this round.
            answer: the answer of the previous round; None in the first round.
            documents: mark each text as a document. False: the texts are plain text.
            **response_kwargs: further variables of the template.
        """
        if answer is None:
            template, context, variables = self._text_qa_template, "context_str", response_kwargs
        else:
            template, context = self._refine_template, "context_msg"
            variables = {**response_kwargs, "existing_answer": answer}

        def rendered(shown: str) -> list[ChatMessage]:
            return self.cag._get_messages(template, query_str=query_str, **{context: shown}, **variables)

        texts = _listed(texts)
        joined = "\n\n".join(text.strip() for text in texts)
        as_text = rendered(joined)
        if not documents:
            return as_text
        marked = rendered(CONTEXT)
        if [_replaced(message, joined) for message in marked] != as_text:
            warnings.warn(
                f"the template changes {{{context}}} by a function or a filter, so the caches of the documents cannot "
                "be used. Remove the function or filter, and change the documents before they are ingested.",
                CacheWarning,
                stacklevel=2,
            )
            return as_text
        return _place(marked, texts, exact=self.exact)

    # --- rounds ------------------------------------------------------------------------------------------------

    def _rounds(self, query_str: str, text_chunks: Sequence[str], response_kwargs: dict[str, Any]) -> list[list[str]]:
        """The texts of each round: one round if all texts fit, no round if there are no texts."""
        texts = [text for text in _listed(text_chunks) if text.strip()]
        if self._order == "canonical":
            texts.sort()
        if not texts or self._room(query_str, texts, None, response_kwargs) >= 0:
            return [texts] if texts else []
        answer_tokens = self.cag.metadata.num_output
        room = min(
            self._room(query_str, [], None, response_kwargs),
            self._room(query_str, [], "", response_kwargs) - answer_tokens,
        )
        if room <= 0:
            return [texts]  # the question alone is too long: the engine raises an error with the token counts
        rounds = _grouped(self._split(texts, room), room)
        warnings.warn(
            f"{len(texts)} documents do not fit into the model's context of {self.cag.metadata.context_window} tokens "
            f"together and are read in {len(rounds)} rounds. Retrieve fewer documents, or lower max_new_tokens.",
            RoundsWarning,
            stacklevel=5,
        )
        return [[text for text, _ in each] for each in rounds]

    def _room(self, query_str: str, texts: list[str], answer: str | None, response_kwargs: dict[str, Any]) -> int:
        """The number of tokens that remain free in the context. Negative if the texts and the answer do not fit."""
        messages = self.messages(query_str, texts, answer, **response_kwargs)
        about = self.cag.metadata
        return about.context_window - about.num_output - self.cag.count_tokens(messages)

    def _split(self, texts: list[str], room: int) -> list[tuple[str, int]]:
        """The texts with their token counts. A text that is longer than a round is cut between words."""
        encode = self.cag.engine.template.encode
        sized = [(text, len(encode(segment(text)))) for text in texts]
        if all(size <= room for _, size in sized):
            return sized
        cut = TokenTextSplitter(chunk_size=max(room - 2, 1), chunk_overlap=0, tokenizer=lambda text: list(encode(text)))
        pieces = [piece for text, size in sized for piece in ([text] if size <= room else cut.split_text(text))]
        return [(piece, len(encode(segment(piece)))) for piece in pieces]


def _place(messages: Sequence[ChatMessage], texts: Sequence[str], *, exact: bool = False) -> list[ChatMessage]:
    """Replace the first `CONTEXT` with a block for each document, and every further `CONTEXT` with their plain text.

    The plain text is that of LlamaIndex: documents with a blank line between them. With `exact` they are one document.
    """
    shown = "\n\n".join(text.strip() for text in texts)
    documents = [shown] if exact and not any(map(_GENERATED.match, texts)) else list(texts)
    placed: list[ChatMessage] = []
    pending = True
    for message in messages:
        blocks: list[ContentBlock] = []
        for block in message.blocks:
            if not isinstance(block, TextBlock) or CONTEXT not in block.text:
                blocks.append(block)
                continue
            before, _, after = block.text.partition(CONTEXT)
            after = after.replace(CONTEXT, shown)
            if pending:
                blocks += _blocks(before, documents, after, exact)
                pending = False
            else:
                blocks.append(TextBlock(text=f"{before}{shown}{after}"))
        placed.append(message.model_copy(update={"blocks": blocks}))
    return placed


def _blocks(before: str, documents: Sequence[str], after: str, exact: bool) -> list[ContentBlock]:
    """Content blocks with the text of `before`, the documents and `after`, and a cache point after each document."""
    if exact:  # tokenizers join a space with the word after it, so the space must be in the document
        stripped = before.rstrip(" ")
        documents, before = [before[len(stripped) :] + documents[0], *documents[1:]], stripped
    blocks: list[ContentBlock] = []
    if before:
        blocks += [TextBlock(text=before[:-1])] if before.endswith("\n") else [TextBlock(text=before), JOINED]
    for at, text in enumerate(documents):
        label = None if exact else _LABEL.match(text)
        if label:
            blocks.append(TextBlock(text=label[0][:-1]))
            text = text[label.end() :].removesuffix("\n")
        generated = _GENERATED.match(text)
        text = text.strip() if generated else text
        if at < len(documents) - 1:
            blocks += document_blocks(text)[: 1 if generated else 2]
            continue
        blocks += [TextBlock(text=text)] if generated else [TextBlock(text=text), DOCUMENT_END]
        if text.endswith("\n") or after[:1] not in ("", "\n"):
            blocks.append(JOINED)
        else:
            after = after.removeprefix("\n")
    return [*blocks, TextBlock(text=after)] if after else blocks


def _replaced(message: ChatMessage, context: str) -> ChatMessage:
    """The message with `CONTEXT` replaced by the context."""
    blocks = [
        TextBlock(text=block.text.replace(CONTEXT, context)) if isinstance(block, TextBlock) else block
        for block in message.blocks
    ]
    return message.model_copy(update={"blocks": blocks})


_Sized: TypeAlias = tuple[str, int]


def _grouped(sized: list[_Sized], room: int) -> list[list[_Sized]]:
    """Group the texts into rounds, in order. Each round has as many texts as fit."""
    rounds: list[list[_Sized]] = [[]]
    for text, size in sized:
        if rounds[-1] and sum(size for _, size in rounds[-1]) + size > room:
            rounds.append([])
        rounds[-1].append((text, size))
    return rounds


def _listed(texts: str | Sequence[str]) -> list[str]:
    """A str is one text, and not its characters."""
    return [texts] if isinstance(texts, str) else list(texts)


def _said(response: ChatResponse) -> str:
    return response.message.content or ""


def _deltas(responses: ChatResponseGen) -> Generator[str, None, None]:
    with closing(responses):
        for response in responses:
            if response.delta:
                yield response.delta
