"""The contract of every store, tested on all stores."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import pytest

from kvcag.cache.layers import layers_of, nbytes
from kvcag.stores import ByteKVStore, DiskStore, FsspecStore, KVStore, MemoryStore, TieredStore
from kvcag.stores.format import item_to_bytes
from tests.stored import Bytes, assert_same, random_item

Open: TypeAlias = Callable[[], KVStore]


@pytest.fixture(params=["memory", "disk", "tiered", "fsspec", "bytes"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens a store over the same items, as another process would. A store in memory is always the same object."""
    kept, data, url = MemoryStore(), Bytes(), f"memory://{uuid.uuid4()}/kv"
    ways: dict[str, Open] = {
        "memory": lambda: kept,
        "disk": lambda: DiskStore(tmp_path / "kv"),
        "tiered": lambda: TieredStore([MemoryStore(), tmp_path / "kv"]),
        "fsspec": lambda: FsspecStore(url),
        "bytes": lambda: ByteKVStore(data),
    }
    with ExitStack() as opened:
        yield lambda: opened.enter_context(ways[request.param]())


def test_get_returns_the_item_that_was_put(open_store: Open) -> None:
    item = random_item("kv:ü/..", metadata={"source": "a.txt"})
    open_store().put(item)
    store = open_store()

    assert_same(store.get("kv:ü/.."), item)
    assert store.contains("kv:ü/..")
    assert list(store.keys()) == ["kv:ü/.."]
    manifest = store.manifest("kv:ü/..")
    assert manifest is not None
    assert manifest.metadata == {"source": "a.txt"}
    in_memory, in_a_file = nbytes(layers_of(item.memory)), len(item_to_bytes(item))
    sizes = {MemoryStore: in_memory, TieredStore: in_memory + in_a_file}
    stats = store.stats()
    assert (stats.items, stats.bytes, stats.hits, stats.misses) == (1, sizes.get(type(store), in_a_file), 1, 0)


def test_a_missing_item_is_none(open_store: Open) -> None:
    store = open_store()
    assert store.get("a") is None
    assert store.manifest("a") is None
    assert not store.contains("a")
    assert list(store.keys()) == []
    store.delete(["a"])
    assert (store.stats().items, store.stats().misses) == (0, 1)


def test_a_put_replaces_and_a_delete_deletes_everything(open_store: Open) -> None:
    store = open_store()
    for seed in range(3):
        store.put(random_item("a", seed=seed))
    assert_same(store.get("a"), random_item("a", seed=2))
    assert store.stats().items == 1
    store.delete(["none", "a", "a"])

    assert open_store().get("a") is None
    assert (store.stats().items, store.stats().bytes) == (0, 0)
    if isinstance(store, ByteKVStore):
        assert list(store.store.yield_keys(prefix="")) == []


def test_purge_deletes_everything_made_from_one_text(open_store: Open) -> None:
    store = open_store()
    store.put(random_item("by path", metadata={"source": "a.txt"}))
    store.put(random_item("by id", metadata={"doc_id": "a.txt"}))
    store.put(random_item("by text", text="a.txt"))
    store.put(random_item("another", metadata={"language": "a.txt"}))

    assert sorted(store.purge("a.txt").ids) == ["by id", "by path", "by text"]
    assert list(open_store().keys()) == ["another"]
