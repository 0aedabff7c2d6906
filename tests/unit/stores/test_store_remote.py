from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
from fsspec import AbstractFileSystem
from fsspec.registry import _registry

from kvcag.errors import CorruptItemError, InvalidInputError, MissingExtraError, StoreUnavailableError
from kvcag.stores.base import KVStore
from kvcag.stores.format import item_to_bytes
from kvcag.stores.remote import ByteKVStore, FsspecStore
from tests.s3_server import s3_server
from tests.stored import Bytes, assert_same, random_item


@pytest.fixture(params=["fsspec", "bytes"])
def place(request: pytest.FixtureRequest) -> Any:
    """Makes stores over the same items."""
    if request.param == "fsspec":
        url = f"memory://{uuid.uuid4()}/kv"
        return lambda **options: FsspecStore(url, **options)
    data = Bytes()
    return lambda **options: ByteKVStore(data, **options)


def test_int8_and_purge_work_here_too(place: Any) -> None:
    store: KVStore = place(quantize="int8")
    store.put(random_item("a", text="private"))
    store.put(random_item("b"))

    assert store.purge("private").ids == ["a"]
    assert list(store.keys()) == ["b"]


def test_two_tenants_with_the_same_text_share_nothing(place: Any) -> None:
    one, two = place(namespace="one", salt=b"s"), place(namespace="two", salt=b"s")
    one.put(random_item("the same"))

    assert two.get("the same") is None
    assert list(two.keys()) == []
    two.delete(["the same"])
    assert_same(one.get("the same"), random_item("the same"))


def test_a_damaged_item_is_named_left_out_of_the_list_and_mended_by_a_put(place: Any) -> None:
    store: KVStore = place()
    store.put(random_item("a"))
    _spoil(store)

    with pytest.raises(CorruptItemError):
        store.get("a")
    store.put(random_item("a"))
    assert_same(store.get("a"), random_item("a"))


def test_a_remote_that_fails_is_a_typed_error(place: Any) -> None:
    store: KVStore = place()

    def fail(*args: object, **kwargs: object) -> None:
        raise TimeoutError("no answer")

    target: Any = store.store if isinstance(store, ByteKVStore) else store._fs  # type: ignore[attr-defined]
    for name in ("cat_file", "pipe_file", "exists", "find", "rm_file", "mget", "mset", "mdelete", "yield_keys"):
        if hasattr(target, name):
            setattr(target, name, fail)
    try:
        for act in (
            lambda: store.get("a"),
            lambda: store.put(random_item("a")),
            lambda: store.delete(["a"]),
            lambda: store.contains("a"),
            lambda: list(store.keys()),
        ):
            with pytest.raises(StoreUnavailableError, match="no answer"):
                act()
    finally:
        for name in list(vars(target)):
            if vars(target)[name] is fail:
                delattr(target, name)


def test_a_local_path_is_for_the_disk_store(tmp_path: Any) -> None:
    with pytest.raises(InvalidInputError, match="DiskStore"):
        FsspecStore(f"file://{tmp_path}")
    with pytest.raises(InvalidInputError, match="does not know the address"):
        FsspecStore("nowhere://x")


def test_a_protocol_that_is_not_installed_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"kvcag\[store\]"):
        FsspecStore("gs://bucket/kv")


def test_a_mixture_of_two_puts_is_detected_and_replaced_by_the_next() -> None:
    """The `ByteStore` does not write two values atomically, and a put dies between them."""
    data = Bytes()
    store = ByteKVStore(data)
    store.put(random_item("a"))
    plain = data.mset

    def die(key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        plain(key_value_pairs[:1])
        raise ConnectionError("died")

    data.mset = die  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailableError, match="died"):
        store.put(random_item("a", seed=1))

    with pytest.raises(CorruptItemError):
        store.get("a")
    data.mset = plain  # type: ignore[method-assign]
    store.put(random_item("a", seed=1))
    assert_same(store.get("a"), random_item("a", seed=1))


def test_a_look_at_an_item_transfers_no_tensors() -> None:
    data = Bytes()
    store = ByteKVStore(data)
    store.put(random_item("a"))
    asked: list[str] = []
    plain = data.mget

    def mget(keys: Sequence[str]) -> list[bytes | None]:
        asked.extend(keys)
        return plain(keys)

    data.mget = mget  # type: ignore[method-assign]
    assert list(store.keys()) == ["a"]
    assert store.contains("a")
    assert store.manifest("a") is not None
    assert store.stats().items == 1
    assert not [key for key in asked if key.endswith(".tensors")]


