from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcag.cache.layers import layers_of, nbytes
from kvcag.errors import InvalidInputError, StoreFullError
from kvcag.stores.base import StoreStats
from kvcag.stores.disk import DiskStore
from kvcag.stores.memory import MemoryStore
from kvcag.stores.tiered import TieredStore
from tests.stored import assert_same, random_item
from tests.waits import run_together, until

SIZE = nbytes(layers_of(random_item().memory))


def test_the_least_recently_used_leaves_first() -> None:
    store = MemoryStore(max_bytes=3 * SIZE)
    for id in "abc":
        store.put(random_item(id))
    store.get("a")
    store.contains("b")  # to ask is not to use
    store.put(random_item("d"))

    assert sorted(store.keys()) == ["a", "c", "d"]
    assert store.stats().evictions == 1


def test_a_pinned_item_is_not_evicted() -> None:
    store = MemoryStore(max_bytes=2 * SIZE, ttl=0.3)
    store.put(random_item("a"))
    store.pin("a")
    for id in "bcd":
        store.put(random_item(id))
    until(lambda: list(store.keys()) == ["a"])
    store.unpin("a")
    assert store.get("a") is None


def test_an_item_that_cannot_fit_is_refused_and_evicts_nothing() -> None:
    store = MemoryStore(max_bytes=2 * SIZE)
    store.put(random_item("a"))
    store.put(random_item("b"))
    with pytest.raises(StoreFullError, match="max_bytes"):
        store.put(random_item("c", tokens=30))
    store.pin("a")
    with pytest.raises(StoreFullError, match="pinned"):
        store.put(random_item("c", tokens=15))

    assert sorted(store.keys()) == ["a", "b"]
    assert store.stats().evictions == 0


def test_an_item_expires() -> None:
    store = MemoryStore(ttl=0.3)
    store.put(random_item("a"))
    assert store.contains("a")
    until(lambda: not store.contains("a"))

    assert store.get("a") is None
    assert store.manifest("a") is None
    assert store.stats().bytes == 0


def test_on_a_device_the_item_is_a_copy() -> None:
    item = random_item("a")
    store = MemoryStore(device="cpu")
    store.put(item)
    for keys, _ in layers_of(item.memory):
        keys.zero_()

    assert_same(store.get("a"), random_item("a"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_item_goes_from_disk_over_pinned_memory_to_the_accelerator(tmp_path: Path) -> None:
    device, pinned = MemoryStore(device="cuda"), MemoryStore(pin_memory=True)
    with TieredStore([device, pinned, DiskStore(tmp_path)]) as store:
        store.tiers[2].put(random_item("a"))
        found = store.get("a")
        assert found is not None
        assert all(keys.is_cuda and values.is_cuda for keys, values in layers_of(found.memory))
        assert all(keys.is_pinned() and values.is_pinned() for keys, values in layers_of(pinned.get("a").memory))
        for (keys, _), (true, _) in zip(layers_of(found.memory), layers_of(random_item("a").memory), strict=True):
            assert torch.equal(keys.cpu(), true)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it works")
def test_pinned_host_memory_needs_an_accelerator() -> None:
    with pytest.raises(InvalidInputError, match="CUDA"):
        MemoryStore(pin_memory=True)


@pytest.mark.parametrize(
    ("size", "says"), [(0, "0 bytes"), (999, "999 bytes"), (3_400_000, "3.4 MB"), (5 * 10**15, "5000.0 TB")]
)
def test_sizes_are_printed_in_readable_units(size: int, says: str) -> None:
    assert str(StoreStats(2, size)) == f"2 items, {says}"
    assert str(StoreStats(1, size)) == f"1 item, {says}"


def test_its_repr_counts_its_items() -> None:
    store = MemoryStore()
    store.put(random_item("a"))
    assert repr(store) == "<MemoryStore 1 item, 1.9 kB>"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "delete", "pin", "unpin"]), st.sampled_from("abcdef"), st.integers(1, 25)
        ),
        max_size=40,
    )
)
def test_the_budget_holds_and_the_bytes_add_up_whatever_is_done(steps: list[tuple[str, str, int]]) -> None:
    store = MemoryStore(max_bytes=5 * SIZE)
    pinned: set[str] = set()
    for step, id, tokens in steps:
        if step == "put":
            try:
                store.put(random_item(id, tokens=tokens))
            except StoreFullError:
                assert pinned or tokens > 50
                continue
            assert store.contains(id)
        elif step == "delete":
            store.delete([id])
            pinned.discard(id)
            assert not store.contains(id)
        elif step == "get":
            store.get(id)
        else:
            held = store.contains(id)
            getattr(store, step)(id)
            (pinned.add if step == "pin" else pinned.discard)(id)
            assert store.contains(id) == held
        items = [store.get(key) for key in list(store.keys())]
        assert store.stats().bytes == sum(nbytes(layers_of(item.memory)) for item in items if item) <= 5 * SIZE


def test_many_threads_keep_the_bytes_right() -> None:
    store = MemoryStore(max_bytes=5 * SIZE)
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(40):
                store.put(random_item(f"{(seed * 7 + n) % 9}", seed=seed))
                found = store.get(f"{n % 9}")
                assert found is None or found.id == f"{n % 9}"
                store.delete([f"{(n + seed) % 9}"])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    run_together(threads)
    assert not failed
    assert store.stats().bytes == SIZE * len(list(store.keys())) <= 5 * SIZE
