"""Documents that are encoded behind another document: found again, exact where they come first, and deleted with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from llama_index.core import Document as LlamaDocument
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import NodeRelationship, TextNode

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import _CONTINUES, contiguous_copy, layers_of
from kvcag.core import ids_digest
from kvcag.errors import InvalidInputError, UnsupportedModelError
from kvcag.langchain import ChatKVCAG
from kvcag.llama_index import CAGSynthesizer, KVCacheLLM, KVCacheTransform
from kvcag.stores import DiskStore
from kvcag.stores.base import ENCODED_BEHIND
from kvcag.testing import byte_tokenizer, tiny_model
from tests.commands import Kvcag, write
from tests.merging import equal

CHUNKS = ["The tower has three floors.", "Its keeper has a grey dog.", "The dog sleeps by the door."]
OTHER = "A boat lies in the harbour."


def chunks(texts: list[str] = CHUNKS, source: str = "tower.md") -> list[Document]:
    return [Document(text, metadata={"source": source}) for text in texts]


@pytest.fixture
def memory(tiny_engine: HFEngine, tmp_path: Path) -> KVCacheMemory:
    return KVCacheMemory(tiny_engine, DiskStore(tmp_path / "kv"), "Answer from the notes.")


def behind(memory: KVCacheMemory) -> dict[str, list[str]]:
    return {item.records.composed_text_memory: item.metadata.get(ENCODED_BEHIND, []) for item in memory.get_all()}


def test_a_chunk_is_encoded_behind_the_one_before_it_in_its_source(memory: KVCacheMemory) -> None:
    ids = memory.add([*chunks(CHUNKS[:2]), Document(OTHER, metadata={"source": "b.md"})], context="previous")
    head = memory.engine.template.instruction_ids(memory.instruction)
    first, second, other = memory.get_by_ids(ids)
    before = (*head, *first.token_ids.tolist())
    assert first.prefix_digest == other.prefix_digest == ids_digest(head)
    assert (second.prefix_digest, second.base_position) == (ids_digest(before), len(before))
    assert equal(layers_of(second.memory), memory.engine.encode_after(before, second.token_ids.tolist()))
    assert behind(memory) == {CHUNKS[0]: [], CHUNKS[1]: [CHUNKS[0], "tower.md"], OTHER: []}


@pytest.mark.parametrize("kind", ["function", "invoke", "retrieve"])
def test_a_retriever_names_what_short_texts_are_encoded_behind(memory: KVCacheMemory, kind: str) -> None:
    class Retrieves:
        def retrieve(self, text: str) -> list[object]:
            return [TextNode(text=text), TextNode(text=OTHER)]  # most similar to itself

    def similar(text: str) -> list[object]:
        return [Document(text), Document(OTHER)]

    retriever = {"function": similar, "invoke": RunnableLambda(similar), "retrieve": Retrieves()}[kind]
    memory.add(CHUNKS[:2], context=retriever)
    assert behind(memory) == {CHUNKS[0]: [OTHER], CHUNKS[1]: [OTHER]}
    with pytest.raises(InvalidInputError, match="'previous', a retriever"):
        memory.add(CHUNKS, context="next")


def test_nothing_is_encoded_behind_itself(memory: KVCacheMemory) -> None:
    memory.add([CHUNKS[0], CHUNKS[0]], context="previous")
    assert behind(memory) == {CHUNKS[0]: []}


def test_it_is_found_again_under_the_same_id_by_every_door(memory: KVCacheMemory) -> None:
    alone = [memory.extract(text).id for text in CHUNKS]
    ids = memory.add(chunks(), context="previous")
    assert ids == alone
    made = {item.id: item.records.timestamp for item in memory.get_all()}
    assert memory.add(chunks(), context="previous") == ids
    assert memory.add(CHUNKS) == ids
    assert memory.sync(chunks(), context="previous").encoded == 0
    assert memory.sync(CHUNKS).encoded == 0
    ChatKVCAG(memory=memory).precompute(chunks(), progress=False)
    assert {item.id: item.records.timestamp for item in memory.get_all()} == made
    answer = memory.ask("Who sleeps?", ids, strategy="query", max_new_tokens=2)
    assert answer.report.encoded_tokens == 0


def test_what_was_encoded_alone_is_encoded_again_in_its_place(memory: KVCacheMemory) -> None:
    memory.sync(CHUNKS, corpus="mine")
    before = memory.get_all()
    ids = memory.add(chunks(), context="previous")
    after = memory.get_all()
    assert [item.id for item in after] == [item.id for item in before] == ids
    assert [item.metadata.get(ENCODED_BEHIND, [None])[0] for item in after] == [None, CHUNKS[0], CHUNKS[1]]
    assert memory.sync([], corpus="mine").dropped == 3  # the corpus still knows its documents


def test_the_first_document_of_a_prompt_stays_exact(memory: KVCacheMemory) -> None:
    ids = memory.add(chunks(), context="previous")
    context = memory.merge([ids[2], ids[1]], "Who sleeps?", strategy="rotate")
    head = memory.engine.template.instruction_ids(memory.instruction)
    first, second = memory.get_by_ids([ids[2], ids[1]])
    start = len(head) + len(first.token_ids)
    right, _ = memory.engine.prefill(context.token_ids[:start].tolist(), namespace="another")
    held = [(keys[..., :start, :], values[..., :start, :]) for keys, values in layers_of(context.cache)]
    for merged, prefilled in zip(held, right, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(merged, prefilled, strict=True))
    assert 0 < context.report.recomputed_tokens <= len(first.token_ids)
    assert context.report.in_context_tokens == len(second.token_ids)
    again = memory.merge([ids[2], ids[1]], "Where?", strategy="rotate")
    assert again.report.recomputed_tokens == 0  # the first is a recent context now


def test_full_is_a_full_prefill(memory: KVCacheMemory) -> None:
    ids = memory.add(chunks(), context="previous")
    context = memory.merge(ids[::-1], "Who sleeps?", strategy="full")
    right, _ = memory.engine.prefill(context.token_ids.tolist(), namespace="another")
    for merged, prefilled in zip(layers_of(context.cache), right, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(merged, prefilled, strict=True))


def test_a_single_document_in_context_is_encoded_exactly_when_it_is_asked(memory: KVCacheMemory) -> None:
    ids = memory.add(chunks(), context="previous")
    context = memory.merge([ids[1]], "Who?", strategy="rotate")
    assert (context.report.mode, context.report.in_context_tokens) == ("prefix", 0)


def test_what_is_encoded_in_context_gets_no_usual_drift(memory: KVCacheMemory) -> None:
    """It has drifted already."""
    ids = memory.add(chunks(), context="previous")
    context = memory.merge([ids[0], ids[2]], "Who?", strategy="rotate")
    third = memory.get(ids[2])
    at = len(context.token_ids) - len(third.token_ids)
    for (_, values), (_, kept) in zip(layers_of(context.cache), layers_of(third.memory), strict=True):
        assert torch.equal(values[..., at:, :], kept)


def test_a_stored_document_does_not_change(memory: KVCacheMemory) -> None:
    ids = memory.add(chunks(), context="previous")
    before = [contiguous_copy(layers_of(item.memory)) for item in memory.get_all()]
    memory.merge(ids, "Who?", strategy="query", ratio=0.5)
    assert all(equal(layers_of(item.memory), was) for item, was in zip(memory.get_all(), before, strict=True))


def test_when_the_chunk_before_changes_the_next_one_is_encoded_again(memory: KVCacheMemory) -> None:
    memory.sync(chunks(), context="previous")
    edited = memory.sync(chunks(["The tower has four floors.", *CHUNKS[1:]]), context="previous")
    assert (edited.encoded, edited.kept, edited.dropped) == (2, 1, 1)
    assert behind(memory)[CHUNKS[1]] == ["The tower has four floors.", "tower.md"]
    cut = memory.sync(chunks(CHUNKS[1:]), context="previous")
    assert (cut.encoded, cut.dropped) == (1, 1)
    assert behind(memory) == {CHUNKS[1]: [], CHUNKS[2]: [CHUNKS[1], "tower.md"]}


def test_a_sync_that_drops_a_document_leaves_nothing_that_knows_it(memory: KVCacheMemory) -> None:
    memory.sync(chunks(), context="previous")
    report = memory.sync(chunks(CHUNKS[1:]))
    assert (report.encoded, report.kept, report.dropped) == (1, 1, 1)
    assert behind(memory)[CHUNKS[1]] == []


@pytest.mark.parametrize("named", [CHUNKS[0], "tower.md"])
def test_purge_reaches_what_was_encoded_behind_a_text(memory: KVCacheMemory, named: str, tmp_path: Path) -> None:
    ids = memory.add([*chunks(CHUNKS[:1]), Document(OTHER, metadata={"source": "b.md"})])
    ids += memory.add([CHUNKS[2]], context=lambda text: chunks(CHUNKS[:1]))
    memory.dump(tmp_path / "dump")
    report = memory.purge(named, dumps=[tmp_path / "dump"])
    assert set(report.ids) == {ids[0], ids[2]}
    assert list(behind(memory)) == [OTHER]


def test_a_textual_memory_may_name_what_stands_before_it(memory: KVCacheMemory) -> None:
    item = memory.from_textual_memory(chunks()[1], behind=chunks()[0])
    assert item.metadata == {"source": "tower.md", ENCODED_BEHIND: [CHUNKS[0], "tower.md"]}
    memory.add(item)
    assert memory.sync(chunks(), context="previous").encoded == 2


def test_a_chunk_before_that_is_too_long_is_cut_at_its_beginning(tiny_engine: HFEngine) -> None:
    memory = KVCacheMemory(tiny_engine)
    long = "x" * tiny_engine.context_length
    item = memory.from_textual_memory("A short text of its own.", behind=long)
    assert item.base_position + len(item.token_ids) == tiny_engine.context_length


@pytest.mark.skipif(not _CONTINUES, reason="recurrent layers need transformers 5.24")
def test_recurrent_models_refuse_before_anything_is_encoded() -> None:
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 4}
    memory = KVCacheMemory(HFEngine(tiny_model("qwen3_5_text", layer_types=kinds, **heads), byte_tokenizer()))
    for call in (memory.add, memory.sync):
        with pytest.raises(UnsupportedModelError, match="recurrent layers"):
            call(CHUNKS, context="previous")
    assert len(memory) == 0


def test_precompute_encodes_in_context(memory: KVCacheMemory) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Use these.\n\n{context}"), ("human", "{input}")])
    ChatKVCAG(memory=memory).precompute(chunks(), prompt, context="previous", progress=False)
    assert [names[:1] for names in behind(memory).values()] == [[], CHUNKS[:1], CHUNKS[1:2]]


def test_an_ingestion_pipeline_encodes_in_context(memory: KVCacheMemory) -> None:
    synthesizer = CAGSynthesizer(KVCacheLLM(memory=memory, max_new_tokens=2))
    transform = KVCacheTransform(synthesizer=synthesizer, context="previous")
    nodes = [TextNode(text=text) for text in CHUNKS]
    for node in nodes:
        node.relationships[NodeRelationship.SOURCE] = LlamaDocument(text="all", id_="tower").as_related_node_info()
    IngestionPipeline(transformations=[transform]).run(nodes=nodes)
    assert [len(names) for names in behind(memory).values()] == [0, 2, 2]
    assert transform.to_dict() != KVCacheTransform(synthesizer=synthesizer).to_dict()


def test_the_command_line_encodes_in_context(kvcag: Kvcag, tmp_path: Path) -> None:
    write(tmp_path / "notes" / "a.txt", "\n\n".join(CHUNKS * 8))
    first = kvcag("encode", "notes", "--split", "64", "--context", "previous", "--json")
    assert first.json["encoded"] > 2
    again = kvcag("encode", "notes", "--split", "64", "--context", "previous", "--json")
    assert again.json["encoded"] == 0
