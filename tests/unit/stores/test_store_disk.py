from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from pathlib import Path

import pytest

from kvcag.errors import CorruptItemError, StoreFullError, StoreUnavailableError
from kvcag.stores.disk import DiskStore
from kvcag.stores.files import unavailable
from kvcag.stores.format import item_to_bytes
from tests.stored import assert_same, random_item

SIZE = len(item_to_bytes(random_item("a")))


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "kv")


def files(store: DiskStore) -> list[Path]:
    return sorted(store.path.rglob("*.safetensors"))


def put_in_order(store: DiskStore, *ids: str) -> None:
    for id in ids:
        store.put(random_item(id))
        time.sleep(0.01)  # the clock of a file system ticks every few milliseconds


def test_its_repr_counts_its_items(store: DiskStore) -> None:
    assert repr(store) == f"<DiskStore {store.path} 0 items, 0 bytes>"
    store.put(random_item("a"))
    assert repr(store) == f"<DiskStore {store.path} 1 item, {SIZE / 1000:.1f} kB>"
    shutil.rmtree(store.path)
    assert repr(store) == f"<DiskStore {store.path} unavailable>"


@pytest.mark.parametrize("id", ["plain", "../../etc/passwd", "a/b", "", "ü" * 500, "nul\0", "kv:sha256:00"])
def test_any_id_is_kept_inside_the_directory(store: DiskStore, id: str) -> None:
    store.put(random_item(id))

    assert_same(store.get(id), random_item(id))
    assert list(store.keys()) == [id]
    assert store.contains(id)
    assert all(store.directory in path.parents for path in files(store))
    store.delete([id])
    assert store.get(id) is None
    assert not files(store)


