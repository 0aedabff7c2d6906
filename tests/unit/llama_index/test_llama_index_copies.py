"""Copies, JSON and pickles of the LLM, the synthesizer, the memory block and the transform."""

from __future__ import annotations

import json
import pickle
from copy import copy, deepcopy
from pathlib import Path

import pytest
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore

from kvcag import HFEngine
from kvcag.cube.memory_cube import MemoryCube
from kvcag.errors import InvalidInputError
from kvcag.llama_index import CAGMemoryBlock, CAGSynthesizer, KVCacheLLM, KVCacheTransform
from kvcag.stores.disk import DiskStore
from tests.stored import documents_in

TEXTS = ["The tower is 330 metres tall.", "It stands in Paris."]
FOUND = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]


@pytest.fixture
def named(tiny_folder: Path, tmp_path: Path) -> KVCacheLLM:
    """An LLM that another process can open too."""
    model_kwargs = {"template_variables": {"date_string": "today"}}
    return KVCacheLLM(tiny_folder, store=tmp_path / "kv", max_new_tokens=4, seed=7, model_kwargs=model_kwargs)


@pytest.fixture
def live(tiny_engine: HFEngine) -> KVCacheLLM:
    return KVCacheLLM(engine=tiny_engine, max_new_tokens=4)


def test_copies_of_an_llm_share_its_memory_and_have_settings_of_their_own(live: KVCacheLLM) -> None:
    for made in (copy(live), deepcopy(live), live.model_copy(update={"seed": 1}), live.model_copy(deep=True)):
        assert made.memory is live.memory
        made.max_new_tokens = 2
        assert made.complete("Hi").raw["usage"]["completion_tokens"] == 2
    assert live.max_new_tokens == 4


def test_an_llm_survives_dicts_json_and_pickles(named: KVCacheLLM) -> None:
    again = [
        KVCacheLLM.from_dict(named.to_dict()),
        KVCacheLLM.from_json(named.to_json()),
        KVCacheLLM.model_validate(named.model_dump()),
        KVCacheLLM.model_validate(named),
        KVCacheLLM.model_validate_json(json.dumps(named.model_dump(mode="json"))),
        pickle.loads(pickle.dumps(named)),
    ]
    for made in again:
        assert made.to_dict() == named.to_dict()
        assert made.complete("Hi").text == named.complete("Hi").text
        assert documents_in(made.memory.store) == documents_in(named.memory.store)
    assert again[-1].engine.template.variables == {"date_string": "today"}


@pytest.mark.parametrize("settings", [{"engine": True}, {"store": True}])
def test_loaded_objects_are_not_pickled(
    settings: dict[str, bool], tiny_engine: HFEngine, tiny_folder: Path, tmp_path: Path
) -> None:
    live = {"engine": tiny_engine, "store": DiskStore(tmp_path)}
    llm = KVCacheLLM("" if "engine" in settings else tiny_folder, **{name: live[name] for name in settings})
    with pytest.raises(InvalidInputError, match="cannot be sent to another process"):
        pickle.dumps(llm)
    with pytest.raises(InvalidInputError, match="cannot be sent"):
        pickle.dumps(CAGSynthesizer(llm))


def test_a_synthesizer_is_copied_and_pickled_with_its_templates(named: KVCacheLLM) -> None:
    synthesizer = CAGSynthesizer(named, text_qa_template=PromptTemplate("{context_str} {query_str}"), exact=True)
    answer = str(synthesizer.synthesize("How tall?", FOUND))
    for made in (copy(synthesizer), deepcopy(synthesizer), pickle.loads(pickle.dumps(synthesizer))):
        assert made.cag is made._llm
        assert str(made.synthesize("How tall?", FOUND)) == answer
    changed = deepcopy(synthesizer)
    changed.update_prompts({"text_qa_template": PromptTemplate("{query_str}")})
    assert str(synthesizer.synthesize("How tall?", FOUND)) == answer


async def test_a_memory_block_is_copied_with_its_cube(tiny_engine: HFEngine) -> None:
    cube = MemoryCube(tiny_engine)
    cube.add(TEXTS)
    block = CAGMemoryBlock(memory=cube, instruction="Look.")
    for made in (copy(block), deepcopy(block), block.model_copy(deep=True)):
        assert made.memory is cube
        assert await made.aget() == await block.aget()
    with pytest.raises(InvalidInputError, match="make a new block from the cube"):
        pickle.dumps(block)
    of_texts = CAGMemoryBlock(documents=TEXTS)
    for made in (deepcopy(of_texts), pickle.loads(pickle.dumps(of_texts)), CAGMemoryBlock(**of_texts.model_dump())):
        assert made == of_texts
        assert await made.aget() == await of_texts.aget()


def test_a_transform_is_copied_pickled_and_read_back(named: KVCacheLLM, live: KVCacheLLM) -> None:
    transform = KVCacheTransform(named, docstore=SimpleDocumentStore(), collection="towers")
    data = transform.to_dict()
    again = [deepcopy(transform), pickle.loads(pickle.dumps(transform)), KVCacheTransform.from_dict(data, llm=named)]
    for made in again:
        assert (made.fingerprint, made.template, made.collection) == (data["fingerprint"], data["template"], "towers")
        assert made([TextNode(text=TEXTS[0])])
        assert len(documents_in(named.memory.store)) == 1
    assert again[0]._docstore is transform._docstore
    with pytest.raises(InvalidInputError, match="another model or template"):
        KVCacheTransform.from_dict(data, llm=KVCacheLLM(engine=live.engine, system_prompt="Be kind."))
    with pytest.raises(InvalidInputError, match="cannot be sent to another process"):
        pickle.dumps(KVCacheTransform(live))
