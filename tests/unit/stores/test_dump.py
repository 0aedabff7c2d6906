from __future__ import annotations

import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import layers_of
from kvcag.core import KVCacheItem
from kvcag.errors import (
    CorruptItemError,
    FingerprintMismatchError,
    FormatError,
    InvalidInputError,
    StoreError,
    StoreUnavailableError,
)
from kvcag.stores.disk import DiskStore
from kvcag.stores.dump import read_dump, write_dump
from kvcag.stores.files import sealed
from kvcag.stores.verify import verify
from kvcag.testing import byte_tokenizer, tiny_model
from tests.stored import FINGERPRINT, assert_same, cut, flip, random_item

TEXTS = ["Alice has a red bicycle.", "Bob has a green car."]
MANIFEST = "kv_cache_memories.json"


@pytest.fixture
def dumped(tiny_engine: HFEngine, tmp_path: Path) -> tuple[KVCacheMemory, Path]:
    memory = KVCacheMemory(tiny_engine)
    memory.add([memory.extract(text) for text in TEXTS])
    memory.dump(tmp_path / "kv")
    return memory, tmp_path / "kv"


def bits(memory: KVCacheMemory) -> dict[str, list[torch.Tensor]]:
    return {i.id: [t.clone() for kv in layers_of(i.memory) for t in kv] for i in memory.get_all()}


def same(a: dict[str, list[torch.Tensor]], b: dict[str, list[torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_a_dump_loads_the_same_items(dumped: tuple[KVCacheMemory, Path]) -> None:
    memory, folder = dumped
    other = KVCacheMemory(memory.engine)
    other.load(folder)
    assert same(bits(memory), bits(other))
    for item in memory.get_all():
        loaded = other.get(item.id)
        assert loaded is not None
        assert loaded.records == item.records
        assert loaded.metadata == item.metadata
        assert torch.equal(loaded.token_ids, item.token_ids)
        assert loaded.prefix_digest == item.prefix_digest


def test_a_folder_that_holds_nothing_loads_as_nothing(tiny_engine: HFEngine, tmp_path: Path) -> None:
    memory = KVCacheMemory(tiny_engine)
    memory.load(tmp_path)
    memory.load(tmp_path / "missing")
    assert memory.get_all() == []


def test_a_dump_replaces_the_one_before(dumped: tuple[KVCacheMemory, Path]) -> None:
    memory, folder = dumped
    gone = memory.get_all()[0].id
    memory.delete(gone)
    memory.dump(folder)
    other = KVCacheMemory(memory.engine)
    other.load(folder)
    assert [item.id for item in other.get_all()] == [item.id for item in memory.get_all()]
    assert len(files(folder)) == 1


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"kv_cache_memories": {}}))


def newer(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))


def renamed_item(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["items"][0] = "another"
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("target", "damage", "error", "says"),
    [
        ("item", cut, CorruptItemError, "is damaged"),
        ("item", flip, CorruptItemError, "is damaged"),
        ("item", os.unlink, CorruptItemError, "missing"),
        ("item", pickled, FormatError, "pickle"),
        ("manifest", os.unlink, FormatError, "no manifest"),
        ("manifest", cut, CorruptItemError, "is damaged"),
        ("manifest", pickled, FormatError, "import-memos"),
        ("manifest", newer, FormatError, "Upgrade kvcag"),
        ("manifest", renamed_item, CorruptItemError, "checksum"),
    ],
)
def test_a_damaged_dump_is_named_and_the_memory_is_unchanged(
    dumped: tuple[KVCacheMemory, Path], target: str, damage: Any, error: type[StoreError], says: str
) -> None:
    memory, folder = dumped
    path = folder / MANIFEST if target == "manifest" else files(folder)[-1]
    damage(path)
    other = KVCacheMemory(memory.engine)
    other.add(other.extract("What it had."))
    before = bits(other)
    with pytest.raises(error, match=says) as raised:
        other.load(folder)
    assert path.name in str(raised.value) or str(folder) in str(raised.value)
    assert same(before, bits(other))


def test_another_models_dump_is_refused(dumped: tuple[KVCacheMemory, Path]) -> None:
    _, folder = dumped
    stranger = KVCacheMemory(HFEngine(tiny_model(seed=9), byte_tokenizer()))
    with pytest.raises(FingerprintMismatchError, match="weights"):
        stranger.load(folder)
    assert stranger.get_all() == []


def test_a_dump_that_fails_leaves_the_one_before(dumped: tuple[KVCacheMemory, Path]) -> None:
    memory, folder = dumped
    before = bits(memory)
    item = memory.extract("A third.")
    item.metadata["when"] = object()
    memory.add(item)
    with pytest.raises(InvalidInputError, match="JSON"):
        memory.dump(folder)
    other = KVCacheMemory(memory.engine)
    other.load(folder)
    assert same(before, bits(other))
    assert len(files(folder)) == len(TEXTS)


