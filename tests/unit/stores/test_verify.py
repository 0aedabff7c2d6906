"""Findings of `verify`, deletions by a repair, and leftovers of killed writers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvcag.stores.disk import DiskStore
from kvcag.stores.dump import read_dump, write_dump
from kvcag.stores.files import atomic_write
from kvcag.stores.format import item_to_bytes, write_item
from kvcag.stores.verify import verify
from tests.stored import cut, random_item


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    made = DiskStore(tmp_path / "kv")
    for id in "abc":
        made.put(random_item(id))
    return made


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def temporary(store: DiskStore, id: str) -> Path:
    return store.directory / f".{store.file(id).name}.{'0' * 32}.tmp"


def test_verify_finds_damage_and_repair_deletes_it(store: DiskStore) -> None:
    cut(store.file("a"))
    store.file("b").write_bytes(store.file("b").read_bytes()[:100])
    temporary(store, "d").write_bytes(b"half")
    before = tree(store.path)

    report = verify(store.path)
    assert (report.sound, report.clean) == (1, False)
    assert {path for path, _ in report.damaged} == {store.file("a"), store.file("b")}
    assert report.abandoned == [temporary(store, "d")]
    assert tree(store.path) == before  # a look changes nothing

    assert store.verify(repair=True) == report
    assert tree(store.path) == {str(store.file("c").relative_to(store.path))}
    assert verify(store.path).clean


def others(folder: Path) -> None:
    """Files of other programs: weights, downloads, temporary files, locks, links, and look-alikes."""
    ours = item_to_bytes(random_item("x"))
    for name in ("", "model", "0" * 32, "0" * 32 + "/00", "downloads"):
        below = folder / name
        below.mkdir(exist_ok=True, parents=True)
        save_file({"weight": torch.zeros(3)}, below / "model.safetensors")
        (below / "model-00001.safetensors").write_bytes((below / "model.safetensors").read_bytes()[:-5])
        (below / "model.safetensors.incomplete").write_bytes(b"half")
        (below / "upload.tmp").write_bytes(b"half")
        (below / ".model.safetensors.0123456789abcdef.tmp").write_bytes(b"half")
        (below / f".model.safetensors.{'a' * 32}.tmp").write_bytes(b"half")
        (below / "exported.safetensors").write_bytes(ours[:-3])
        (below / ".program.lock").touch()
        (below / f"program-{'a' * 32}").mkdir(exist_ok=True)
        (below / f"program-{'a' * 32}" / "file").touch()
        with contextlib.suppress(FileExistsError):
            (below / f"{'1' * 62}.safetensors").symlink_to(below / "model-00001.safetensors")
    (folder / ("0" * 32) / "00" / f"{'2' * 62}.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def test_a_repair_touches_only_files_that_are_provably_ours(store: DiskStore) -> None:
    """Regression: a repair deleted other programs' safetensors files, temporary files and partial downloads."""
    others(store.path)
    cut(store.file("a"))
    ours = str(store.file("a").relative_to(store.path))
    before = tree(store.path)
    report = verify(store.path, repair=True)
    assert tree(store.path) == before - {ours}
    assert [path for path, _ in report.damaged] == [store.file("a")]
    assert not report.abandoned
    assert len(report.foreign) == 16


def test_repair_does_not_touch_the_files_of_a_running_writer(store: DiskStore) -> None:
    path = store.file("new")
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path, beside=store.directory) as temporary:
        temporary.write_bytes(item_to_bytes(random_item("new")))
        assert verify(store.path, repair=True).abandoned == []
        DiskStore(store.path)
    assert verify(store.path).sound == 4


@pytest.mark.parametrize("secret", [{}, {"namespace": "ada", "salt": b"secret"}])
def test_verify_finds_a_file_under_another_files_key(tmp_path: Path, secret: dict[str, str | bytes]) -> None:
    """Regression: all bytes match their checksums, so `verify` reported the file as sound."""
    store = DiskStore(tmp_path, **secret)
    for id in "ab":
        store.put(random_item(id))
    store.file("b").write_bytes(store.file("a").read_bytes())
    report = store.verify()
    assert report.sound == 1
    [(path, reason)] = report.damaged
    assert path == store.file("b")
    assert "contains 'a'" in reason
    store.verify(repair=True)
    assert store.get("b") is None
    assert store.get("a") is not None


