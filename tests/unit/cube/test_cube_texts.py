"""The texts of a cube in real vector stores, retrievers, indexes and docstores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import SummaryIndex, VectorStoreIndex
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.retrievers.bm25 import BM25Retriever

from kvcag import HFEngine, MemoryCube, langchain, llama_index
from kvcag.core import TextualMemoryItem
from kvcag.cube.texts import SearchableTexts, TextSide, distinct, is_made_of, read, stripped
from kvcag.errors import CorpusLengthError, InvalidInputError
from kvcag.testing import EchoEngine
from tests.cube_sides import Embedding
from tests.retrievers import BM25, HashedWords

TOWER = TextualMemoryItem(id="tower", memory="The tower is made of iron.", metadata={"page": 1})
BRIDGE = TextualMemoryItem(id="bridge", memory="The bridge is made of steel.", metadata={"page": 2})
HOUSE = TextualMemoryItem(id="house", memory="A house of wood stands by the lake.")
QUESTION = "Which tower is made of iron?"


class StrictStore(InMemoryVectorStore):
    """Like FAISS, refuses to add existing texts and to delete missing texts."""

    def add_documents(self, documents: list[Document], ids: list[str] | None = None, **kwargs: Any) -> list[str]:
        if set(ids or ()) & self.store.keys():
            raise ValueError("duplicate ids")
        return super().add_documents(documents, ids, **kwargs)

    def delete(self, ids: Sequence[str] | None = None, **kwargs: Any) -> None:
        if set(ids or ()) - self.store.keys():
            raise ValueError("unknown ids")
        super().delete(ids)


class PlainStore(InMemoryVectorStore):
    """A vector store that cannot look up its texts."""

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        raise NotImplementedError


def bm25_nodes(nodes: list[Any]) -> BM25Retriever:
    return BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=min(2, len(nodes)))


SIDES: dict[str, Callable[[], TextSide]] = {
    "memory": lambda: langchain.VectorStoreTexts(InMemoryVectorStore(HashedWords()), k=2),
    "strict": lambda: langchain.VectorStoreTexts(StrictStore(HashedWords()), k=2),
    "plain": lambda: langchain.VectorStoreTexts(PlainStore(HashedWords()), k=2),
    "bm25": lambda: langchain.BuiltRetrieverTexts(lambda documents: BM25(documents=documents, k=2)),
    "index": lambda: llama_index.IndexTexts(VectorStoreIndex([], embed_model=Embedding()), similarity_top_k=2),
    "nodes-bm25": lambda: llama_index.BuiltRetrieverTexts(bm25_nodes),
}


@pytest.fixture(params=SIDES)
def searched(request: pytest.FixtureRequest, tiny_engine: HFEngine) -> MemoryCube:
    cube = MemoryCube(tiny_engine, SIDES[request.param]())
    cube.add([TOWER, BRIDGE, HOUSE])
    return cube


def kept_texts(cube: MemoryCube) -> list[str]:
    manifests = map(cube.memory.store.manifest, cube.memory.store.keys())
    return sorted(manifest.records.composed_text_memory.strip("\n") for manifest in manifests if manifest)


# --- every place that can be searched --------------------------------------------------------------------------------


def test_the_best_texts_answer(searched: MemoryCube) -> None:
    found = searched.search(QUESTION)
    assert found[0] == TOWER
    assert len(found) == 2
    assert searched.search(QUESTION, k=1) == [TOWER]
    answer = searched.ask(QUESTION, k=1, max_new_tokens=3)
    assert answer.sources == [TOWER]
    assert (answer.side, answer.encoded) == ("encoded", ("tower",))
    assert searched.ask(QUESTION, k=1, max_new_tokens=3).side == "prefix"  # one text, just behind the head
    assert kept_texts(searched) == [TOWER.memory]


def test_an_edit_is_found_and_the_old_text_is_not(searched: MemoryCube) -> None:
    searched.encode()
    searched.edit("tower", "The tower is made of glass now.")
    found = searched.search("glass tower made now", k=1)
    assert [(text.id, text.memory) for text in found] == [("tower", "The tower is made of glass now.")]
    assert TOWER.memory not in kept_texts(searched)
    assert BRIDGE.memory in kept_texts(searched)


def test_a_deletion_is_not_found(searched: MemoryCube) -> None:
    searched.encode()
    searched.delete(["tower", "nothing"])
    assert "tower" not in [text.id for text in searched.search(QUESTION)]
    assert TOWER.memory not in kept_texts(searched)
    searched.delete(["bridge", "house"])
    assert searched.search(QUESTION) == []
    assert kept_texts(searched) == []


def test_a_dump_fills_an_empty_place_elsewhere(searched: MemoryCube, tmp_path: Any, request: Any) -> None:
    searched.encode()
    searched.dump(tmp_path)
    side = SIDES[request.node.callspec.params["searched"]]()
    other = MemoryCube.from_dir(tmp_path, searched.memory.engine, side)
    assert other.search(QUESTION)[0] == TOWER
    assert other.ask(QUESTION, max_new_tokens=2).encoded == ()
    MemoryCube.from_dir(tmp_path, searched.memory.engine, side)  # and a place that holds it all already


def test_too_many_found_says_to_ask_for_fewer() -> None:
    cube = MemoryCube(EchoEngine(context_length=100), SIDES["memory"]())
    cube.add([TextualMemoryItem(id=str(n), memory=f"Note {n} {'x' * 60}") for n in range(3)])
    with pytest.raises(CorpusLengthError, match=r"2 texts that were found.*smaller k"):
        cube.ask("Note?", max_new_tokens=1)


# --- what others keep ------------------------------------------------------------------------------------------------


def test_a_store_that_was_filled_before_is_followed(tiny_engine: HFEngine) -> None:
    vectors = InMemoryVectorStore(HashedWords())
    vectors.add_documents([Document(TOWER.memory, metadata={"page": 1})], ids=["tower"])
    cube = MemoryCube(tiny_engine, langchain.VectorStoreTexts(vectors))
    assert cube.ask(QUESTION, max_new_tokens=2).sources == [TOWER]
    assert cube.get_all() == [TOWER]
    vectors.add_documents([Document("The tower is of glass.")], ids=["tower"])  # behind the cube's back
    assert cube.search(QUESTION)[0].memory == "The tower is of glass."
    assert kept_texts(cube) == []  # the cache of the old text went when the change was seen
    assert cube.get("tower").memory == "The tower is of glass."


def test_an_unchanged_text_is_not_embedded_again(tiny_engine: HFEngine) -> None:
    class Counting(HashedWords):
        embedded = 0

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            self.embedded += len(texts)
            return super().embed_documents(texts)

    embedding = Counting()
    side = langchain.VectorStoreTexts(InMemoryVectorStore(embedding))
    MemoryCube(tiny_engine, side).add([TOWER, BRIDGE])
    MemoryCube(tiny_engine, side).add([TOWER, BRIDGE, HOUSE])
    assert embedding.embedded == 3


@pytest.mark.parametrize(
    "side",
    [
        langchain.RetrieverTexts(BM25(documents=[Document(text.memory) for text in (BRIDGE, HOUSE, TOWER)])),
        llama_index.RetrieverTexts(bm25_nodes([TextNode(text=text.memory) for text in (BRIDGE, HOUSE, TOWER)])),
    ],
)
def test_a_retriever_is_read_and_never_written(tiny_engine: HFEngine, side: TextSide) -> None:
    cube = MemoryCube(tiny_engine, side)
    found = cube.search(QUESTION, k=1)
    assert [text.memory for text in found] == [TOWER.memory]
    with pytest.raises(InvalidInputError, match="only reads"):
        cube.add(HOUSE)
    assert cube.get_all() == found
    cube.encode()
    cube.delete(found[0].id)
    assert kept_texts(cube) == []


def test_a_cube_beside_a_retriever_moves(tiny_engine: HFEngine, tmp_path: Any) -> None:
    """The retriever's texts are read-only."""
    retriever = BM25(documents=[Document(text.memory, id=text.id) for text in (BRIDGE, HOUSE, TOWER)], k=1)
    cube = MemoryCube(tiny_engine, langchain.RetrieverTexts(retriever))
    cube.ask(QUESTION, max_new_tokens=2)
    cube.dump(tmp_path)
    tiny_engine.prefixes.clear()
    moved = MemoryCube.from_dir(tmp_path, tiny_engine, langchain.RetrieverTexts(retriever))
    assert [text.id for text in moved.get_all()] == ["tower"]
    assert moved.ask(QUESTION, max_new_tokens=2).side == "prefix"


