"""A cube as the memory of LlamaIndex: its texts are found, its caches used and filled, and both follow."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory import Memory
from llama_index.core.schema import TextNode
from pydantic import ValidationError

from kvcag import HFEngine, KVCacheMemory, MemoryCube
from kvcag.errors import InvalidInputError
from kvcag.llama_index import CAGMemoryBlock, CAGQueryEngine, IndexTexts, KVCacheLLM
from kvcag.stores import MemoryStore
from tests.cube_sides import BRIDGE, TOWER, Embedding
from tests.stored import documents_in

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # `workflows`, which runs agents, reads deprecated ones
]


@pytest.fixture(autouse=True)
def _connections_go_with_their_test() -> Iterator[None]:
    """LlamaIndex's `Memory` does not close its database: collect it here, so that no other test gets its warning."""
    yield
    gc.collect()


def test_an_llm_answers_with_the_cubes_memory(cube: MemoryCube) -> None:
    assert KVCacheLLM(memory=cube).memory is cube.memory
    memory = KVCacheMemory(cube.memory.engine)
    assert KVCacheLLM(memory=memory).memory is memory
    with pytest.raises(InvalidInputError, match="Leave out store"):
        KVCacheLLM(memory=cube, store=MemoryStore())


def test_a_query_engine_answers_from_the_cube(cube: MemoryCube) -> None:
    engine = CAGQueryEngine.from_memory(cube)
    response = engine.query("Of what is the tower made?")
    assert [node.node.node_id for node in response.source_nodes] == ["tower", "bridge"]
    assert len(documents_in(cube.memory.store)) == 2  # the caches that were there, and no others
    cube.delete("bridge")
    assert [node.node.node_id for node in engine.query("And now?").source_nodes] == ["tower"]


def test_nodes_of_an_index_are_encoded_as_the_synthesizer_asks_for_them(tiny_engine: HFEngine) -> None:
    index = VectorStoreIndex([], embed_model=Embedding())
    cube = MemoryCube(tiny_engine, IndexTexts(index, similarity_top_k=2))
    cube.add([TextNode(id_=text.id, text=text.memory, metadata={"title": text.id}) for text in (TOWER, BRIDGE)])
    cube.encode()
    kept = set(documents_in(cube.memory.store))
    engine = CAGQueryEngine.from_memory(cube, k=1)
    [found] = engine.query("Is the tower made of iron?").source_nodes
    assert found.node.get_content() == "title: tower\n\nThe tower is made of iron."
    assert found.node.metadata == {"title": "tower"}
    assert set(documents_in(cube.memory.store)) == kept


def test_an_exact_cube_is_an_exact_query_engine(tiny_engine: HFEngine) -> None:
    cube = MemoryCube(tiny_engine, strategy="exact")
    cube.add([TOWER, BRIDGE])
    llm = KVCacheLLM(memory=cube, max_new_tokens=4)
    engine = CAGQueryEngine.from_memory(cube, llm)
    engine.query("First?")
    [item] = cube.memory.get_all()
    assert TOWER.memory in item.records.composed_text_memory
    assert BRIDGE.memory in item.records.composed_text_memory
    cube.delete("bridge")
    assert cube.memory.get_all() == []


async def test_an_agents_memory_follows_the_cube(echo: MemoryCube) -> None:
    agent = FunctionAgent(tools=[], llm=KVCacheLLM(memory=echo, max_new_tokens=800), system_prompt="Be brief.")
    for shown in ("The tower is made of iron.", "The tower is of glass."):
        memory = Memory.from_defaults(memory_blocks=[CAGMemoryBlock(memory=echo)])
        said = (await agent.run("Which tower?", memory=memory)).response.content
        assert shown in said
        assert "Answer from the documents below." in said
        echo.edit("tower", "The tower is of glass.")


async def test_a_block_searches_by_the_last_user_message(tiny_engine: HFEngine) -> None:
    cube = MemoryCube(tiny_engine, IndexTexts(VectorStoreIndex([], embed_model=Embedding())), instruction="From notes:")
    cube.add([TOWER, BRIDGE])
    block = CAGMemoryBlock(memory=cube, k=1)
    turns = [ChatMessage(role="user", content="the bridge of steel"), ChatMessage(role="assistant", content="Yes.")]
    [message] = await block.aget(turns)
    assert (message.content or "").split() == ["From", "notes:", *BRIDGE.memory.split()]
    assert CAGMemoryBlock(memory=cube, instruction="Mine.").instruction == "Mine."


def test_a_block_takes_one_source_and_says_when_its_cube_is_gone(cube: MemoryCube) -> None:
    """pydantic's error came."""
    with pytest.raises(InvalidInputError, match=r"pass either documents or memory"):
        CAGMemoryBlock()
    with pytest.raises(InvalidInputError, match=r"pass either documents or memory"):
        CAGMemoryBlock(documents=["x"], memory=cube)
    with pytest.raises(InvalidInputError, match=r"^cannot read a text from int"):
        CAGMemoryBlock(documents=7)
    with pytest.raises(InvalidInputError, match=r"^instruction: Input should be a valid string"):
        CAGMemoryBlock(documents=["x"], instruction=7)
    written = CAGMemoryBlock(memory=cube).model_dump_json()
    assert "iron" not in written
    with pytest.raises(ValidationError, match="either documents or memory"):
        CAGMemoryBlock.model_validate_json(written)
