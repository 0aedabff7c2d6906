"""LangChain chains over real retrievers and real weights."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from kvcag import HFEngine
from kvcag.demo.corpus import python_topics
from kvcag.langchain import ChatKVCAG, create_cag_documents_chain
from kvcag.langchain.messages import to_messages
from kvcag.stores.memory import MemoryStore
from tests.retrievers import BM25, Faiss

TOPICS = [
    Document(topic.text, metadata={"title": topic.title}) for topic in python_topics(["break", "pass", "imaginary"])
]
PROMPT = ChatPromptTemplate.from_messages([("system", "Answer from:\n\n{context}"), ("human", "{input}")])
EXAMPLE = Path(__file__).parents[2] / "examples" / "langchain_rag_to_cag.py"


@torch.no_grad()
def uncached(engine: HFEngine, token_ids: tuple[int, ...], length: int) -> str:
    """What the bare model says, greedy, without any cache of ours."""
    ids = torch.tensor([token_ids])
    out = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=0
    )
    return engine.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_exact_answers_are_the_uncached_models_token_for_token(smollm2_engine: HFEngine) -> None:
    llm = ChatKVCAG(engine=smollm2_engine, max_tokens=16, merge_strategy="exact", store=MemoryStore())
    asked = [
        SystemMessage(["Answer from:\n\n", *(t.page_content + "\n\n" for t in TOPICS)]),
        HumanMessage("What is pass?"),
    ]
    expected = uncached(smollm2_engine, smollm2_engine.template.prompt(to_messages(asked), seams="none").token_ids, 16)
    cold, warm = llm.invoke(asked), llm.invoke(asked)
    assert (cold.text, warm.text) == (expected, expected)
    assert warm.response_metadata["kvcag"]["encoded_tokens"] == 0


@pytest.mark.parametrize("retriever", [BM25, Faiss])
def test_retrieval_is_the_same_and_documents_are_encoded_once(smollm2_engine: HFEngine, retriever: Any) -> None:
    llm = ChatKVCAG(engine=smollm2_engine, max_tokens=2, store=MemoryStore())
    found = retriever(documents=TOPICS, k=2)
    cag = create_retrieval_chain(found, create_cag_documents_chain(llm, PROMPT, output_parser=RunnablePassthrough()))
    rag = create_retrieval_chain(found, create_stuff_documents_chain(llm, PROMPT))
    encoded: dict[str, int] = {}
    for question in ('What does the "break" statement do?', "What does an imaginary literal yield?", "break or pass?"):
        state = cag.invoke({"input": question})
        assert state["context"] == rag.invoke({"input": question})["context"]
        report = state["answer"].response_metadata["kvcag"]
        new = [document for document in state["context"] if document.metadata["title"] not in encoded]
        assert (report["encoded_tokens"] > 20) == bool(new)
        encoded |= {document.metadata["title"]: 1 for document in new}


def test_recomputing_everything_gives_the_models_own_answer(smollm2_engine: HFEngine) -> None:
    given = {"context": TOPICS[::-1], "input": 'What does the "break" statement do?'}
    answers = [
        create_cag_documents_chain(
            ChatKVCAG(engine=smollm2_engine, max_tokens=8, merge_strategy=strategy, store=MemoryStore()), PROMPT
        ).invoke(given)
        for strategy in ("full", "exact")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("template", ["Answer from:\n\n{context}", "Question: {input} \nContext: {context} \nAnswer:"])
def test_exact_answers_are_the_stuff_chains(smollm2_engine: HFEngine, template: str) -> None:
    """The documents chain had 91 tokens where the stuff chain had 87, and one answer of six was another."""
    prompt = ChatPromptTemplate.from_messages([("system", template), ("human", "{input}")])
    llm = ChatKVCAG(engine=smollm2_engine, max_tokens=12, merge_strategy="exact", store=MemoryStore())
    identity: Any = RunnablePassthrough()
    cag, stuff = (
        make(llm, prompt, output_parser=identity) for make in (create_cag_documents_chain, create_stuff_documents_chain)
    )
    for question in ("What is pass?", "What does break do?", "What does an imaginary literal yield?"):
        given = {"context": TOPICS[::-1], "input": question}
        ours, theirs = cag.invoke(given), stuff.invoke(given)
        assert (ours.text, ours.usage_metadata["input_tokens"]) == (theirs.text, theirs.usage_metadata["input_tokens"])


def test_a_chat_over_a_corpus_reads_it_once(smollm2_engine: HFEngine) -> None:
    llm = ChatKVCAG(engine=smollm2_engine, max_tokens=12)
    chat = llm.bind(cached_content=llm.create_context(TOPICS, instruction="Answer from:"))
    history: list[Any] = []
    for question in ('What does "break" do?', "And pass?"):
        history.append(HumanMessage(question))
        answer = chat.invoke(history)
        assert isinstance(answer, AIMessage)
        report = answer.response_metadata["kvcag"]
        assert (report["mode"], report["encoded_tokens"], report["recomputed_tokens"]) == ("prefix", 0, 0)
        history.append(answer)
    new = answer.usage_metadata["input_tokens"] - answer.usage_metadata["input_token_details"]["cache_read"]
    assert new < 40  # the last question and what surrounds it; its own answer was kept as it was generated


@pytest.mark.filterwarnings("ignore")  # those of ChatHuggingFace and its pipeline, before the migration
def test_the_migration_example_runs_before_and_after(
    smollm2_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("langchain_huggingface")
    example = runpy.run_path(str(EXAMPLE))
    question = example["QUESTIONS"][0]
    chains = [example[name](str(smollm2_path), max_tokens=24) for name in ("before", "after")]
    states = [example["ask"](chain, question) for chain in chains]
    assert states[0]["context"] == states[1]["context"]
    assert all("ZeroDivisionError" in state["answer"] for state in states)
    for question, right in zip(example["QUESTIONS"][1:], ("execute a block", "NameError"), strict=True):
        assert right in example["ask"](chains[1], question)["answer"]
    source = EXAMPLE.read_text()
    body = {name: source.split(f"def {name}(")[1].split("\ndef ")[0].splitlines()[2:] for name in ("before", "after")}
    unmarked = [[line for line in lines if "# <-" not in line and line.strip()] for lines in body.values()]
    assert unmarked[0] == unmarked[1]  # what is not marked is the same
