"""CAGQueryEngine: a query engine over a whole corpus, or over a retriever."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.llms import LLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle, TextNode

from kvcag.cube.memory_cube import MemoryCube
from kvcag.documents import documents_of, text_and_metadata
from kvcag.errors import InvalidInputError
from kvcag.llama_index.cube import CubeRetriever
from kvcag.llama_index.llm import KVCacheLLM
from kvcag.llama_index.synthesizer import CAGSynthesizer


class WholeCorpus(BaseRetriever):
    """Retrieves every document, always in the same order.

    Args:
        documents: documents, nodes or texts. A str is one document.
    """

    def __init__(self, documents: object, callback_manager: CallbackManager | None = None) -> None:
        self.documents = [_node(document) for document in documents_of(documents)]
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=document) for document in self.documents]


class CAGQueryEngine(RetrieverQueryEngine):
    """A `RetrieverQueryEngine` that answers from cached documents.

    Make one with `from_documents`, `from_retriever` or `from_memory`.
    """

    @classmethod
    def from_retriever(
        cls,
        retriever: BaseRetriever,
        llm: LLM | None = None,
        *,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
        **synthesizer: Any,
    ) -> CAGQueryEngine:
        """A query engine over any retriever.

        Args:
            retriever: finds the nodes for a question.
            llm: a `KVCacheLLM`; `Settings.llm` by default.
            node_postprocessors: applied to the nodes of every question.
            callback_manager: receives the events.
            **synthesizer: further arguments of `CAGSynthesizer`.

        Raises:
            InvalidInputError: the llm is not a `KVCacheLLM`.
        """
        return cls(
            retriever=retriever,
            response_synthesizer=CAGSynthesizer(llm, callback_manager=callback_manager, **synthesizer),
            node_postprocessors=node_postprocessors,
            callback_manager=callback_manager,
        )

    @classmethod
    def from_documents(cls, documents: object, llm: LLM | None = None, **settings: Any) -> CAGQueryEngine:
        """A query engine over a whole corpus: it answers every question from all documents, in the same order.

        By default the documents are encoded together as one, and the answer is that of a full prefill. With
        `exact=False` each document is encoded on its own, so that after an edit only the edited document is encoded
        again.

        Args:
            documents: documents, nodes or texts that fit into the model's context together. A str is one document.
            llm: a `KVCacheLLM`; `Settings.llm` by default.
            **settings: as for `from_retriever`.

        Raises:
            InvalidInputError: there are no documents, or the llm is not a `KVCacheLLM`.
        """
        corpus = WholeCorpus(documents, settings.get("callback_manager"))
        if not corpus.documents:
            raise InvalidInputError("there are no documents: pass at least one")
        return cls.from_retriever(corpus, llm, **{"exact": True, **settings})

    @classmethod
    def from_memory(
        cls, memory: MemoryCube, llm: LLM | None = None, *, k: int | None = None, **settings: Any
    ) -> CAGQueryEngine:
        """A query engine over a `MemoryCube`, which finds the nodes for a question and stores their caches.

        Args:
            memory: the cube. With the cube's strategy `"exact"`, the nodes of a question are one document.
            llm: a `KVCacheLLM`; by default one with the cube's engine and caches.
            k: the maximum number of nodes per question. None: the cube's own setting.
            **settings: as for `from_retriever`.
        """
        retriever = CubeRetriever(memory, k, settings.get("callback_manager"))
        settings = {"exact": memory.strategy == "exact", **settings}
        return cls.from_retriever(retriever, llm or KVCacheLLM(memory=memory), **settings)


def _node(document: object) -> BaseNode:
    return document if isinstance(document, BaseNode) else TextNode(text=text_and_metadata(document)[0])