def test_its_repr_asks_the_remote_nothing(place: Any) -> None:
    store = place()
    assert repr(store) == f"<{type(store).__name__} {store.url}>"


def test_langchains_byte_stores_can_back_one(tmp_path: Any) -> None:
    stores = pytest.importorskip("langchain_core.stores")
    storage = pytest.importorskip("langchain_classic.storage")
    for backing in (stores.InMemoryByteStore(), storage.LocalFileStore(tmp_path)):
        store = ByteKVStore(backing)
        store.put(random_item("a"))
        assert_same(store.get("a"), random_item("a"))
        assert list(store.keys()) == ["a"]
        store.delete(["a"])
        assert store.stats().items == 0


def _spoil(store: Any) -> None:
    path = store._path("a")
    data = bytearray(store._fs.cat_file(path))
    data[-1] ^= 1
    store._fs.pipe_file(path, bytes(data))


def test_an_item_under_another_item_s_name_is_not_served(place: Any) -> None:
    """Regression: the bytes of item A in the object of item B were returned as B."""
    store = place()
    store._fs.pipe_file(store._path("b"), bytes(item_to_bytes(random_item("a"))))
    for read in (store.get, store.manifest):
        with pytest.raises(CorruptItemError, match="it should contain item 'b' but contains 'a'"):
            read("b")


class Buckets(AbstractFileSystem):  # type: ignore[misc]
    """An object store with one bucket, whose connection cannot be used in a forked child, as fsspec's cannot."""

    protocol = "s3"
    objects: ClassVar[dict[str, bytes]] = {}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pid = os.getpid()

    def _mine(self) -> None:
        if self.pid != os.getpid():
            raise RuntimeError("This class is not fork-safe")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self._mine()
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self._mine()
        self.objects[path] = value

    def exists(self, path: str, **_: Any) -> bool:
        self._mine()
        return path == "bucket" or path in self.objects

    def find(self, path: str, **_: Any) -> dict[str, Any]:
        self._mine()
        return {key: {"size": len(data)} for key, data in self.objects.items() if key.startswith(path)}


@pytest.fixture
def _buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buckets, "objects", {})
    monkeypatch.setitem(_registry, "s3", Buckets)


@pytest.mark.usefixtures("_buckets")
@pytest.mark.parametrize("use", ["get", "manifest", "contains", "keys", "stats"])
def test_a_mistyped_bucket_is_an_error_and_not_a_miss(use: str) -> None:
    def used(url: str) -> Any:
        found = getattr(FsspecStore(url), use)(*([] if use in ("keys", "stats") else ["a"]))
        return list(found) if use == "keys" else found

    assert not used("s3://bucket/kv") or use == "stats"
    with pytest.raises(StoreUnavailableError, match="there is no bucket 'buckte'"):
        used("s3://buckte/kv")


def in_a_child(work: Callable[[], bool]) -> bool:
    child = os.fork()
    if not child:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.usefixtures("_buckets")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_gets_a_connection_of_its_own() -> None:
    class Connection(Bytes):
        def __init__(self) -> None:
            self.pid, self.data = os.getpid(), shared

        def mget(self, keys: Sequence[str]) -> list[bytes | None]:
            assert self.pid == os.getpid()
            return super().mget(keys)

    shared: dict[str, bytes] = {}
    for store in (FsspecStore("s3://bucket/kv"), ByteKVStore(Connection)):
        store.put(random_item("a"))
        assert in_a_child(lambda store=store: store.get("a") is not None)  # type: ignore[misc]
        assert store.get("a") is not None


def test_an_item_that_another_machine_puts_after_a_listing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: fsspec's cache of listings hid the object."""
    pytest.importorskip("s3fs")
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        here, there = (FsspecStore("s3://bucket/kv", skip_instance_cache=True) for _ in range(2))
        for id in "ab":
            there.put(random_item(id))
            assert here.get(id) is not None
            assert id in list(here.keys())


def test_our_bucket_stores_no_object_of_a_writer_that_was_killed() -> None:
    """As S3. It stored what had arrived, so an item of a killed process counted as stored, but was damaged."""
    with s3_server() as server:
        address = server.server_address[:2]
        with socket.create_connection(address, timeout=5) as writer:
            writer.sendall(b"PUT /bucket/kv/cut HTTP/1.1\r\nHost: bucket\r\nContent-Length: 100\r\n\r\nhalf of it")
            writer.shutdown(socket.SHUT_WR)
            assert writer.recv(100) == b""  # the server has closed the connection, without an answer
        assert server.objects == {}
