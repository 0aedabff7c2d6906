"""Measures a directory of a million small items: opening, listing, look-ups, and sync with its corpus.

    python benchmarks/many_items.py DIRECTORY [--items 1000000]

The files are written here without the model and without fsync, each as `put` would write it: the manifest of one item
with another id and another text. Then another process opens the store and runs typical operations, with an empty
process memory and a warm page cache. Writes benchmarks/results/many_items.json and prints a table; the files stay for
another run.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TypeVar

from kvcag import HFEngine, KVCacheMemory
from kvcag.stores.disk import DiskStore
from kvcag.stores.files import seal
from kvcag.sync import diff
from kvcag.testing import byte_tokenizer, tiny_model

T = TypeVar("T")
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


def measure(directory: Path, items: int) -> dict[str, float]:
    """Seconds of each thing that is done to a store."""
    memory = memory_of(directory)
    store, seconds = memory.store, dict[str, float]()
    wanted = [memory.documents.key(memory._segment(text_of(number))) for number in range(0, items, items // 1000)]

    def listed() -> int:
        return sum(1 for _ in store.keys())  # noqa: SIM118 - a store is no dict

    def timed(what: str, act: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = act()
        seconds[what] = time.perf_counter() - began
        print(f"{what:28} {seconds[what]:10.3f} s", flush=True)
        return result

    timed("open", lambda: DiskStore(directory, 64 << 30))
    found = timed("1,000 looked up", lambda: sum(store.contains(key) for key in wanted))
    assert found == len(wanted)
    timed("1,000 read", lambda: [store.get(key) for key in wanted])
    timed("first 100 ids", lambda: list(islice(store.keys(), 100)))
    count = timed("every id", listed)
    assert count >= items
    timed("every manifest", lambda: sum(1 for _ in store.listing()))
    timed("number and bytes", store.stats)
    read = map(memory.read, map(text_of, range(items)))
    new = timed("what is new of the corpus", lambda: diff(memory.documents, (), read))
    assert not new.new
    del new
    timed("one put", lambda: memory.add("One more."))
    timed("100 more", lambda: memory.add([f"Another {number}." for number in range(100)]))
    report = timed("sync", lambda: memory.sync([text_of(number) for number in range(items)]))
    assert report.encoded == 0
    command = [sys.executable, "-m", "kvcag", "inspect", wanted[1].removeprefix("kv:sha256:")[:16]]
    command += ["--store", str(directory)]
    timed("find a short id", lambda: subprocess.run(command, check=True, capture_output=True))
    return seconds


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
    print(f"{'memory at its peak':28} {peak:10.0f} MiB")


if __name__ == "__main__":
    main()
