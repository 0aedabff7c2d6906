"""CAGQueryEngine: a query engine over a whole corpus, or over a retriever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.llms import LLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle

from kvcag.cube.memory_cube import MemoryCube
from kvcag.errors import InvalidInputError
from kvcag.llama_index.cube import CubeRetriever
from kvcag.llama_index.llm import KVCacheLLM
from kvcag.llama_index.synthesizer import CAGSynthesizer


class WholeCorpus(BaseRetriever):
    """Retrieves every document, always in the same order: whole-corpus CAG needs no index.

    Args:
        documents: documents or nodes.
    """

    def __init__(self, documents: Sequence[BaseNode], callback_manager: CallbackManager | None = None) -> None:
        self.documents = list(documents)
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=document) for document in self.documents]


class CAGQueryEngine(RetrieverQueryEngine):
    """A `RetrieverQueryEngine` over caches; see `from_documents`, `from_retriever` and `from_memory`."""

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[BaseNode],
        llm: LLM | None = None,
        *,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
        **synthesizer: Any,
    ) -> CAGQueryEngine:
        """Over a whole corpus: every question is answered from all documents, which are encoded once.

        They always stand in the same order, so they are one exact prefix, and the answer is that of a full prefill;
        `exact=False` keeps each by itself, so that a corpus that changes a little is encoded again only in part.

        Args:
            documents: documents or nodes; small enough together for the model's context.
            llm: a `KVCacheLLM`; `Settings.llm` by default.
            node_postprocessors: applied to every question's documents.
            callback_manager: where events go.
            **synthesizer: further arguments of `CAGSynthesizer`.

        Raises:
            InvalidInputError: there are no documents.
        """
        if not documents:
            raise InvalidInputError("there are no documents: pass at least one")
        corpus = WholeCorpus(documents, callback_manager)
        synthesizer = {"exact": True, **synthesizer}
        return cls.from_retriever(
            corpus, llm, node_postprocessors=node_postprocessors, callback_manager=callback_manager, **synthesizer
        )

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
        """Over any retriever. Arguments as for `from_documents`."""
        return cls(
            retriever=retriever,
            response_synthesizer=CAGSynthesizer(llm, callback_manager=callback_manager, **synthesizer),
            node_postprocessors=node_postprocessors,
            callback_manager=callback_manager,
        )

    @classmethod
    def from_memory(
        cls,
        memory: MemoryCube,
        llm: LLM | None = None,
        *,
        k: int | None = None,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
        **synthesizer: Any,
    ) -> CAGQueryEngine:
        """Over a `MemoryCube`: what it finds for a question, which follows its texts, answered from its caches.

        Args:
            memory: the cube. Under its strategy `"exact"` the nodes of a question are kept together.
            llm: a `KVCacheLLM`; one over the cube's own engine and caches by default.
            k: the most nodes; None is the cube's own setting.
            node_postprocessors: applied to every question's nodes.
            callback_manager: where events go.
            **synthesizer: further arguments of `CAGSynthesizer`.
        """
        retriever = CubeRetriever(memory, k, callback_manager)
        synthesizer = {"exact": memory.strategy == "exact", **synthesizer}
        return cls.from_retriever(
            retriever,
            llm or KVCacheLLM(memory=memory),
            node_postprocessors=node_postprocessors,
            callback_manager=callback_manager,
            **synthesizer,
        )
