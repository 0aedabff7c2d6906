"""What a directory of a million small items costs: opened, listed, looked up, and synced with its corpus.

    python benchmarks/many_items.py DIRECTORY [--items 1000000]

The files are written here without the model and without fsync, each as `put` would write it: the manifest of one item
with another id and another text. Then another process opens the store and does what users do, cold in memory and warm
in the page cache. Writes benchmarks/results/many_items.json and prints a table; the files stay for another run.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from kvcag import HFEngine, KVCacheMemory
from kvcag.stores.base import KVStore
from kvcag.stores.disk import DiskStore
from kvcag.stores.manifest import seal
from kvcag.sync import diff
from kvcag.testing import byte_tokenizer, tiny_model

RESULTS = Path(__file__).parent / "results" / "many_items.json"


def memory_of(directory: Path) -> KVCacheMemory:
    model = tiny_model(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2)
    return KVCacheMemory(HFEngine(model, byte_tokenizer()), DiskStore(directory, 64 << 30))


def text_of(number: int) -> str:
    return f"Item {number:08}."


def write(directory: Path, items: int) -> float:
    """Write what is missing. Returns seconds."""
    memory, started = memory_of(directory), time.perf_counter()
    store = memory.store
    assert isinstance(store, DiskStore)
    [first] = memory.add(text_of(0))
    model = store.file(first).read_bytes()
    size = 8 + int.from_bytes(model[:8], "little")
    for number in range(1, items):
        id = memory.documents.key(memory._segment(text_of(number)))
        file = store.file(id)
        if not file.exists():
            head = model[:size].replace(first.encode(), id.encode())
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(seal(head.replace(text_of(0).encode(), text_of(number).encode())) + model[size:])
    return time.perf_counter() - started


def timed(act: Callable[[], object]) -> tuple[float, object]:
    began = time.perf_counter()
    result = act()
    return time.perf_counter() - began, result


def measure(directory: Path, items: int) -> dict[str, float]:
    """Seconds of each thing that is done to a store."""
    memory = memory_of(directory)
    store, seconds = memory.store, dict[str, float]()
    wanted = [memory.documents.key(memory._segment(text_of(number))) for number in range(0, items, items // 1000)]

    def listed() -> int:
        return sum(1 for _ in store.keys())  # noqa: SIM118 - a store is no dict

    def read() -> Iterator[tuple[tuple[int, ...], str, dict[str, object]]]:
        return ((memory._segment(text_of(number)), text_of(number), {}) for number in range(items))

    seconds["open"], _ = timed(lambda: DiskStore(directory, 64 << 30))
    seconds["1,000 looked up"], found = timed(lambda: sum(store.contains(key) for key in wanted))
    assert found == len(wanted)
    seconds["1,000 read"], _ = timed(lambda: [store.get(key) for key in wanted])
    seconds["first 100 ids"], _ = timed(lambda: list(islice(store.keys(), 100)))
    seconds["every id"], count = timed(listed)
    assert count >= items
    seconds["every manifest"], _ = timed(lambda: sum(1 for _ in store.listing()))
    seconds["number and bytes"], _ = timed(store.stats)
    seconds["what is new of the corpus"], new = timed(lambda: diff(memory.documents, (), read()))
    assert not new.new
    del new
    seconds["one put"], _ = timed(lambda: memory.add("One more."))
    seconds["100 more"], _ = timed(lambda: memory.add([f"Another {number}." for number in range(100)]))
    seconds["sync"], report = timed(lambda: memory.sync([text_of(number) for number in range(items)]))
    assert report.encoded == 0
    seconds["find a short id"] = shortest(directory, store, wanted[1])
    return seconds


def shortest(directory: Path, store: KVStore, id: str) -> float:
    command = [sys.executable, "-m", "kvcag", "inspect", id.removeprefix("kv:sha256:")[:16], "--store", str(directory)]
    return timed(lambda: subprocess.run(command, check=True, capture_output=True))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--measure", action="store_true", help="only measure what was written before")
    arguments = parser.parse_args()
    if not arguments.measure:
        print(f"written in {write(arguments.directory, arguments.items):.0f} s", flush=True)
        command = [sys.executable, __file__, str(arguments.directory), "--items", str(arguments.items), "--measure"]
        sys.exit(subprocess.run(command, check=False).returncode)
    seconds = measure(arguments.directory, arguments.items)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    RESULTS.write_text(json.dumps({"items": arguments.items, "seconds": seconds, "peak_mib": peak}, indent=2) + "\n")
    for what, took in seconds.items():
        print(f"{what:28} {took:10.3f} s")
    print(f"{'memory at its peak':28} {peak:10.0f} MiB")


if __name__ == "__main__":
    main()
