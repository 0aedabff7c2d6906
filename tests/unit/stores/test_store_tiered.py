from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcag.cache.layers import layers_of, nbytes
from kvcag.core import KVCacheItem
from kvcag.errors import CorruptItemError, InvalidInputError, StoreFullError, StoreUnavailableError
from kvcag.stores.disk import DiskStore
from kvcag.stores.memory import MemoryStore
from kvcag.stores.remote import FsspecStore
from kvcag.stores.tiered import StoreWarning, TieredStore
from tests.stored import assert_same, random_item
from tests.waits import joined, until

SIZE = nbytes(layers_of(random_item().memory))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TieredStore]:
    """Room for two items in memory, and a disk."""
    with TieredStore([MemoryStore(2 * SIZE), DiskStore(tmp_path / "kv")]) as tiered:
        yield tiered


def tier_of(store: TieredStore, key: str) -> int:
    """The index of the fastest tier that has an item."""
    return next(index for index, tier in enumerate(store.tiers) if tier.contains(key))


def test_an_evicted_item_is_in_the_next_tier_and_comes_back_when_used(store: TieredStore) -> None:
    for id in "abc":
        store.put(random_item(id))
    assert tier_of(store, "a") == 1

    assert_same(store.get("a"), random_item("a"))
    assert tier_of(store, "a") == 0
    assert tier_of(store, "b") == 1
    assert sorted(store.keys()) == ["a", "b", "c"]


def test_three_tiers_fill_from_a_remote(tmp_path: Path) -> None:
    remote = FsspecStore(f"memory://{tmp_path.name}/kv")
    remote.put(random_item("a"))
    with TieredStore([MemoryStore(device="cpu"), DiskStore(tmp_path), remote]) as store:
        assert_same(store.get("a"), random_item("a"))
        assert all(tier.contains("a") for tier in store.tiers)
        store.delete(["a"])
        assert not any(tier.contains("a") for tier in store.tiers)


def test_a_copy_in_memory_does_not_lean_on_the_file(store: TieredStore) -> None:
    store.tiers[1].put(random_item("a"))
    store.get("a")
    for path in store.tiers[1].path.rglob("*.safetensors"):  # type: ignore[attr-defined]
        path.write_bytes(b"\0" * path.stat().st_size)

    with pytest.warns(StoreWarning, match="damaged"):
        assert_same(store.get("a"), random_item("a"))


def test_prefetch_brings_items_into_the_first_tier(store: TieredStore) -> None:
    for id in "ab":
        store.tiers[1].put(random_item(id))
    futures = store.prefetch(["a", "b", "a", "none"])

    assert [future.result(30) is not None for future in futures] == [True, True, False]
    assert tier_of(store, "a") == tier_of(store, "b") == 0


def test_a_get_waits_for_the_prefetch_of_the_same_item_and_loads_it_once() -> None:
    slow = SlowStore()
    slow.put(random_item("a"))
    with TieredStore([MemoryStore(), slow]) as store:
        store.prefetch(["a"])
        assert slow.asked.wait(30)
        threading.Timer(0.05, slow.go.set).start()
        assert_same(store.get("a"), random_item("a"))
        assert slow.loads == 1


def test_a_get_is_told_of_the_error_of_the_prefetch_that_it_waits_for() -> None:
    slow = SlowStore(error=RuntimeError("the device is lost"))
    slow.put(random_item("a"))
    with TieredStore([MemoryStore(), slow]) as store:
        store.prefetch(["a"])
        assert slow.asked.wait(30)
        threading.Timer(0.05, slow.go.set).start()
        with pytest.raises(RuntimeError, match="the device is lost"):
            store.get("a")


def test_a_get_reads_the_item_itself_where_the_prefetch_was_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcag.stores.tiered._PREFETCHED_AT_ONCE", 1)
    slow = SlowStore()
    for id in "ab":
        slow.put(random_item(id))
    with TieredStore([MemoryStore(), slow]) as store:
        _, waiting = store.prefetch(["a", "b"])
        assert slow.asked.wait(30)
        found: list[KVCacheItem | None] = []
        getting = threading.Thread(target=lambda: found.append(store.get("b")), daemon=True)
        getting.start()
        until(lambda: waiting._condition._waiters)  # type: ignore[attr-defined]
        assert waiting.cancel()
        slow.go.set()
        joined([getting])
        assert_same(found[0], random_item("b"))


