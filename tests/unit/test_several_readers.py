"""Several processes over one store: what one deletes or replaces, the others no longer use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcag import HFEngine, KVCacheMemory
from kvcag.errors import InvalidInputError, StoreUnavailableError, UnknownItemError
from kvcag.stores import DiskStore, FsspecStore, KVStore, MemoryStore, TieredStore
from kvcag.stores.tiered import StoreWarning
from kvcag.testing import byte_tokenizer, tiny_model
from tests.stored import random_item


@pytest.fixture(params=["directory", "remote"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KVStore]:
    """A store as another process opens it."""
    if request.param == "directory":
        yield DiskStore(tmp_path / "shared")
    else:
        yield FsspecStore(f"memory://{tmp_path.name}/shared")


def opened_again(store: KVStore) -> KVStore:
    return DiskStore(store.path) if isinstance(store, DiskStore) else FsspecStore(store.url)  # type: ignore[attr-defined]


@pytest.fixture(params=["memory", "disk"])
def reader(request: pytest.FixtureRequest, shared: KVStore, tmp_path: Path) -> Iterator[TieredStore]:
    local = MemoryStore() if request.param == "memory" else DiskStore(tmp_path / "local")
    with TieredStore([local, opened_again(shared)]) as tiered:
        yield tiered


def test_what_another_process_deletes_is_gone_from_behind_a_local_tier(reader: TieredStore, shared: KVStore) -> None:
    shared.put(random_item("a"))
    assert reader.get("a") is not None
    shared.erase(["a"])
    assert not reader.contains("a")
    assert reader.containing(["a"]) == set()
    assert not list(reader.keys())
    assert reader.manifest("a") is None
    assert not list(reader.listing())
    assert reader.get("a") is None
    assert not any(tier.contains("a") for tier in reader.tiers)


def test_what_another_process_replaces_is_not_read_from_a_local_tier(reader: TieredStore, shared: KVStore) -> None:
    shared.put(random_item("a", metadata={"revision": 1}))
    assert reader.get("a").metadata == {"revision": 1}  # type: ignore[union-attr]
    shared.put(random_item("a", metadata={"revision": 2}))
    assert reader.manifest("a").metadata == {"revision": 2}  # type: ignore[union-attr]
    for _ in range(2):
        assert reader.get("a").metadata == {"revision": 2}  # type: ignore[union-attr]
    assert reader.tiers[0].get("a").metadata == {"revision": 2}  # type: ignore[union-attr]


def test_a_local_tier_serves_while_the_shared_one_is_out_of_reach(
    reader: TieredStore, shared: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise StoreUnavailableError(None, "gone")

    shared.put(random_item("a"))
    reader.get("a")
    for name in ("get", "manifest", "contains", "containing"):
        monkeypatch.setattr(reader.tiers[1], name, gone)
    with pytest.warns(StoreWarning, match="gone"):
        assert reader.get("a") is not None
    with pytest.warns(StoreWarning, match="gone"):
        assert reader.contains("a")
    with pytest.warns(StoreWarning, match="gone"):
        assert reader.containing("ab") == {"a"}
    with pytest.raises(StoreUnavailableError):
        reader.get("b")


def test_what_a_local_tier_is_asked_for_is_not_what_the_shared_one_evicts(tmp_path: Path) -> None:
    room = DiskStore(tmp_path / "one")
    room.put(random_item("a"))
    size = room.stats().bytes
    with TieredStore([MemoryStore(), DiskStore(tmp_path / "two", 2 * size + size // 2)]) as store:
        store.put(random_item("a"))
        store.put(random_item("b"))
        store.get("a")
        store.put(random_item("c"))
        assert sorted(store.keys()) == ["a", "c"]


def test_a_handle_that_another_process_deleted_does_not_answer(
    tiny_engine: HFEngine, reader: TieredStore, shared: KVStore
) -> None:
    memory = KVCacheMemory(tiny_engine, reader)
    id = KVCacheMemory(HFEngine(tiny_model(), byte_tokenizer()), shared).create_context(["The safe is at the back."])
    asked = [{"role": "user", "content": "Where is the safe?"}]
    memory.ask(memory.with_context(id, asked), max_new_tokens=1)
    shared.erase([id])
    with pytest.raises(InvalidInputError, match="no context"):
        memory.with_context(id, asked)


def test_a_document_that_is_deleted_while_it_is_asked_about_by_id_does_not_come_back(
    tiny_engine: HFEngine, shared: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text was read from the store, deleted there, and encoded and put again."""
    memory = KVCacheMemory(tiny_engine, opened_again(shared))
    ids = memory.add(["The library opens at nine.", "It is in Harbour Street."])
    prompt = memory._prompt

    def deleted_after(*arguments: object) -> object:
        made = prompt(*arguments)  # type: ignore[arg-type]
        in_another_process(shared, lambda store: store.erase(ids[:1]))
        return made

    monkeypatch.setattr(memory, "_prompt", deleted_after)
    memory.ask("When?", ids, strategy="rotate", max_new_tokens=1)
    assert list(shared.keys()) == ids[1:]
    with pytest.raises(UnknownItemError):
        memory.ask("When?", ids)


def test_a_context_that_is_deleted_while_it_is_asked_about_does_not_come_back(
    tiny_engine: HFEngine, shared: KVStore
) -> None:
    """Over a bucket: two of a thousand came back in twenty minutes."""
    memory = KVCacheMemory(tiny_engine, opened_again(shared))
    id = KVCacheMemory(HFEngine(tiny_model(), byte_tokenizer()), shared).create_context(["The safe is at the back."])
    messages = memory.with_context(id, [{"role": "user", "content": "Where is the safe?"}])
    in_another_process(shared, lambda store: store.erase([id]))
    memory.ask(messages, strategy="rotate", max_new_tokens=1)
    assert not list(shared.keys())


def in_another_process(store: KVStore, act: object) -> None:
    """`memory://` is another store in each process: there, in this one."""
    if isinstance(store, FsspecStore):
        act(opened_again(store))  # type: ignore[operator]
        return
    child = os.fork()
    if not child:
        act(opened_again(store))  # type: ignore[operator]
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_document_is_kept_while_another_process_deletes_others(
    tiny_engine: HFEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was deleted elsewhere, a document that was being encoded was dropped, and `add` returned its id."""
    memory = KVCacheMemory(tiny_engine, tmp_path)
    [other] = memory.add("The safe is at the back.")
    encode = tiny_engine.encode_item

    def meanwhile(*arguments: object, **named: object) -> object:
        in_another_process(memory.store, lambda store: store.erase([other]))
        return encode(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(tiny_engine, "encode_item", meanwhile)
    ids = memory.add("The library opens at nine.")
    assert list(memory.store.keys()) == ids


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "several_readers.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("store", ["directory", "bucket"])
def test_eighty_answers_beside_deletions_show_nothing_stale_torn_or_lost(store: str, tmp_path: Path) -> None:
    if store == "bucket":
        pytest.importorskip("s3fs")
    root = SCRIPT.parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "kv"), "--answers", "80", "--store", store]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=220)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["reads"] > 50
    assert found["answers"] >= 80
    assert found["deletes"] >= 8
    assert found["killed"] == 1
