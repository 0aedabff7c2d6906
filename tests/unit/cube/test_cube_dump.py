"""Dumps of a cube: atomic, verified, and used only by the model that made them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcag import CacheWarning, HFEngine, MemoryCube
from kvcag.core import TextualMemoryItem
from kvcag.cube.dump import read_dump
from kvcag.errors import CorruptItemError, FormatError, InvalidInputError, StoreError, StoreUnavailableError
from kvcag.stores import DiskStore
from kvcag.testing import EchoEngine, byte_tokenizer, tiny_model, whole_prompt
from tests.stored import cut, flip
from tests.waits import joined

HEAD = "Answer from the notes."
TEXTS = {"alice": "Alice has a red bicycle.", "bob": "Bob has a green car."}


def fresh_engine(**changed: Any) -> HFEngine:
    return HFEngine(tiny_model(**changed), byte_tokenizer())


def texts(**changed: str) -> list[TextualMemoryItem]:
    return [TextualMemoryItem(id=id, memory=text, metadata={"n": 1}) for id, text in {**TEXTS, **changed}.items()]


@pytest.fixture
def cube(tiny_engine: HFEngine) -> MemoryCube:
    made = MemoryCube(tiny_engine, instruction=HEAD)
    made.add(texts())
    made.encode()
    return made


@pytest.fixture
def dumped(cube: MemoryCube, tmp_path: Path) -> Path:
    cube.dump(tmp_path / "cube")
    return tmp_path / "cube"


def current(folder: Path) -> Path:
    return folder / json.loads((folder / "cube.json").read_text())["directory"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the same model, and others --------------------------------------------------------------------------------------


def test_a_moved_cube_answers_from_its_caches(cube: MemoryCube, dumped: Path) -> None:
    moved = dumped.rename(dumped.with_name("moved"))
    other = MemoryCube.from_dir(moved, fresh_engine())
    assert other.get_all() == cube.get_all()
    assert other.memory.instruction == HEAD
    answer = other.ask("Who?", max_new_tokens=6)
    assert (answer.side, answer.encoded) == ("merged", ())
    assert answer.report.encoded_tokens == 0  # not even the instruction
    assert answer.text == cube.ask("Who?", max_new_tokens=6).text


def test_texts_that_were_asked_together_are_exact_elsewhere(cube: MemoryCube, tmp_path: Path) -> None:
    asked = cube.ask("Who?", strategy="exact", max_new_tokens=6)
    cube.dump(tmp_path)
    answer = MemoryCube.from_dir(tmp_path, fresh_engine(), strategy="exact").ask("Who?", max_new_tokens=6)
    assert answer.side == "prefix"
    assert (answer.report.encoded_tokens, answer.report.recomputed_tokens) == (0, 0)
    assert answer.text == asked.text


@pytest.mark.parametrize("changed", [{"seed": 5}, {"dtype": torch.bfloat16}, {"num_hidden_layers": 2}])
def test_another_model_encodes_again_with_one_warning(dumped: Path, changed: dict[str, Any]) -> None:
    engine = fresh_engine(**changed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        other = MemoryCube.from_dir(dumped, engine)
        answer = other.ask("Who?", max_new_tokens=4)
        other.ask("Who else?", max_new_tokens=4)
    assert [warning.category for warning in said] == [CacheWarning]
    assert "encoded again" in str(said[0].message)
    assert (answer.side, answer.encoded) == ("encoded", ("alice", "bob"))
    alone = MemoryCube(fresh_engine(**changed), instruction=HEAD)
    alone.add(texts())
    assert answer.text == alone.ask("Who?", max_new_tokens=4).text
    assert len(list(other.memory.store.keys())) == 2  # the other model's were not taken over


def test_an_engine_without_caches_reads_the_texts(dumped: Path) -> None:
    with pytest.warns(CacheWarning, match="EchoEngine"):
        other = MemoryCube.from_dir(dumped, EchoEngine(whole_prompt))
    assert all(text in other.ask("Who?").text for text in TEXTS.values())


def test_another_instruction_uses_the_same_caches(dumped: Path) -> None:
    """Only the first text is encoded again, after the other instruction."""
    other = MemoryCube(fresh_engine(), instruction="Another.", strategy="rotate")
    other.load(dumped)
    answer = other.ask("Who?", max_new_tokens=2)
    assert (answer.side, answer.encoded) == ("merged", ())
    first = other.memory.engine.template.encode(f"{TEXTS['alice']}\n\n")
    assert answer.report.recomputed_tokens == len(first)


def test_a_cube_that_was_never_encoded_moves_without_a_warning(tiny_engine: HFEngine, tmp_path: Path) -> None:
    cube = MemoryCube(tiny_engine, instruction=HEAD)
    cube.add(texts())
    cube.dump(tmp_path)
    other = MemoryCube.from_dir(tmp_path, fresh_engine(seed=5))
    assert other.get_all() == texts()


def test_loading_adds_and_replaces_by_id(dumped: Path) -> None:
    other = MemoryCube(fresh_engine(), instruction=HEAD)
    other.add([TextualMemoryItem(id="alice", memory="Alice sold it."), TextualMemoryItem(id="dan", memory="Dan.")])
    other.encode()
    other.load(dumped)
    assert {text.id: text.memory for text in other.get_all()} == {**TEXTS, "dan": "Dan."}
    assert other.encode() == 0
    kept = [item.records.composed_text_memory for item in other.memory.get_all()]
    assert "Alice sold it.\n\n" not in kept


def test_the_cube_of_another_namespace_is_refused(tiny_engine: HFEngine, tmp_path: Path) -> None:
    cube = MemoryCube(tiny_engine, namespace="alice")
    cube.add("Secret.")
    cube.dump(tmp_path)
    with pytest.raises(InvalidInputError, match=r"namespace='alice'"):
        MemoryCube(tiny_engine, namespace="bob").load(tmp_path)
    assert MemoryCube.from_dir(tmp_path, tiny_engine).namespace == "alice"


# --- what is in a dump -----------------------------------------------------------------------------------------------


def test_a_deleted_text_is_in_no_later_dump(cube: MemoryCube, dumped: Path) -> None:
    cube.ask("Both?", strategy="exact", max_new_tokens=2)
    cube.delete("alice")
    cube.dump(dumped)
    assert [text.id for text in read_dump(dumped).texts] == ["bob"]
    assert not any(b"Alice" in data for data in content(dumped).values())


def test_a_cache_that_holds_more_than_the_cube_says_stays_here(cube: MemoryCube, tmp_path: Path) -> None:
    cube.memory.add(cube.memory.extract("Nobody told the cube of this."))
    cube.memory.add(cube.memory.extract(f"{TEXTS['alice']}\n\nAnd of this."))
    cube.dump(tmp_path)
    assert not any(b"of this" in data for data in content(tmp_path).values())
    assert len(read_dump(tmp_path).items) == 3  # two texts and the instruction


def test_a_damaged_cache_is_left_out_and_its_text_is_not(tiny_engine: HFEngine, tmp_path: Path) -> None:
    cube = MemoryCube(tiny_engine, store=DiskStore(tmp_path / "kv"), instruction=HEAD)
    cube.add(texts())
    cube.encode()
    file = sorted((tmp_path / "kv").rglob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(CacheWarning, match="left out"):
        cube.dump(tmp_path / "dump")
    assert len(read_dump(tmp_path / "dump").texts) == 2
    assert len(read_dump(tmp_path / "dump").items) == 2


def test_nothing_is_left_of_the_dump_before(cube: MemoryCube, dumped: Path) -> None:
    for _ in range(3):
        cube.dump(dumped)
    assert {path.name for path in dumped.iterdir()} == {".cube.json.lock", "cube.json", current(dumped).name}


def test_other_files_of_the_folder_stay(cube: MemoryCube, tmp_path: Path) -> None:
    (tmp_path / "README").write_text("mine")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model.safetensors").write_bytes(b"not ours")
    cube.dump(tmp_path)
    cube.dump(tmp_path)
    assert (tmp_path / "README").read_text() == "mine"
    assert (tmp_path / "sub" / "model.safetensors").read_bytes() == b"not ours"


def test_a_text_of_any_characters_is_read_unchanged(tiny_engine: HFEngine, tmp_path: Path) -> None:
    odd = ["line\u2028two\u0085three\r\nfour", 'tab\tquote"\\', "\u00e9\U0001f600"]
    cube = MemoryCube(tiny_engine)
    cube.add(odd)
    cube.dump(tmp_path)
    assert [text.memory for text in MemoryCube.from_dir(tmp_path, tiny_engine).get_all()] == odd


# --- damage ----------------------------------------------------------------------------------------------------------


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"folder": "x"}))


def newer(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))


def elsewhere(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "directory": "../../etc"}))


def foreign(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "kvcag-memory"}))


DAMAGE = [
    ("cube.json", cut, CorruptItemError),
    ("cube.json", flip, StoreError),
    ("cube.json", pickled, FormatError),
    ("cube.json", newer, FormatError),
    ("cube.json", elsewhere, CorruptItemError),
    ("cube.json", foreign, FormatError),
    ("cube.json", os.unlink, FormatError),
    ("texts.jsonl", cut, CorruptItemError),
    ("texts.jsonl", flip, CorruptItemError),
    ("texts.jsonl", os.unlink, CorruptItemError),
    ("*.safetensors", cut, CorruptItemError),
    ("*.safetensors", flip, CorruptItemError),
    ("*.safetensors", os.unlink, CorruptItemError),
    ("*.safetensors", pickled, FormatError),
]


@pytest.mark.parametrize(("name", "damage", "error"), DAMAGE, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_damaged_dump_is_named_and_the_cube_is_as_it_was(
    dumped: Path, name: str, damage: Any, error: type[StoreError]
) -> None:
    path = sorted(dumped.rglob(name))[-1]
    damage(path)
    other = MemoryCube(fresh_engine(), instruction=HEAD)
    other.add("What it had.")
    other.encode()
    before = other.get_all(), sorted(other.memory.store.keys())
    with pytest.raises(error) as raised:
        other.load(dumped)
    assert path.name in str(raised.value) or str(path.parent) in str(raised.value)
    assert (other.get_all(), sorted(other.memory.store.keys())) == before


def test_a_dump_that_lost_all_its_caches_is_damaged(dumped: Path) -> None:
    for path in current(dumped).rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(CorruptItemError, match=r"cube\.json names this file"):
        read_dump(dumped)


def test_a_folder_without_a_dump_is_named(tiny_engine: HFEngine, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="nowhere"):
        MemoryCube(tiny_engine).load(tmp_path / "nowhere")
    with pytest.raises(StoreUnavailableError):
        read_dump(tmp_path)


def test_a_dump_replaces_a_damaged_one(cube: MemoryCube, dumped: Path) -> None:
    cut(dumped / "cube.json")
    cube.dump(dumped)
    assert len(read_dump(dumped).texts) == 2
    assert len([path for path in dumped.iterdir() if path.is_dir()]) == 1


# --- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_dump_that_fails_leaves_the_one_before(
    cube: MemoryCube, dumped: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    before, real, calls = content(dumped), getattr(os, call), 0
    cube.add("More.")
    for fails in itertools.count(1):  # the disk is full at the first of these calls, at the second, …
        calls = 0

        def full(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fails:  # noqa: B023
                raise OSError(28, "No space left on device")
            return real(*given)

        with monkeypatch.context() as patch, contextlib.suppress(StoreUnavailableError):
            patch.setattr(os, call, full)
            cube.dump(dumped)
            break
        published = len(read_dump(dumped).texts) == 3  # it failed after the new manifest had its name
        assert published or content(dumped) == before
    assert calls > 4
    assert len(read_dump(dumped).texts) == 3


def test_a_dump_may_be_read_while_it_is_replaced(cube: MemoryCube, dumped: Path) -> None:
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            cube.dump(dumped)

    thread = threading.Thread(target=replace, daemon=True)
    thread.start()
    try:
        for _ in range(25):
            read = read_dump(dumped)
            assert (len(read.texts), len(read.items)) == (2, 3)
    finally:
        stop.set()
        joined([thread])