def test_everything_is_for_this_user_alone(store: DiskStore) -> None:
    store.put(random_item("a"))
    store.pin("a")
    for path in [store.path, *store.path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_least_recently_used_leaves_first(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, max_bytes=3 * SIZE + SIZE // 2)
    put_in_order(store, "a", "b", "c")
    assert store.get("a")
    list(store.keys())  # to look is not to use
    store.manifest("b")
    store.verify()
    store.put(random_item("d"))

    assert sorted(store.keys()) == ["a", "c", "d"]
    assert store.stats().evictions == 1


def test_a_pin_holds_for_every_process(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, max_bytes=2 * SIZE + SIZE // 2)
    put_in_order(store, "a")
    store.pin("a")
    other = DiskStore(tmp_path, max_bytes=2 * SIZE + SIZE // 2, ttl=0.01)
    put_in_order(other, "b", "c", "d")

    assert sorted(other.keys()) == ["a", "d"]
    assert other.get("a")
    assert other.get("d") is None
    other.unpin("a")
    assert other.get("a") is None


def test_an_item_that_cannot_fit_is_refused_and_evicts_nothing(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, max_bytes=2 * SIZE + SIZE // 2)
    put_in_order(store, "a", "b")
    with pytest.raises(StoreFullError):
        store.put(random_item("c", tokens=500))
    store.pin("a")
    store.pin("b")
    with pytest.raises(StoreFullError, match="pinned"):
        store.put(random_item("c"))

    assert sorted(store.keys()) == ["a", "b"]


def test_an_item_expires_and_its_file_goes(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, ttl=60)
    store.put(random_item("a"))
    assert store.contains("a")
    os.utime(store.file("a"), (time.time() - 61,) * 2)

    assert store.get("a") is None
    assert not files(store)
    store.put(random_item("a"))
    assert store.contains("a")


def test_using_an_item_does_not_make_it_younger(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, ttl=0.3)
    store.put(random_item("a"))
    deadline = time.monotonic() + 0.35
    while time.monotonic() < deadline:
        store.get("a")
    assert store.get("a") is None


def test_an_eviction_does_not_delete_a_file_that_was_replaced_meanwhile(store: DiskStore) -> None:
    from kvcag.stores.disk import _unlink

    store.put(random_item("a"))
    inode = files(store)[0].stat().st_ino
    store.put(random_item("a", seed=1))
    _unlink(files(store)[0], inode)

    assert_same(store.get("a"), random_item("a", seed=1))


# --- namespaces ----------------------------------------------------------------------------------------------------


def test_two_tenants_with_the_same_text_share_nothing(tmp_path: Path) -> None:
    one = DiskStore(tmp_path, namespace="one", salt=b"secret")
    two = DiskStore(tmp_path, namespace="two", salt=b"secret")
    one.put(random_item("the same"))

    assert two.get("the same") is None
    assert not two.contains("the same")
    assert list(two.keys()) == []
    two.put(random_item("the same", seed=1))
    assert len(files(one)) == 2
    assert {path.name for path in one.directory.rglob("*.safetensors")}.isdisjoint(
        path.name for path in two.directory.rglob("*.safetensors")
    )
    two.delete(["the same"])
    assert_same(one.get("the same"), random_item("the same"))


def test_names_tell_nothing_without_the_salt(tmp_path: Path) -> None:
    kept = DiskStore(tmp_path, namespace="one", salt=b"secret")
    kept.put(random_item("guessed"))

    assert not DiskStore(tmp_path, namespace="one", salt=b"guess").contains("guessed")
    assert not DiskStore(tmp_path, namespace="one").contains("guessed")
    assert DiskStore(tmp_path, namespace="one", salt=b"secret").contains("guessed")


# --- damage -----------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_named_and_the_next_put_mends_it(store: DiskStore) -> None:
    store.put(random_item("a"))
    flip(files(store)[0])

    with pytest.raises(CorruptItemError, match=str(files(store)[0])):
        store.get("a")
    store.put(random_item("a"))
    assert_same(store.get("a"), random_item("a"))


def test_a_file_with_another_items_name_is_damaged(store: DiskStore) -> None:
    store.put(random_item("a"))
    path = files(store)[0]
    store.put(random_item("b"))
    other = next(p for p in files(store) if p != path)
    path.rename(other)

    with pytest.raises(CorruptItemError, match="contains 'a'"):
        store.get("b")


def test_an_access_time_in_the_future_keeps_no_item_for_ever(tmp_path: Path) -> None:
    """Regression: such an item counted as the most recently used until that time was reached."""
    store = DiskStore(tmp_path, max_bytes=2 * SIZE + SIZE // 2)
    put_in_order(store, "a", "b")
    later = time.time() + 10 * 365 * 86_400
    os.utime(store.file("a"), (later, later))
    put_in_order(store, "c", "d")
    assert sorted(store.keys()) == ["c", "d"]


def test_a_file_from_the_future_expires(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, ttl=3600)
    store.put(random_item("a"))
    os.utime(store.file("a"), (time.time() + 86_400,) * 2)
    assert store.get("a") is None


# --- the disk ---------------------------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailableError) as raised:
        DiskStore(tmp_path / "file" / "kv")
    assert str(tmp_path / "file") in str(raised.value)


def test_a_path_that_cannot_be_used_is_a_typed_error_and_loses_nothing(store: DiskStore) -> None:
    store.put(random_item("a"))
    path = store.file("b")
    path.mkdir(parents=True)
    (path / "something").touch()

    with pytest.raises(StoreUnavailableError):
        store.put(random_item("b"))
    with pytest.raises(CorruptItemError, match="it is not a regular file"):
        store.get("b")
    assert_same(store.get("a"), random_item("a"))
    assert not list(store.path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_each_failure_of_the_disk_says_what_to_do(number: int, says: str) -> None:
    with pytest.raises(StoreUnavailableError, match=says) as raised, unavailable("/the/path"):
        raise OSError(number, os.strerror(number))
    assert raised.value.errno == number
    assert "/the/path" in str(raised.value)


def test_a_directory_that_vanished_is_made_again(store: DiskStore) -> None:
    shutil.rmtree(store.path)

    assert store.get("a") is None
    store.delete(["a"])
    store.put(random_item("a"))
    assert_same(store.get("a"), random_item("a"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