def test_a_dump_takes_the_bytes_of_its_tokens(tiny_engine: HFEngine, tmp_path: Path) -> None:
    memory = KVCacheMemory(HFEngine(tiny_model(num_hidden_layers=8, head_dim=32, hidden_size=128), byte_tokenizer()))
    item = memory.extract("word " * 300)
    memory.add(item)
    memory.dump(tmp_path)
    expected = len(item.token_ids) * memory.engine.bytes_per_token
    assert expected <= files(tmp_path)[0].stat().st_size <= 1.01 * expected


def test_a_dump_replaces_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    """Regression: a dump deleted all other safetensors files of the folder: a model's, and those of another dump."""
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    DiskStore(tmp_path).put(random_item("of a store"))
    write_dump(tmp_path, "other.json", [random_item("of another memory")])
    write_dump(tmp_path, "ours.json", [random_item("a"), random_item("b")])
    write_dump(tmp_path, "ours.json", [random_item("c")])

    assert_same(the_item(tmp_path, "ours.json"), random_item("c"))
    assert_same(the_item(tmp_path, "other.json"), random_item("of another memory"))
    assert_same(DiskStore(tmp_path).get("of a store"), random_item("of a store"))
    assert (tmp_path / "model.safetensors").exists()
    report = verify(tmp_path)
    assert (report.sound, len(report.foreign)) == (3, 1)


def test_a_dump_whose_folder_cannot_be_synced_keeps_what_its_manifest_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: after the manifest was renamed, the files that it names were deleted."""
    write_dump(tmp_path, "ours.json", [random_item("a")])
    real = os.fsync

    def fails_once_the_manifest_is_renamed(descriptor: int) -> None:
        if (
            stat.S_ISDIR(os.fstat(descriptor).st_mode)
            and "b" in json.loads((tmp_path / "ours.json").read_text())["items"]
        ):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fails_once_the_manifest_is_renamed)
    with pytest.raises(StoreUnavailableError):
        write_dump(tmp_path, "ours.json", [random_item("b")])
    assert_same(the_item(tmp_path, "ours.json"), random_item("b"))


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_a_dump_is_for_this_user_alone(tmp_path: Path) -> None:
    write_dump(tmp_path / "new" / "dump", "ours.json", [random_item("a")], files={"t": b"text"})
    for path in (tmp_path / "new").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_dump_is_a_directory_of_a_store(tmp_path: Path) -> None:
    write_dump(tmp_path, "ours.json", [random_item("a")])
    directory = json.loads((tmp_path / "ours.json").read_text())["directory"]
    assert_same(DiskStore(tmp_path / directory).get("a"), random_item("a"))


def test_other_files_and_facts_are_dumped_too(tmp_path: Path) -> None:
    write_dump(tmp_path, "cube.json", [random_item("a")], kind="cube", files={"t": b"one"}, about={"n": None})
    dump = read_dump(tmp_path, "cube.json", kind="cube")
    assert dump is not None
    assert (dump.files, dump.about) == ({"t": b"one"}, {"n": None})
    with pytest.raises(FormatError, match="not of kind 'kvcag-memory'"):
        read_dump(tmp_path, "cube.json")

    (text,) = tmp_path.rglob("t")
    text.write_bytes(b"two")
    with pytest.raises(CorruptItemError, match="checksum"):
        read_dump(tmp_path, "cube.json", kind="cube")
    text.unlink()
    with pytest.raises(CorruptItemError, match="missing"):
        read_dump(tmp_path, "cube.json", kind="cube")


def test_the_next_dump_deletes_the_leftovers_of_a_crash(tmp_path: Path) -> None:
    write_dump(tmp_path, "ours.json", [random_item("a")])
    DiskStore(tmp_path / f"ours.json-{'0' * 32}").put(random_item("half"))
    (tmp_path / f".ours.json.{'1' * 32}.tmp").write_text("half")
    write_dump(tmp_path, "ours.json", [random_item("b")])

    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    assert not list(tmp_path.glob(".*.tmp"))
    assert_same(the_item(tmp_path, "ours.json"), random_item("b"))


def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(tmp_path: Path) -> None:
    for outside in ({"directory": "../elsewhere", "items": []}, {"directory": f"m-{'0' * 32}", "files": {"../x": ""}}):
        (tmp_path / "m").write_text(sealed("kvcag-memory", 1, {"items": [], **outside}))
        with pytest.raises(CorruptItemError, match="outside"):
            read_dump(tmp_path, "m")


def the_item(folder: Path, filename: str) -> KVCacheItem:
    dump = read_dump(folder, filename, expected=FINGERPRINT)
    assert dump is not None
    (item,) = dump.items
    return item
