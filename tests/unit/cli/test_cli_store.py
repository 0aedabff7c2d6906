from __future__ import annotations

import os
import pickle
from pathlib import Path

from typer.testing import CliRunner

from kvcag import HFEngine, KVCacheMemory
from kvcag.cli.app import app
from kvcag.stores.disk import DiskStore
from kvcag.testing import byte_tokenizer, tiny_model
from tests.memos_pickles import dump, written
from tests.memos_pickles import memos as memos  # the fixture
from tests.stored import random_item


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return done.exit_code, done.output


def test_verify_lists_damaged_items_and_repair_deletes_them(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for id in "ab":
        store.put(random_item(id))
    assert run("verify", tmp_path)[0] == 0
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    store.directory.joinpath(f".{path.name}.{'0' * 32}.tmp").touch()

    code, said = run("verify", tmp_path)
    assert code == 1
    assert str(path) in said
    assert "1 items sound" in said
    assert "1 damaged, 1 half written" in said
    assert said.count("--repair deletes it") == 2
    assert "nothing was deleted" in said
    code, said = run("verify", "--repair", tmp_path)
    assert code == 0
    assert "1 damaged, deleted, 1 half written, deleted" in said
    assert run("verify", tmp_path)[0] == 0


def test_a_dump_of_memos_becomes_ours(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    file = dump(tmp_path / "memos.pickle", {"kv_cache_memories": {"an id": written()}})

    code, said = run("import-memos", file, "--out", tmp_path / "ours", "--model", tmp_path / "model")

    assert code == 0, said
    memory = KVCacheMemory(HFEngine.from_pretrained(tmp_path / "model"))
    memory.load(tmp_path / "ours")
    item = memory.get("an id")
    assert item is not None
    assert item.metadata["tags"] == ["a", "b"]
    assert item.records.text_memories == ["some text"]
    assert memory.engine.tokenizer.decode(item.token_ids).startswith("some text")


def test_a_pickle_that_tries_to_run_code_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> object:
            return os.system, (f"touch {tmp_path / 'it ran'}",)

    (tmp_path / "bad").write_bytes(pickle.dumps(Bad()))
    code, said = run("import-memos", tmp_path / "bad", "--out", tmp_path / "ours", "--model", "nowhere")
    assert code == 1
    assert "It was not called" in said
    assert not (tmp_path / "it ran").exists()