def test_a_retriever_is_built_again_only_when_texts_changed(tiny_engine: HFEngine) -> None:
    built: list[int] = []

    def build(documents: list[Document]) -> BM25:
        built.append(len(documents))
        return BM25(documents=documents)

    cube = MemoryCube(tiny_engine, langchain.BuiltRetrieverTexts(build))
    assert cube.search(QUESTION) == []
    cube.add([TOWER, BRIDGE])
    cube.search(QUESTION)
    cube.search(QUESTION)
    cube.add([TOWER])  # nothing new
    cube.search(QUESTION)
    cube.delete("bridge")
    cube.search(QUESTION)
    assert built == [2, 1]


def test_a_text_deleted_during_a_search_does_not_come_back(tiny_engine: HFEngine) -> None:
    class Slow(langchain.BuiltRetrieverTexts):
        """The best text is deleted after the search found it, and before the search returns."""

        def search(self, question: str, k: int | None) -> list[TextualMemoryItem]:
            found = super().search(question, k)
            cube.delete("tower")
            return found

    cube = MemoryCube(tiny_engine, Slow(lambda documents: BM25(documents=documents)))
    cube.add([TOWER, BRIDGE, HOUSE])
    assert "tower" not in [text.id for text in cube.search(QUESTION)]
    assert "tower" not in [text.id for text in cube.get_all()]


