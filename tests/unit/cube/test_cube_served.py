"""A cube with a server that has the keys and values: prompts are preloaded, and follow the texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcag import HFEngine, MemoryCube
from kvcag.core import TextualMemoryItem
from kvcag.engines.vllm.engine import VLLMEngine
from kvcag.errors import CacheWarning
from kvcag.memory import insert_documents
from kvcag.testing import byte_tokenizer, tiny_model
from tests.wire_server import WireServer

TEXTS = [
    TextualMemoryItem(id="tower", memory="The tower is made of iron. " * 4),
    TextualMemoryItem(id="bridge", memory="The bridge is made of steel. " * 4),
]


@pytest.fixture
def engine(tiny_engine: HFEngine) -> Iterator[VLLMEngine]:
    with WireServer(tiny_engine) as server, VLLMEngine(server.url, tokenizer=byte_tokenizer()) as made:
        yield made


@pytest.fixture
def cube(engine: VLLMEngine) -> MemoryCube:
    made = MemoryCube(engine, instruction="Notes:", strategy="exact", namespace="mine")
    made.add(TEXTS)
    return made


def together_ids(engine: VLLMEngine) -> tuple[int, ...]:
    documents = ["".join(f"{text.memory}\n\n" for text in TEXTS)]
    question = {"role": "user", "content": "Which?"}
    return engine.template.prompt(insert_documents("Notes:", documents, [question])).context_ids


def test_a_preloaded_prompt_is_reported_as_cached(cube: MemoryCube) -> None:
    assert cube.ask("Which?", max_new_tokens=2).side == "encoded"
    assert cube.encode() == 1
    assert cube.encode() == 0
    answer = cube.ask("Which one?", max_new_tokens=2)
    assert (answer.side, answer.cached) == ("prefix", ("tower", "bridge"))
    assert answer.usage.cached_tokens > 200


def test_both_engines_give_one_answer(cube: MemoryCube) -> None:
    here = MemoryCube(HFEngine(tiny_model(), byte_tokenizer()), instruction="Notes:", strategy="exact")
    here.add(TEXTS)
    assert cube.ask("Which?", max_new_tokens=12).text == here.ask("Which?", max_new_tokens=12).text


def test_a_deleted_text_is_stored_nowhere_and_never_preloaded_again(cube: MemoryCube, engine: VLLMEngine) -> None:
    cube.encode()
    together = together_ids(engine)
    assert engine.known_prefix(together, "mine") == len(together)
    cube.delete("tower")
    assert list(cube.memory.store.keys()) == []
    assert engine.known_prefix(together, "mine") == 0
    assert cube.ask("Which?", max_new_tokens=2).sources == TEXTS[1:]


def test_it_moves_and_is_sent_again(cube: MemoryCube, engine: VLLMEngine, tmp_path: Path) -> None:
    cube.encode()
    cube.dump(tmp_path)
    engine.forget("mine")
    other = MemoryCube.from_dir(tmp_path, engine, strategy="exact")
    assert other.get_all() == TEXTS
    assert other.encode() == 1
    assert other.ask("Which?", max_new_tokens=2).side == "prefix"


def test_it_moves_into_this_process(cube: MemoryCube, tmp_path: Path) -> None:
    cube.encode()
    cube.dump(tmp_path)
    with pytest.warns(CacheWarning, match="encoded again") as said:
        other = MemoryCube.from_dir(tmp_path, HFEngine(tiny_model(), byte_tokenizer()), strategy="exact")
    assert len(said) == 1
    assert other.ask("Which?", max_new_tokens=8).text == cube.ask("Which?", max_new_tokens=8).text