def test_an_item_that_is_deleted_while_it_is_fetched_does_not_come_back() -> None:
    slow = SlowStore()
    slow.put(random_item("a"))
    with TieredStore([MemoryStore(), slow]) as store:
        (future,) = store.prefetch(["a"])
        assert slow.asked.wait(30)
        threading.Timer(0.05, slow.go.set).start()
        store.delete(["a"])
        future.result(30)
        assert not store.contains("a")
        assert store.get("a") is None


def test_a_damaged_copy_is_replaced_from_the_next_tier(tmp_path: Path) -> None:
    disk, remote = DiskStore(tmp_path), FsspecStore(f"memory://{tmp_path.name}/kv")
    with TieredStore([disk, remote]) as store:
        store.put(random_item("a"))
        (path,) = tmp_path.rglob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-1])

        with pytest.warns(StoreWarning, match="damaged"):
            assert_same(store.get("a"), random_item("a"))
        assert_same(disk.get("a"), random_item("a"))


def test_damage_without_another_copy_is_raised(store: TieredStore) -> None:
    store.tiers[1].put(random_item("a"))
    (path,) = store.tiers[1].path.rglob("*.safetensors")  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptItemError):
        store.get("a")


def test_a_tier_that_fails_is_passed_over_with_a_warning() -> None:
    gone = GoneStore()
    with TieredStore([MemoryStore(), gone]) as store:
        with pytest.raises(StoreUnavailableError):
            store.put(random_item("a"))  # nor could its old item be deleted
        gone.deletes = True
        with pytest.warns(StoreWarning, match="gone"):
            store.put(random_item("a"))
        assert_same(store.get("a"), random_item("a"))
        with pytest.raises(StoreUnavailableError):
            store.get("b")


def test_an_item_that_fits_into_no_tier_is_refused(tmp_path: Path) -> None:
    with TieredStore([MemoryStore(SIZE), MemoryStore(SIZE)]) as store, pytest.raises(StoreFullError):
        store.put(random_item("a", tokens=100))


def test_purge_reaches_every_tier(store: TieredStore) -> None:
    store.put(random_item("a", text="private"))
    store.tiers[1].put(random_item("b", metadata={"source": "private"}))
    store.put(random_item("c"))

    assert sorted(store.purge("private").ids) == ["a", "b"]
    assert list(store.keys()) == ["c"]
    assert list(store.tiers[1].keys()) == ["c"]


def test_a_path_is_a_tier_on_disk(tmp_path: Path) -> None:
    with TieredStore([MemoryStore(), tmp_path / "kv"]) as store:
        store.put(random_item("a"))
        assert repr(store) == f"<TieredStore {store.tiers[0]!r}, {store.tiers[1]!r}>"
    assert_same(DiskStore(tmp_path / "kv").get("a"), random_item("a"))


def test_a_tiered_store_needs_a_tier() -> None:
    with pytest.raises(InvalidInputError):
        TieredStore([])


class SlowStore(MemoryStore):
    """A store that returns an item, or raises an error, on demand."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error
        self.asked, self.go, self.loads = threading.Event(), threading.Event(), 0

    def get(self, key: str) -> KVCacheItem | None:
        item = super().get(key)
        self.loads += 1
        self.asked.set()
        assert self.go.wait(30)
        if self.error is not None:
            raise self.error
        return item


class GoneStore(MemoryStore):
    """A remote that does not answer."""

    deletes = False

    def get(self, key: str) -> KVCacheItem | None:
        raise StoreUnavailableError(None, "gone", key)

    def put(self, item: KVCacheItem) -> None:
        raise StoreUnavailableError(None, "gone", item.id)

    def delete(self, keys: object) -> None:
        if not self.deletes:
            raise StoreUnavailableError(None, "gone")