def test_a_file_that_is_moved_within_a_dump_is_found(tmp_path: Path) -> None:
    write_dump(tmp_path, "ours.json", [random_item("a"), random_item("b")])
    one, other = sorted(tmp_path.rglob("*.safetensors"))
    one.rename(other)
    assert [path for path, _ in verify(tmp_path).damaged] == [other]


# --- what a kill leaves --------------------------------------------------------------------------------------------


def killed(work: Callable[[], None], seconds: float) -> None:
    """Fork a child that works, and kill it after a while."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


needs_kill = pytest.mark.skipif(os.name == "nt", reason="fork and kill are POSIX")


@needs_kill
def test_opening_a_store_deletes_the_leftovers_of_killed_writers(store: DiskStore) -> None:
    """Regression: temporary files stayed until a repair."""
    large = random_item("d", tokens=20_000)

    def put() -> None:
        while True:
            store.put(large)

    for moment in range(12):
        killed(put, 0.02 + 0.003 * moment)
    DiskStore(store.path)
    assert all(".tmp" not in name for name in tree(store.path))
    assert len(tree(store.path)) == 4
    assert verify(store.path).clean


@needs_kill
@pytest.mark.parametrize("first", [True, False], ids=["the first dump", "a later dump"])
@pytest.mark.parametrize("way", ["load", "store", "repair"])
def test_opening_a_folder_deletes_the_leftovers_of_killed_dumps(tmp_path: Path, first: bool, way: str) -> None:
    """Regression: 60 kills left 231 files instead of 8."""
    if not first:
        write_dump(tmp_path, "ours.json", [random_item("a")])

    def endless() -> Iterator[object]:
        yield from (random_item(str(n)) for n in range(3))
        time.sleep(30)

    for _ in range(3):
        killed(lambda: write_dump(tmp_path, "ours.json", endless()), 0.1)
    assert verify(tmp_path).abandoned
    if way == "load":
        assert (read_dump(tmp_path, "ours.json") is None) is first
    elif way == "store":
        DiskStore(tmp_path)
    else:
        verify(tmp_path, repair=True)
    assert len(tree(tmp_path)) == (1 if first else 3)  # a lock; a lock, a manifest and an item
    assert verify(tmp_path).clean


def test_a_dump_whose_manifest_was_lost_is_not_left_over(tmp_path: Path) -> None:
    write_dump(tmp_path, "ours.json", [random_item("a")])
    (tmp_path / "ours.json").unlink()
    DiskStore(tmp_path)
    assert verify(tmp_path, repair=True).sound == 1


def dump_often(folder: Path, name: str, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        write_dump(folder, "ours.json", [random_item(f"{name}{n}") for n in range(3)], about={"by": name})


@needs_kill
def test_two_dumpers_at_once_cannot_tear_a_dump(tmp_path: Path) -> None:
    write_dump(tmp_path, "ours.json", [random_item(f"a{n}") for n in range(3)], about={"by": "a"})
    fork = multiprocessing.get_context("fork")
    dumpers = [fork.Process(target=dump_often, args=(tmp_path, name, 3.0)) for name in "ab"]
    for dumper in dumpers:
        dumper.start()
    read = set()
    while any(dumper.is_alive() for dumper in dumpers):
        found = read_dump(tmp_path, "ours.json")
        assert found is not None
        assert {item.id for item in found.items} == {f"{found.about['by']}{n}" for n in range(3)}
        read.add(found.about["by"])
        verify(tmp_path, repair=True)
    assert [dumper.exitcode for dumper in dumpers] == [0, 0]
    assert read == {"a", "b"}
    read_dump(tmp_path, "ours.json")
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_a_dump_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write_dump(tmp_path, "ours.json", [random_item("a")])
    before = tree(tmp_path)

    def failing() -> Iterator[object]:
        yield random_item("b")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dump(tmp_path, "ours.json", failing())
    assert tree(tmp_path) == before


def test_an_item_that_was_exported_is_no_item_of_a_store(tmp_path: Path) -> None:
    write_item(tmp_path / "x.safetensors", random_item("x"))
    assert verify(tmp_path).sound == 1
    cut(tmp_path / "x.safetensors")
    report = verify(tmp_path, repair=True)
    assert (len(report.foreign), report.damaged) == (1, [])