def test_a_docstore_is_the_whole_corpus_and_is_followed(tiny_engine: HFEngine) -> None:
    docstore = SimpleDocumentStore()
    docstore.add_documents([TextNode(id_="tower", text=TOWER.memory, metadata={"page": 1})])
    cube = MemoryCube(tiny_engine, llama_index.DocstoreTexts(docstore))
    assert not isinstance(cube.texts, SearchableTexts)
    cube.add(BRIDGE)
    assert [text.id for text in cube.search("anything")] == ["tower", "bridge"]
    assert cube.get("tower").memory == "page: 1\n\nThe tower is made of iron."  # as the LLM would read it
    assert cube.encode() == 2
    docstore.add_documents([TextNode(id_="tower", text="The tower is of glass.")])  # by somebody else
    docstore.delete_document("bridge")
    assert [text.memory for text in cube.get_all()] == ["The tower is of glass."]
    assert kept_texts(cube) == []
    cube.delete("tower")
    assert docstore.docs == {}


def test_any_index_will_do(tiny_engine: HFEngine) -> None:
    cube = MemoryCube(tiny_engine, llama_index.IndexTexts(SummaryIndex([])))
    cube.add([TOWER, BRIDGE])
    cube.delete("tower")
    assert cube.search("anything") == [BRIDGE]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_node_is_read_as_the_llm_would_and_a_document_as_its_content() -> None:
    node = TextNode(id_="n", text="Text.", metadata={"title": "T", "hidden": 1}, excluded_llm_metadata_keys=["hidden"])
    assert read(NodeWithScore(node=node)) == read(node)
    assert read(node).memory == "title: T\n\nText."
    assert read(node).id == "n"
    document = read(Document("Text.", metadata={"title": "T"}))
    assert (document.memory, document.metadata) == ("Text.", {"title": "T"})
    assert document.id == read(Document("Text.")).id != read(Document("Other.")).id
    assert read(Document("Text.", id="given")).id == "given"


def test_a_text_goes_through_either_framework_unchanged() -> None:
    for text in (TOWER, HOUSE):
        assert read(langchain.cube.document_of(text)) == text
        assert read(llama_index.cube.node_of(text)) == text


def test_texts_that_share_an_id_are_both_answered_from(tiny_engine: HFEngine) -> None:
    chunks = [Document("First chunk about iron.", id="x"), Document("Second chunk about iron.", id="x")]
    cube = MemoryCube(tiny_engine, langchain.RetrieverTexts(BM25(documents=[*chunks, chunks[0]], k=3)))
    answer = cube.ask("iron chunk?", max_new_tokens=2)
    assert sorted(text.memory for text in answer.sources) == sorted(chunk.page_content for chunk in chunks)
    assert [text.memory for text in distinct(map(read, [*chunks, *chunks]))] == [c.page_content for c in chunks]


paragraphs = st.lists(st.text("ab\n", min_size=1, max_size=6).filter(lambda text: text.strip()), max_size=5)


@given(paragraphs, st.data())
def test_a_text_joined_from_known_texts_is_made_of_them(texts: list[str], data: st.DataObject) -> None:
    known = {stripped(text) for text in texts}
    chosen: Iterable[str] = data.draw(st.lists(st.sampled_from(texts), min_size=1) if texts else st.just([]))
    together = "".join(f"{stripped(text)}\n\n" for text in chosen)
    assert is_made_of(together, known)
    assert not is_made_of(f"{together}c\n\n", known)
    assert not is_made_of(f"c{together}", known) or not together
