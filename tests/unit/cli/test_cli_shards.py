"""`kvcag encode --shard`: many processes encode one corpus into one store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcag.stores import DiskStore, FsspecStore, KVStore
from tests.commands import Kvcag, write
from tests.s3_server import s3_server
from tests.stored import assert_same

LINES = 60
PATIENCE = 120.0


@pytest.fixture
def corpus(kvcag: Kvcag) -> str:
    lines = [json.dumps({"text": f"Line {number} of a corpus. " + "word " * 60}) for number in range(LINES)]
    write(kvcag.folder / "corpus" / "lines.jsonl", "\n".join(lines))
    write(kvcag.folder / "corpus" / "first.txt", "A file.")
    write(kvcag.folder / "corpus" / "again.txt", "A file.")
    return "corpus"


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest, kvcag: Kvcag, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "directory":
        yield str(kvcag.folder / "shared")
        return
    pytest.importorskip("s3fs")
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket/kv"


def opened(place: str) -> KVStore:
    return FsspecStore(place, skip_instance_cache=True) if "://" in place else DiskStore(place)


STARTER = """
import json, os, signal, sys
import kvcag.cli.app, kvcag.cli.encode, kvcag.demo.model, kvcag.engines.hf, kvcag.memory
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    *arguments, out = json.loads(line)
    child = os.fork()
    if not child:
        sys.stdout = open(out + ".part", "w")
        try:
            kvcag.cli.app.app(arguments, standalone_mode=False)
            sys.stdout.close()
            os.rename(out + ".part", out)
        finally:
            os._exit(0)
    print(child, flush=True)
"""
"""A process that has loaded what the command loads, and forks for each command: that takes seconds only once."""


class Commands:
    """Runs `kvcag encode` in processes of their own, and kills them."""

    def __init__(self, kvcag: Kvcag) -> None:
        self.folder, self.started = kvcag.folder, 0
        environment = {**os.environ, **kvcag.environment}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.starter = subprocess.Popen([sys.executable, "-c", STARTER], env=environment, cwd=self.folder, **pipes)

    def start(self, *arguments: str) -> tuple[int, Path]:
        self.started += 1
        out = self.folder / f"{self.started}.json"
        assert self.starter.stdin is not None
        assert self.starter.stdout is not None
        self.starter.stdin.write(json.dumps([*arguments, str(out)]) + "\n")
        self.starter.stdin.flush()
        return int(self.starter.stdout.readline()), out

    def close(self) -> None:
        self.starter.kill()
        self.starter.communicate()


@pytest.fixture
def commands(kvcag: Kvcag, place: str) -> Iterator[Commands]:
    commands = Commands(kvcag)
    yield commands
    commands.close()


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_four_processes_of_four_shards_give_the_items_of_one_even_if_two_are_killed(
    kvcag: Kvcag, corpus: str, place: str, commands: Commands
) -> None:
    def start(number: int) -> tuple[int, Path]:
        return commands.start("encode", corpus, "--store", place, "--shard", f"{number}/4", "--json")

    def finished(out: Path) -> set[str]:
        wait_for(out.exists)
        return set(json.loads(out.read_text())["ids"])

    one = kvcag("encode", corpus, "--json").json
    assert one["encoded"] == LINES + 1
    processes = {number: start(number) for number in range(1, 5)}
    wait_for(lambda: opened(place).stats().items > 0)
    for number in (1, 2):
        os.kill(processes[number][0], signal.SIGKILL)
    parts = [finished(processes[number][1]) for number in (3, 4)]
    parts += [finished(out) for _, out in [start(1), start(2), start(2)]]  # one of them twice
    assert parts[-1] == parts[-2]
    assert sum(map(len, parts[:-1])) == len(set().union(*parts)) == LINES + 1
    sharded, whole = opened(place), DiskStore(kvcag.folder / "kv")
    assert set(sharded.keys()) == set(whole.keys())
    for key in whole.keys():  # noqa: SIM118 - a store is no dict
        item, expected = sharded.get(key), whole.get(key)
        assert item is not None
        assert expected is not None
        item.records.timestamp, item.metadata = expected.records.timestamp, expected.metadata
        assert_same(item, expected)


def test_an_address_is_a_store_for_every_command(kvcag: Kvcag) -> None:
    """Runs in one process, since `memory://` is a different store in each process."""
    from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

    place = ["--store", "memory://kvcag-cli"]
    try:
        first = kvcag("encode", "notes", *place, "--json").json
        assert (first["encoded"], first["store"]) == (2, "memory://kvcag-cli")
        assert kvcag("encode", "notes", *place, "--json").json["kept"] == 2
        assert [row["id"] for row in kvcag("ls", *place, "--json").json] == first["ids"][::-1]
        assert all(row["bytes"] > 1000 for row in kvcag("ls", *place, "--json").json)
        shown = kvcag("inspect", first["ids"][0][-60:-50], *place)
        assert shown.code == 1
        short = first["ids"][0].removeprefix("kv:sha256:")[:8]
        assert kvcag("inspect", short, *place, "--json").json["id"] == first["ids"][0]
        assert kvcag("ask", "Who?", *place, "--max-new-tokens", 1, "--json").json["ids"] == first["ids"]
        assert kvcag("sync", "notes", *place, "--json").json["kept"] == 2
        assert kvcag("rm", short, *place).code == 0
        assert kvcag("verify", *place).code == 2
        assert len(kvcag("ls", *place, "--json").json) == 1
    finally:
        MemoryFileSystem.store.clear()
    assert not (kvcag.folder / "memory:").exists()


def test_a_shard_that_is_empty_is_no_error(kvcag: Kvcag) -> None:
    encoded = [kvcag("encode", "notes", "--shard", f"{number}/9", "--json").json["encoded"] for number in range(1, 10)]
    assert sum(encoded) == 2
    assert 0 in encoded


def test_encoding_reads_no_manifests_of_stored_items(kvcag: Kvcag, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: with a million items, each of many workers read all manifests."""
    kvcag("encode", "notes")
    listed = []
    for name in ("listing", "stats", "keys"):
        monkeypatch.setattr(DiskStore, name, lambda self, name=name: listed.append(name) or iter(()))
    assert kvcag("encode", "notes", "--json").json["kept"] == 2
    assert not listed
