"""A cube as the memory of LangChain: its texts are found, its caches used and filled, and both follow."""

from __future__ import annotations

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_classic.chains import create_retrieval_chain
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from langchain_core.vectorstores import InMemoryVectorStore

from kvcag import HFEngine, KVCacheMemory, MemoryCube
from kvcag.langchain import ChatKVCAG, CubeRetriever, KVCAGMiddleware, VectorStoreTexts, create_cag_documents_chain
from kvcag.stores import MemoryStore
from tests.cube_sides import BRIDGE, TOWER
from tests.retrievers import HashedWords


def test_a_chat_model_answers_with_the_cubes_engine_and_caches(cube: MemoryCube) -> None:
    llm = ChatKVCAG(memory=cube, max_tokens=4)
    assert llm.memory() is cube.memory
    assert (llm.namespace, llm.engine) == ("mine", cube.memory.engine)
    prompt = ChatPromptTemplate.from_messages([("system", "Answer from:\n\n{context}"), ("human", "{input}")])
    chain = create_retrieval_chain(
        CubeRetriever(cube=cube), create_cag_documents_chain(llm, prompt, output_parser=lambda message: message)
    )
    said = chain.invoke({"input": "Of what is the tower made?"})
    assert [document.id for document in said["context"]] == ["tower", "bridge"]
    report = said["answer"].response_metadata["kvcag"]
    assert report["encoded_tokens"] <= len(cube.memory.engine.template.encode("<|im_start|>system\nAnswer from:\n\n"))
    assert len(list(cube.memory.store.keys())) == 2  # nothing was encoded again


@pytest.mark.parametrize("cleanup", ["full", "incremental"])
def test_langchains_index_keeps_a_cube_in_step_with_a_source(tiny_engine: HFEngine, cleanup: Any) -> None:
    cube = MemoryCube(tiny_engine)
    retriever = CubeRetriever(cube=cube)
    records = InMemoryRecordManager(namespace="notes")
    records.create_schema()

    def index_into(*texts: str) -> Any:
        documents = [Document(text, metadata={"source": "notes.md"}) for text in texts]
        return index(documents, records, retriever, cleanup=cleanup, source_id_key="source", key_encoder="sha256")

    assert index_into(TOWER.memory, BRIDGE.memory)["num_added"] == 2
    assert cube.encode() == 2
    assert index_into(TOWER.memory, BRIDGE.memory)["num_skipped"] == 2
    changed = index_into(TOWER.memory, "The bridge is red.")
    assert (changed["num_added"], changed["num_deleted"], changed["num_skipped"]) == (1, 1, 1)
    assert {document.page_content for document in retriever.invoke("?")} == {TOWER.memory, "The bridge is red."}
    assert len(cube.memory) == 1  # the cache of the bridge's old text is gone
    ids = [document.id for document in retriever.invoke("?")]
    assert [document.id for document in retriever.get([*ids, "none"])] == ids


async def test_langchains_aindex_does_as_well(tiny_engine: HFEngine) -> None:
    retriever = CubeRetriever(cube=MemoryCube(tiny_engine))
    records = InMemoryRecordManager(namespace="notes")
    for texts, added, deleted in ((["one", "two"], 2, 0), (["two"], 0, 1)):
        documents = [Document(text) for text in texts]
        done = await aindex(documents, records, retriever, cleanup="full", key_encoder="sha256")
        assert (done["num_added"], done["num_deleted"]) == (added, deleted)
    assert [document.page_content for document in await retriever.ainvoke("?")] == ["two"]


def test_a_kv_memory_is_taken_as_well(tiny_engine: HFEngine) -> None:
    memory = KVCacheMemory(tiny_engine, instruction="Notes:")
    assert ChatKVCAG(memory=memory).memory() is memory


def test_arguments_that_a_memory_has_cannot_be_given_again(cube: MemoryCube) -> None:
    with pytest.raises(ValueError, match="Leave out store"):
        ChatKVCAG(memory=cube, store=MemoryStore())
    with pytest.raises(ValueError, match="a MemoryCube or a KVCacheMemory, not a str"):
        ChatKVCAG(memory="cube/")


def test_a_chat_model_with_a_cube_keeps_its_contract(cube: MemoryCube) -> None:
    llm = ChatKVCAG(memory=cube, max_tokens=4)
    assert "kept" not in llm._identifying_params
    assert llm._identifying_params == ChatKVCAG(engine=cube.memory.engine, max_tokens=4)._identifying_params
    changed = llm.configurable_fields(max_tokens=ConfigurableField(id="most")).with_config(configurable={"most": 2})
    assert changed.invoke("Hi").usage_metadata["output_tokens"] <= 2
    assert llm.model_copy().memory() is cube.memory


def test_an_agent_finds_the_cubes_present_texts(echo: MemoryCube) -> None:
    llm = ChatKVCAG(memory=echo, max_tokens=800)
    agent = create_agent(llm, system_prompt="Be brief.", middleware=[KVCAGMiddleware(memory=echo)])
    asked = {"messages": [HumanMessage("Which tower?")]}
    shown = "system: Be brief.\n\nThe tower is made of iron.\n\nThe bridge is made of steel.\n\n\nuser: Which tower?"
    assert agent.invoke(asked)["messages"][-1].text == shown
    echo.edit("tower", "The tower is of glass.")
    echo.delete("bridge")
    answer = agent.invoke(asked)["messages"][-1].text
    assert answer == "system: Be brief.\n\nThe tower is of glass.\n\n\nuser: Which tower?"


async def test_an_agent_retrieves_by_the_last_user_message(tiny_engine: HFEngine) -> None:
    cube = MemoryCube(tiny_engine, VectorStoreTexts(InMemoryVectorStore(HashedWords()), k=1))
    cube.add([TOWER, BRIDGE])
    agent = create_agent(ChatKVCAG(memory=cube, max_tokens=4), middleware=[KVCAGMiddleware(memory=cube)])
    for _ in range(2):
        said = (await agent.ainvoke({"messages": [HumanMessage("Is the bridge made of steel?")]}))["messages"][-1]
    report = said.response_metadata["kvcag"]
    assert (report["mode"], report["encoded_tokens"]) == ("prefix", 0)
    [item] = cube.memory.get_all()
    assert item.records.composed_text_memory == "The bridge is made of steel.\n\n"


def test_a_cube_that_keeps_texts_together_is_one_segment_for_an_agent(tiny_engine: HFEngine) -> None:
    cube = MemoryCube(tiny_engine, instruction="Be brief.", strategy="exact")
    cube.add([TOWER, BRIDGE])
    cube.encode()
    llm = ChatKVCAG(memory=cube, max_tokens=4)
    agent = create_agent(llm, system_prompt="Be brief.", middleware=[KVCAGMiddleware(memory=cube)])
    report = agent.invoke({"messages": [HumanMessage("Tower?")]})["messages"][-1].response_metadata["kvcag"]
    assert (report["mode"], report["encoded_tokens"], report["recomputed_tokens"]) == ("prefix", 0, 0)


def test_a_deletion_reaches_caches_that_a_chat_made(cube: MemoryCube) -> None:
    llm = ChatKVCAG(memory=cube, max_tokens=2)
    llm.invoke([("system", [{"type": "text", "text": f"Title: T\n{TOWER.memory}\n\n"}, {"type": "text", "text": "x"}])])
    llm.create_context([TOWER.memory, BRIDGE.memory])
    assert len([item for item in cube.memory.get_all() if TOWER.memory in item.records.composed_text_memory]) == 3
    cube.delete("tower")
    assert not [item for item in cube.memory.get_all() if "iron" in item.records.composed_text_memory]
