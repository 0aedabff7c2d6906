"""Tests DiskStore's guarantees when processes are killed, write at the same time, and store many items.

    python benchmarks/store_stress.py kill DIR --moments 200      kill -9 a writer at random moments
    python benchmarks/store_stress.py race DIR --seconds 60       8 processes, 64 threads, the same 50 keys
    python benchmarks/store_stress.py many DIR --items 10000      open, list, look up

Exits with 1 if a guarantee does not hold. The test suite runs a short form of each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch

from kvcag.cache.layers import cache_of, layers_of
from kvcag.core import KVCacheItem
from kvcag.stores.disk import DiskStore
from kvcag.stores.files import seal
from kvcag.stores.format import item_to_bytes
from kvcag.stores.verify import verify

torch.set_num_threads(1)  # before any fork


def item(key: str, seed: int, *, layers: int = 2, tokens: int = 256, head_dim: int = 32) -> KVCacheItem:
    """Keys and values that `seed` decides: every element is `seed`, so that a torn one shows."""
    states = torch.full((1, 2, tokens, head_dim), seed % 100, dtype=torch.bfloat16)
    return KVCacheItem(
        id=key,
        memory=cache_of([(states, states + 100)] * layers),
        token_ids=torch.full((tokens,), seed),
        metadata={"seed": seed},
    )


def is_whole(read: KVCacheItem) -> bool:
    seed = read.metadata["seed"]
    states = [s for kv in layers_of(read.memory) for s in kv]
    same = all(bool((s == seed % 100 + 100 * (n % 2)).all()) for n, s in enumerate(states))
    return same and bool((read.token_ids == seed).all())


# --- kill -9 ----------------------------------------------------------------------------------------------------


def kill(path: Path, moments: int) -> bool:
    """A child puts items and reports each; it is killed; everything that it reported must be there, and whole."""
    kept: dict[str, int] = {}  # key → the seed that put reported
    lost = torn = within = puts = 0
    for moment in range(moments):
        reports = killed_writer(path, moment)
        puts += len(reports)
        kept |= reports
        found = verify(path)
        torn += len(found.damaged)
        within += len(found.abandoned)
        store = DiskStore(path)  # deletes what the kill left
        for key, seed in kept.items():
            read = store.get(key)
            if read is None or read.metadata["seed"] < seed:  # a later one may have been put and not reported
                lost += 1
            elif not is_whole(read):
                torn += 1
    ours = (".safetensors", ".lock")
    rubbish = [file for file in path.rglob("*") if file.is_file() and not file.name.endswith(ours)]
    print(
        f"killed at {moments} moments, {within} of them within a write, {puts} puts reported: "
        f"{lost} lost, {torn} torn, {len(rubbish)} files left over"
    )
    return not (lost or torn or rubbish) and within > 0 and puts > 0


def killed_writer(path: Path, moment: int) -> dict[str, int]:
    """What a child reported before it was killed, at some moment within its first few puts."""
    reported, report = os.pipe()
    child = os.fork()
    if not child:
        try:
            write_until_killed(path, moment, report)
        finally:
            os._exit(1)
    os.close(report)
    with open(reported, encoding="ascii") as lines:
        seen = [next(lines) for _ in range(random.randint(1, 4))]
        time.sleep(random.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        whole = [line.split() for line in [*seen, *lines] if line.endswith("\n")]
    return {key: int(seed) for key, seed in whole[1:]}


def write_until_killed(path: Path, moment: int, report: int) -> None:
    store = DiskStore(path)
    os.write(report, b"begun\n")
    for n in range(1_000_000):
        seed = moment * 10_000 + n
        key = f"shared-{n % 7}" if n % 2 else f"own-{moment}-{n % 3}"
        store.put(item(key, seed))
        os.write(report, f"{key} {seed}\n".encode())


# --- a race -----------------------------------------------------------------------------------------------------


def race(path: Path, seconds: float, processes: int = 8, threads: int = 64, keys: int = 50) -> bool:
    """Every operation is logged with its begin and end; afterwards, each read must fit what was written around it."""
    fork = multiprocessing.get_context("fork")
    stop = time.monotonic() + seconds
    logs = [path / f"{n}.log" for n in range(processes)]
    running = [
        fork.Process(target=work, args=(path / "kv", log, n, threads // processes, keys, stop))
        for n, log in enumerate(logs)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(seconds + 60)
    stuck = sum(process.exitcode is None for process in running)
    failed = sum(process.exitcode not in (0, None) for process in running)
    for process in running:
        process.kill()
    events = [event for log in logs if log.exists() for event in json.loads(log.read_text())]
    torn = sum(event["what"] == "torn" for event in events)
    late = time.monotonic()
    store = DiskStore(path / "kv")
    for key in map(str, range(keys)):  # what is there in the end is read like everything before
        read = store.get(key)
        events.append({"what": "get", "key": key, "from": late, "to": late, "seed": read and read.metadata["seed"]})
    wrong = judge(events)
    print(
        f"{processes} processes, {threads} threads, {seconds:g} s, {len(events)} operations: "
        f"{torn} torn, {wrong} lost, {stuck} stuck, {failed} failed"
    )
    sound = verify(path / "kv")
    return not (torn or wrong or stuck or failed) and sound.clean


def work(path: Path, log: Path, process: int, threads: int, keys: int, stop: float) -> None:
    store, events = DiskStore(path), []
    errors: list[BaseException] = []

    def loop(thread: int) -> None:
        dice = random.Random(process * 1000 + thread)
        seeds = iter(range((process * 100 + thread) * 1_000_000, 10**12))
        try:
            while time.monotonic() < stop:
                events.append(step(store, dice, str(dice.randrange(keys)), seeds))
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=loop, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    log.write_text(json.dumps(events))
    for error in errors:
        print(repr(error), file=sys.stderr)
    os._exit(1 if errors else 0)


def step(store: DiskStore, dice: random.Random, key: str, seeds: Iterator[int]) -> dict:
    what = dice.choices(["get", "put", "delete"], [6, 3, 1])[0]
    seed = next(seeds) if what == "put" else None
    made = item(key, seed) if what == "put" else None
    begin = time.monotonic()
    if what == "get":
        read = store.get(key)
        end = time.monotonic()
        if read is not None:
            seed = read.metadata["seed"]
            what = "get" if is_whole(read) else "torn"
    elif made is not None:
        store.put(made)
        end = time.monotonic()
    else:
        store.delete([key])
        end = time.monotonic()
    return {"what": what, "key": key, "from": begin, "to": end, "seed": seed}


def judge(events: list[dict]) -> int:
    """Reads that nothing explains: of a value that was surely replaced before, or of nothing where one was kept."""
    by_key = defaultdict(list)
    for event in events:
        by_key[event["key"]].append(event)
    return sum(len(unexplained(of_key)) for of_key in by_key.values())


def unexplained(events: list[dict]) -> list[dict]:
    writes = sorted((e for e in events if e["what"] in ("put", "delete")), key=lambda e: e["from"])
    puts = [e for e in writes if e["what"] == "put"]
    deletes = [e for e in writes if e["what"] == "delete"]
    put_of = {e["seed"]: e for e in puts}
    gone_by = list(accumulate((e["to"] for e in deletes), max))  # the latest end of the first n deletes
    bad = []
    for read in (e for e in events if e["what"] == "get"):
        if read["seed"] is not None:
            write = put_of.get(read["seed"])
            if write is None or write["from"] > read["to"] or done_between(writes, write["to"], read["from"]):
                bad.append(read)
        else:
            before = bisect_right([e["from"] for e in deletes], read["to"])
            since = gone_by[before - 1] if before else float("-inf")
            if done_between(puts, since, read["from"]):
                bad.append(read)
    return bad


def done_between(writes: list[dict], after: float, before: float) -> bool:
    """Whether one of `writes`, in the order of their begin, began after one moment and ended before another."""
    return any(
        after < e["from"] and e["to"] < before for e in writes[bisect_right([e["from"] for e in writes], after) :]
    )


# --- many -------------------------------------------------------------------------------------------------------


def many(path: Path, items: int) -> bool:
    """Open a store of many items of 30 layers, list them and look one up, in a process that did not write them."""
    store = DiskStore(path)
    model = bytes(item_to_bytes(item("item 00000", 1, layers=30, tokens=2, head_dim=2)))
    size = 8 + int.from_bytes(model[:8], "little")
    for n in range(items):  # what 10,000 calls of `put` write, sooner: only the id and the seal differ
        key = f"item {n:05}"
        file = store.file(key)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(seal(model[:size].replace(b"item 00000", key.encode(), 1)) + model[size:])
    child = multiprocessing.get_context("fork").Process(target=open_many, args=(path, items))
    child.start()
    child.join()
    return child.exitcode == 0


def open_many(path: Path, items: int) -> None:
    DiskStore(path).get("item 00000")  # loads what the first look-up of a process loads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, working = time.perf_counter(), time.process_time()
    store = DiskStore(path)
    opened = time.perf_counter()
    listed = len(list(store.keys()))
    at_end = time.perf_counter()
    found = store.get(f"item {items // 2:05}")
    end = time.perf_counter()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{listed} listed in {at_end - opened:.2f} s, opened in {1000 * (opened - begin):.1f} ms, one looked up in "
        f"{1000 * (end - at_end):.1f} ms, {end - begin:.2f} s together "
        f"({time.process_time() - working:.2f} s of this process's CPU), memory +{grown:.1f} MiB"
    )
    os._exit(0 if listed == items and found is not None and grown < 16 else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "race", "many"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--items", type=int, default=10_000)
    arguments = parser.parse_args()
    path = arguments.directory
    path.mkdir(parents=True, exist_ok=True)
    if arguments.what == "kill":
        kept = kill(path, arguments.moments)
    elif arguments.what == "race":
        kept = race(path, arguments.seconds)
    else:
        kept = many(path, arguments.items)
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
