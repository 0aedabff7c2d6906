"""KVCacheTransform: runs again over edited and deleted documents, whose caches leave the store."""

from pathlib import Path

import pytest
from llama_index.core import Document
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.ingestion import DocstoreStrategy, IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore

from kvcag import HFEngine
from kvcag.errors import InvalidInputError
from kvcag.llama_index import CAGQueryEngine, CAGSynthesizer, KVCacheLLM, KVCacheTransform
from kvcag.stores.disk import DiskStore
from kvcag.testing import byte_tokenizer, tiny_model
from tests.stored import documents_in

TOWER = Document(text="The tower is 330 metres tall.", doc_id="tower")
BRIDGE = Document(text="The bridge is red.", doc_id="bridge")
RIVER = Document(text="The river is long.", doc_id="river")


def model(seed: int = 0) -> HFEngine:
    return HFEngine(tiny_model(seed=seed), byte_tokenizer())


class Ingestion:
    """A pipeline with a docstore, and caches on disk."""

    def __init__(self, path: Path, **transform: object) -> None:
        self.path = path
        self.llm = KVCacheLLM(engine=model(), store=path, max_new_tokens=4)
        self.docstore = SimpleDocumentStore()
        self.transform = KVCacheTransform(self.llm, docstore=self.docstore, **transform)
        self.pipeline = IngestionPipeline(
            transformations=[SentenceSplitter(), MockEmbedding(embed_dim=4), self.transform],
            docstore=self.docstore,
            vector_store=SimpleVectorStore(),
            docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
        )

    def run(self, *documents: Document) -> list[str]:
        """The texts that were encoded, in the order of the store."""
        before = self.texts()
        self.pipeline.run(documents=list(documents))
        return sorted(self.texts() - before)

    def texts(self) -> set[str]:
        store = DiskStore(self.path)
        manifests = [store.manifest(key) for key in documents_in(store)]
        return {manifest.records.composed_text_memory.strip() for manifest in manifests}

    def modified(self) -> dict[str, int]:
        """When each document's file was written."""
        files = {str(file): file.stat().st_mtime_ns for file in self.path.rglob("*.safetensors")}
        return {name: at for name, at in files.items() if ".instruction." not in name}


def test_only_changed_texts_are_encoded_again_and_deleted_texts_leave_the_store(tmp_path: Path) -> None:
    ingestion = Ingestion(tmp_path)
    assert ingestion.run(TOWER, BRIDGE, RIVER) == sorted(document.text for document in (TOWER, BRIDGE, RIVER))
    written = ingestion.modified()
    assert ingestion.run(TOWER, BRIDGE, RIVER) == []
    assert ingestion.modified() == written
    edited = Document(text="The bridge is green.", doc_id="bridge")
    assert ingestion.run(TOWER, edited, RIVER) == ["The bridge is green."]
    assert ingestion.texts() == {TOWER.text, edited.text, RIVER.text}
    assert len(ingestion.modified().items() & written.items()) == 2
    assert ingestion.run(TOWER) == []
    assert ingestion.texts() == {TOWER.text}
    ingestion.run(TOWER, RIVER)
    ingestion.run(TOWER)
    assert ingestion.texts() == {TOWER.text}


async def test_an_asynchronous_run_does_the_same(tmp_path: Path) -> None:
    ingestion = Ingestion(tmp_path)
    await ingestion.pipeline.arun(documents=[TOWER, BRIDGE])
    await ingestion.pipeline.arun(documents=[BRIDGE])
    assert ingestion.texts() == {BRIDGE.text}


def test_the_first_question_finds_ingested_documents(tmp_path: Path) -> None:
    ingestion = Ingestion(tmp_path)
    ingestion.run(TOWER, BRIDGE)
    llm = KVCacheLLM(engine=model(), store=tmp_path, max_new_tokens=4)
    messages = CAGSynthesizer(llm).messages("How tall?", [TOWER.text, BRIDGE.text])
    context = llm.chat(messages).raw["usage"]["context"]
    head = len(llm.engine.template.encode("x"))
    assert context["mode"] == "merged"
    assert context["reused_tokens"] >= len(TOWER.text) + len(BRIDGE.text) - context["recomputed_tokens"] - head


def test_a_deleted_store_behind_an_ingestion_hit_still_answers(tmp_path: Path) -> None:
    cache = IngestionCache()

    def ingest(path: Path) -> KVCacheLLM:
        llm = KVCacheLLM(engine=model(), store=path, max_new_tokens=8)
        IngestionPipeline(transformations=[KVCacheTransform(llm)], cache=cache).run(documents=[TOWER])
        return llm

    first, second = ingest(tmp_path / "kept"), ingest(tmp_path / "skipped")
    assert documents_in(second.memory.store) == []
    answers = [
        str(CAGQueryEngine.from_documents([TOWER], llm, exact=False).query("How tall?")) for llm in (first, second)
    ]
    assert answers[0] == answers[1]
    assert documents_in(first.memory.store) == documents_in(second.memory.store)


def test_another_model_or_template_is_another_transform(tmp_path: Path) -> None:
    """`IngestionCache` compares this JSON, which has no tensors."""
    llm = KVCacheLLM(engine=model())
    other = KVCacheLLM(engine=model(seed=1))
    prompted = CAGSynthesizer(KVCacheLLM(engine=llm.engine, system_prompt="Be kind."))
    made = [KVCacheTransform(llm), KVCacheTransform(other), KVCacheTransform(synthesizer=prompted)]
    assert len({each.to_json() for each in made}) == 3
    assert KVCacheTransform(llm).to_dict() == made[0].to_dict()
    assert len(made[0].to_json()) < 2000


def test_collections_share_a_store_and_forget_only_their_own(tmp_path: Path) -> None:
    one, two = Ingestion(tmp_path, collection="one"), Ingestion(tmp_path, collection="two")
    one.run(TOWER)
    two.run(BRIDGE)
    assert one.texts() == {TOWER.text, BRIDGE.text}
    assert two.run(RIVER) == [RIVER.text]
    assert one.texts() == {TOWER.text, RIVER.text}


def test_caches_of_other_prompts_with_a_deleted_text_are_deleted(tmp_path: Path) -> None:
    """Another prompt uses the item that was encoded after the first prompt's instruction."""
    ingestion = Ingestion(tmp_path)
    ingestion.run(TOWER, BRIDGE)
    kind = KVCacheLLM(engine=ingestion.llm.engine, store=tmp_path, system_prompt="Be kind.", max_new_tokens=2)
    CAGQueryEngine.from_documents([TOWER, BRIDGE], kind, exact=False).query("How tall?")
    assert len(ingestion.modified()) == 2
    ingestion.run(BRIDGE)
    assert ingestion.texts() == {BRIDGE.text}
    assert len(ingestion.modified()) == 1


def test_nodes_go_through_unchanged_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    nodes = [TextNode(text="  "), TextNode(text="Something.")]
    llm = KVCacheLLM(engine=model(), store=tmp_path)
    assert KVCacheTransform(llm)(nodes) == nodes
    assert len(documents_in(llm.memory.store)) == 1


def test_a_synthesizer_that_cannot_encode_node_by_node_is_refused() -> None:
    llm = KVCacheLLM(engine=model())
    with pytest.raises(InvalidInputError, match="one by one"):
        KVCacheTransform(synthesizer=CAGSynthesizer(llm, exact=True))
