"""One line on an existing chain or query engine, with real retrievers: what they find is counted and encoded ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_classic.chains import create_retrieval_chain
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.retrievers.bm25 import BM25Retriever

from kvcag import CacheScheduler, HFEngine
from kvcag.langchain import ChatKVCAG, KVCAGMiddleware, SchedulerCallback, create_cag_documents_chain
from kvcag.llama_index import CAGQueryEngine, KVCacheLLM, SchedulerEventHandler
from kvcag.stores.memory import MemoryStore
from tests.retrievers import BM25, Faiss

TEXTS = [
    "The lighthouse keeper wrote a letter every week.",
    "The tower of the harbour is painted red and white.",
    "Bread is baked in the village before dawn.",
    "A ferry leaves the harbour at nine.",
    "The keeper of the museum has the only key.",
]
QUESTION = "Who is the keeper of the lighthouse?"
PROMPT = ChatPromptTemplate.from_messages([("system", "Use:\n\n{context}"), ("human", "{input}")])


def documents() -> list[Document]:
    return [Document(text, id=f"doc-{number}", metadata={"number": number}) for number, text in enumerate(TEXTS)]


def shown(scheduler: CacheScheduler) -> set[str]:
    return {item.records.composed_text_memory for item in scheduler.memory.get_all()}


@pytest.fixture
def llm(tiny_engine: HFEngine) -> ChatKVCAG:
    return ChatKVCAG(engine=tiny_engine, max_tokens=4, store=MemoryStore())


@pytest.fixture
def scheduler(llm: ChatKVCAG) -> Iterator[CacheScheduler]:
    with CacheScheduler(llm.memory(), 1 << 20, every_s=None, quiet_s=0) as made:
        yield made


@pytest.mark.parametrize("retriever_class", [BM25, Faiss])
def test_a_langchain_retriever_is_watched(scheduler: CacheScheduler, retriever_class: type[BM25] | type[Faiss]) -> None:
    retriever = retriever_class(documents=documents(), k=2)
    watching: Any = {"callbacks": [SchedulerCallback(scheduler)]}
    found = [document.page_content for document in retriever.invoke(QUESTION, config=watching)]
    assert scheduler.run_once().promoted == []
    retriever.invoke(QUESTION, config=watching)
    assert len(scheduler.run_once().promoted) == 2
    assert shown(scheduler) == {f"{text}\n\n" for text in found}
    assert scheduler.metrics()["retrieved"] == 4


async def test_a_chain_is_watched_and_a_question_counts_once(llm: ChatKVCAG, scheduler: CacheScheduler) -> None:
    chain = create_retrieval_chain(BM25(documents=documents(), k=2), create_cag_documents_chain(llm, PROMPT))
    watched = chain.with_config(callbacks=[SchedulerCallback(scheduler)])
    first = watched.invoke({"input": QUESTION})
    assert (await watched.ainvoke({"input": QUESTION}))["answer"] == first["answer"]
    assert [document.id for document in first["context"]] == ["doc-0", "doc-4"]
    metrics = scheduler.metrics()
    assert (metrics["documents"], metrics["retrieved"], metrics["asked"]) == (2, 4, 4)
    assert {stats.count for stats in scheduler._texts.known.values()} == {2}
    for _ in range(2):
        scheduler.observe(documents()[1])
    [key] = scheduler.run_once().promoted  # after the chain's own instruction, which a question has shown
    item = llm.memory().get(key)
    assert item is not None
    assert item.prefix_digest in {other.prefix_digest for other in llm.memory().get_all() if other.id != key}


def test_documents_that_the_chain_renders_are_encoded_as_it_renders_them(
    llm: ChatKVCAG, scheduler: CacheScheduler
) -> None:
    rendering = PromptTemplate.from_template("[{number}] {page_content}")
    chain = create_retrieval_chain(
        BM25(documents=documents(), k=2), create_cag_documents_chain(llm, PROMPT, document_prompt=rendering)
    )
    chain.invoke({"input": QUESTION}, config={"callbacks": [SchedulerCallback(scheduler)]})  # seen in the prompt
    chain.invoke({"input": QUESTION}, config={"callbacks": [SchedulerCallback(scheduler)]})
    told = SchedulerCallback(scheduler, document_prompt=rendering)
    chain.invoke({"input": "When does the ferry leave the harbour?"}, config={"callbacks": [told]})
    assert shown(scheduler) == {f"[{number}] {TEXTS[number]}\n\n" for number in (0, 4, 3, 1)}
    assert scheduler.metrics()["documents"] == 4  # no text is counted in two forms
    scheduler.demote([item.id for item in llm.memory().get_all()])
    assert len(scheduler.run_once().promoted) == 2  # asked for twice
    assert shown(scheduler) == {f"[{number}] {TEXTS[number]}\n\n" for number in (0, 4)}


def test_an_edited_document_drops_its_cache(llm: ChatKVCAG, scheduler: CacheScheduler) -> None:
    watching: Any = {"callbacks": [SchedulerCallback(scheduler)]}
    edited = [*documents()[:4], Document("The keeper of the museum lost the key.", id="doc-4")]
    for corpus in (documents(), edited):
        chain = create_retrieval_chain(BM25(documents=corpus, k=2), create_cag_documents_chain(llm, PROMPT))
        chain.invoke({"input": QUESTION}, config=watching)
    report = scheduler.run_once()
    assert len(report.dropped) == 1
    assert shown(scheduler) == {f"{TEXTS[0]}\n\n", "The keeper of the museum lost the key.\n\n"}


def test_an_agents_middleware_is_watched(llm: ChatKVCAG, scheduler: CacheScheduler) -> None:
    agent = create_agent(llm, middleware=[KVCAGMiddleware(retriever=BM25(documents=documents(), k=2))])
    for _ in range(2):
        agent.invoke({"messages": [("user", QUESTION)]}, config={"callbacks": [SchedulerCallback(scheduler)]})
    metrics = scheduler.metrics()
    assert (metrics["documents"], metrics["retrieved"], metrics["asked"]) == (2, 4, 4)
    assert {stats.count for stats in scheduler._texts.known.values()} == {2}


def nodes() -> list[TextNode]:
    return [
        TextNode(text=text, id_=f"node-{number}", metadata={"page": number}, excluded_llm_metadata_keys=["window"])
        for number, text in enumerate(TEXTS)
    ]


@pytest.fixture
def index_llm(tiny_engine: HFEngine) -> KVCacheLLM:
    return KVCacheLLM(engine=tiny_engine, max_new_tokens=4, store=MemoryStore())


@pytest.fixture
def watched(index_llm: KVCacheLLM) -> Iterator[CacheScheduler]:
    with CacheScheduler(index_llm.memory, 1 << 20, every_s=None, quiet_s=0) as scheduler:
        handler = SchedulerEventHandler(scheduler)
        get_dispatcher().add_event_handler(handler)
        yield scheduler
        get_dispatcher().event_handlers.remove(handler)


async def test_a_llama_index_retriever_is_watched(index_llm: KVCacheLLM, watched: CacheScheduler) -> None:
    retriever = BM25Retriever.from_defaults(nodes=nodes(), similarity_top_k=2)
    found = await retriever.aretrieve(QUESTION)
    retriever.retrieve(QUESTION)
    assert len(watched.run_once().promoted) == 2
    assert {text.strip() for text in shown(watched)} == {one.node.get_content(MetadataMode.LLM) for one in found}


async def test_a_query_engine_is_watched_and_a_question_counts_once(
    index_llm: KVCacheLLM, watched: CacheScheduler
) -> None:
    retriever = BM25Retriever.from_defaults(nodes=nodes(), similarity_top_k=2)
    engine = CAGQueryEngine.from_retriever(retriever, index_llm)
    answer = str(engine.query(QUESTION))
    assert str(await asyncio.wait_for(engine.aquery(QUESTION), 30)) == answer
    metrics = watched.metrics()
    assert (metrics["documents"], metrics["retrieved"], metrics["asked"], metrics["kept"]) == (2, 4, 4, 2)
    assert {stats.count for stats in watched._texts.known.values()} == {2}
    for _ in range(2):
        retriever.retrieve("When is bread baked in the village?")
    before = shown(watched)
    promoted = watched.run_once().promoted
    assert promoted  # rendered as the synthesizer renders nodes, since questions have shown how
    asked = str(engine.query("When is bread baked in the village?"))
    assert asked
    assert watched.metrics()["kept"] == 2  # nothing had to be encoded for that question
    assert len(shown(watched)) == len(before) + len(promoted)


def test_a_postprocessor_that_shows_another_text_is_seen(index_llm: KVCacheLLM, watched: CacheScheduler) -> None:
    """Trap 13: a node's text is replaced by its window, under the same id."""
    windowed = nodes()
    for node in windowed:
        node.metadata = {"window": f"Before it. {node.text} After it."}
    engine = CAGQueryEngine.from_retriever(
        BM25Retriever.from_defaults(nodes=windowed, similarity_top_k=2),
        index_llm,
        node_postprocessors=[MetadataReplacementPostProcessor(target_metadata_key="window")],
    )
    for _ in range(2):
        engine.query(QUESTION)
    assert watched.metrics()["documents"] == 2
    watched.demote([item.id for item in index_llm.memory.get_all()])
    watched.run_once()
    assert {text.strip() for text in shown(watched)} == {f"Before it. {TEXTS[n]} After it." for n in (0, 4)}
    assert watched.run_once().dropped == []
