"""A document that one door encoded is found by every other door: nothing is encoded twice or kept twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from llama_index.core import Document as LlamaDocument
from llama_index.core.ingestion import IngestionPipeline

from kvcag import HFEngine, KVCacheMemory, MemoryCube
from kvcag.chat_template import Document as Part
from kvcag.core import MergeReport
from kvcag.langchain import ChatKVCAG, KVCAGMiddleware, create_cag_documents_chain
from kvcag.llama_index import CAGMemoryBlock, CAGSynthesizer, KVCacheLLM, KVCacheTransform
from kvcag.memory import insert_documents
from kvcag.testing import byte_tokenizer, tiny_model
from tests.commands import Kvcag, write
from tests.stored import AskedStore, documents_in

TEXTS = ["The tower was completed in 1889.", "The bridge ends here.\n\nIts keeper has a dog.", "A line of its own.\n"]
INSTRUCTION = "Answer from the notes."
QUESTION = "When was the tower completed?"
PROMPT = ChatPromptTemplate.from_messages([("system", "Use these passages.\n\n{context}"), ("human", "{input}")])

Put = Callable[[KVCacheMemory], object]
Ask = Callable[[KVCacheMemory], MergeReport | dict[str, Any]]


@pytest.fixture
def memory(tiny_engine: HFEngine) -> KVCacheMemory:
    return KVCacheMemory(tiny_engine, instruction=INSTRUCTION)


def chat_model(memory: KVCacheMemory) -> ChatKVCAG:
    return ChatKVCAG(memory=memory, max_tokens=2)


def llm(memory: KVCacheMemory) -> KVCacheLLM:
    return KVCacheLLM(memory=memory, max_new_tokens=2)


def documents() -> list[Document]:
    return [Document(text) for text in TEXTS]


def nodes() -> list[LlamaDocument]:
    return [LlamaDocument(text=text) for text in TEXTS]


# --- doors in ----------------------------------------------------------------------------------------------------


def extracted(memory: KVCacheMemory) -> None:
    memory.add([memory.extract(text) for text in TEXTS])


def textual(memory: KVCacheMemory) -> None:
    memory.add([memory.from_textual_memory(document) for document in documents()])


def kept(memory: KVCacheMemory) -> None:
    memory.keep(insert_documents("", [f"{text}\n\n" for text in TEXTS], [{"role": "user", "content": "…"}]))


def cube_of(memory: KVCacheMemory) -> MemoryCube:
    return MemoryCube(memory.engine, store=memory.store, instruction="Read this.")


def cubed(memory: KVCacheMemory) -> None:
    cube = cube_of(memory)
    cube.add(TEXTS)
    cube.encode()


def loaded(memory: KVCacheMemory, folder: Path) -> None:
    other = KVCacheMemory(HFEngine(tiny_model(), byte_tokenizer()))
    other.add(TEXTS)
    other.dump(folder)
    memory.load(folder)


PUTS: dict[str, Put] = {
    "extract": extracted,
    "from_textual_memory": textual,
    "add": lambda memory: memory.add(TEXTS),
    "add nodes": lambda memory: memory.add(nodes()),
    "sync": lambda memory: memory.sync(documents()),
    "keep": kept,
    "precompute": lambda memory: chat_model(memory).precompute(documents(), progress=False),
    "precompute for a prompt": lambda memory: chat_model(memory).precompute(documents(), PROMPT, progress=False),
    "ingestion": lambda memory: IngestionPipeline(transformations=[KVCacheTransform(llm(memory))]).run(nodes=nodes()),
    "cube": cubed,
}

# --- doors out ---------------------------------------------------------------------------------------------------


def documents_chain(memory: KVCacheMemory) -> dict[str, Any]:
    chain = create_cag_documents_chain(chat_model(memory), PROMPT, output_parser=RunnableLambda(lambda said: said))
    answer: AIMessage = chain.invoke({"context": documents(), "input": QUESTION})
    return answer.response_metadata["kvcag"]


def synthesizer(memory: KVCacheMemory) -> dict[str, Any]:
    model = llm(memory)
    asked = CAGSynthesizer(model).messages(QUESTION, [node.text for node in nodes()])
    return model.chat(asked).raw["usage"]["context"]


def cube(memory: KVCacheMemory) -> MergeReport:
    made = cube_of(memory)
    made.add(TEXTS)
    return made.ask(QUESTION, max_new_tokens=2).usage.context


def asked(memory: KVCacheMemory) -> MergeReport:
    return memory.ask(QUESTION, max_new_tokens=2).report


def in_messages(memory: KVCacheMemory) -> MergeReport:
    parts = [Part(f"{text}\n\n") for text in TEXTS]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": QUESTION}]
    return memory.ask(messages, max_new_tokens=2).report


ASKS: dict[str, Ask] = {
    "documents chain": documents_chain,
    "synthesizer": synthesizer,
    "cube": cube,
    "ask": asked,
    "messages": in_messages,
}


def check_found(memory: KVCacheMemory, ask: Ask) -> None:
    """Nothing but an instruction is encoded, and nothing is kept twice."""
    before = sorted(documents_in(memory.store))
    assert len(before) == len(TEXTS)
    assert {item.id for item in memory} == {item.content_key for item in memory} == set(before)
    memory.engine.prefixes.clear()  # only the store knows the documents
    report = ask(memory)
    made = report if isinstance(report, dict) else report.as_dict()
    tokens = sum(len(item.token_ids) for item in memory)
    instruction = made["context_tokens"] - tokens + len("\n\n")  # which a prompt may leave out after the last document
    assert 0 < instruction < 500
    assert made["encoded_tokens"] <= instruction
    assert sorted(documents_in(memory.store)) == before


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize("put", PUTS.values(), ids=PUTS)
def test_every_door_finds_what_every_other_encoded(memory: KVCacheMemory, put: Put, ask: Ask) -> None:
    put(memory)
    check_found(memory, ask)


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_every_door_finds_a_loaded_dump(memory: KVCacheMemory, ask: Ask, tmp_path: Path) -> None:
    loaded(memory, tmp_path / "dump")
    check_found(memory, ask)


@pytest.mark.parametrize("put", PUTS.values(), ids=PUTS)
def test_every_way_in_finds_what_a_question_encoded(memory: KVCacheMemory, put: Put) -> None:
    documents_chain(memory)
    before = sorted(documents_in(memory.store))
    written = {item.id: item.records.timestamp for item in memory}
    put(memory)
    assert sorted(documents_in(memory.store)) == before
    if put is not extracted and put is not textual:  # these encode the item before they add it
        assert {item.id: item.records.timestamp for item in memory} == written


def test_every_door_finds_what_the_command_line_encoded(kvcag: Kvcag, tmp_path: Path, tiny_folder: Path) -> None:
    for index, text in enumerate(TEXTS):
        write(tmp_path / "texts" / f"{index}.txt", text)
    ids = kvcag("encode", "texts/", "--json").json["ids"]
    engine = HFEngine.from_pretrained(tiny_folder, device="cpu")
    shown = [Document(text.strip()) for text in TEXTS]
    model = ChatKVCAG(engine=engine, store=tmp_path / "kv", max_tokens=2)
    assert sorted(model.precompute(shown, PROMPT, progress=False)) == sorted(ids)
    chain = create_cag_documents_chain(model, PROMPT, output_parser=RunnableLambda(lambda said: said))
    report = chain.invoke({"context": shown, "input": QUESTION}).response_metadata["kvcag"]
    assert report["encoded_tokens"] <= report["context_tokens"] - len("\n\n".join(text.strip() for text in TEXTS))
    assert sorted(documents_in(model.memory().store)) == sorted(ids)
    assert kvcag("encode", "texts/", "--json").json["encoded"] == 0


def test_the_first_document_is_computed_behind_another_instruction(memory: KVCacheMemory) -> None:
    memory.add(TEXTS)
    memory.engine.prefixes.clear()
    report = memory.merge(list(memory.get_by_ids(memory.add(TEXTS))), QUESTION, "rotate").report
    assert report.recomputed_tokens == 0
    memory.engine.prefixes.clear()
    made = documents_chain(memory)
    assert made["recomputed_tokens"] >= len(f"{TEXTS[0]}\n\n")


@pytest.mark.parametrize("text", TEXTS)
def test_a_document_has_the_same_tokens_at_every_door(memory: KVCacheMemory, text: str) -> None:
    [id] = memory.add(text)
    assert chat_model(memory).precompute(text, progress=False) == [id]
    assert [item.id for item in memory] == [id]
    KVCacheTransform(llm(memory))([LlamaDocument(text=text)])
    assert memory.sync(text).ids == [id]
    made = cube_of(memory)
    made.add(text)
    assert made.encode() == 0
    assert documents_in(memory.store) == [id]


def test_metadata_that_a_node_shows_is_part_of_its_text_at_every_door(memory: KVCacheMemory) -> None:
    node = LlamaDocument(
        text="It is red.", metadata={"title": "The bridge", "page": 3}, excluded_llm_metadata_keys=["page"]
    )
    [id] = memory.add(node)
    KVCacheTransform(llm(memory))([node])
    assert memory.sync([node]).ids == [id] == documents_in(memory.store)
    assert memory.get(id).records.composed_text_memory == "title: The bridge\n\nIt is red."


def test_a_str_is_one_document(memory: KVCacheMemory) -> None:
    model = chat_model(memory)
    assert len(model.precompute("ab cd", progress=False)) == 1
    assert model.create_context("ab cd") == model.create_context(["ab cd"]) == model.create_context(Document("ab cd"))
    assert [document.page_content for document in KVCAGMiddleware(corpus="ab cd").corpus] == ["ab cd"]
    assert CAGMemoryBlock(documents="ab cd").documents == ["ab cd"]
    synthesizer = CAGSynthesizer(llm(memory))
    assert synthesizer.messages("?", "ab cd") == synthesizer.messages("?", ["ab cd"])


def test_several_documents_are_looked_for_at_once() -> None:
    """A remote store answers many requests at a time."""
    store = AskedStore()
    memory = KVCacheMemory(HFEngine(tiny_model(), byte_tokenizer()), store, "Read this.")
    kept(memory)
    assert store.asked == [len(TEXTS)]
    cube = cube_of(memory)
    cube.add(TEXTS)
    cube.memory.engine.forget()
    store.asked.clear()
    cube.ask("What?", max_new_tokens=2)
    assert store.asked[0] == len(TEXTS)
