"""Compares a store with plain safetensors, in one run: write, open, read, checksums, int8.

    python benchmarks/store.py [--megabytes 100] [--directory DIR]

Medians over the rounds, in a warm page cache. Writes benchmarks/results/store.json and prints a table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from kvcag.cache.layers import cache_of, layers_of
from kvcag.core import KVCacheItem
from kvcag.stores.disk import DiskStore
from kvcag.stores.format import read_item, write_item

RESULTS = Path(__file__).parent / "results" / "store.json"
ROUNDS = 15
LAYERS, HEADS, HEAD_DIM = 30, 3, 64  # SmolLM2-135M's geometry
BYTES_PER_TOKEN = 2 * LAYERS * HEADS * HEAD_DIM * 2


def side_by_side(*acts: Callable[[], object]) -> list[float]:
    """Median milliseconds of each. They take turns, so that other load on the machine affects all of them alike."""
    taken: list[list[float]] = [[] for _ in acts]
    for _ in range(ROUNDS):
        for times, act in zip(taken, acts, strict=True):
            begin = time.perf_counter()
            act()
            times.append(1000 * (time.perf_counter() - begin))
    return [statistics.median(times) for times in taken]


def made(megabytes: int) -> KVCacheItem:
    tokens = megabytes * 1_000_000 // BYTES_PER_TOKEN
    states = [torch.randn(1, HEADS, tokens, HEAD_DIM).to(torch.bfloat16) for _ in range(2 * LAYERS)]
    cache = cache_of(zip(states[::2], states[1::2], strict=True))
    return KVCacheItem(id="benchmark", memory=cache, token_ids=torch.arange(tokens))


def touch(tensors: list[torch.Tensor]) -> None:
    """Copy every byte, as a generation does with its cache."""
    for tensor in tensors:
        tensor.clone()


def writing(item: KVCacheItem, directory: Path) -> dict[str, float]:
    tensors = {f"{n}": t for n, t in enumerate(t for kv in layers_of(item.memory) for t in kv)}
    store = DiskStore(directory / "store")

    def plain() -> None:
        save_file(tensors, directory / "plain")
        descriptor = os.open(directory / "plain", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    floor, ours, int8 = side_by_side(
        plain, lambda: store.put(item), lambda: write_item(directory / "int8", item, quantize="int8")
    )
    return {"safetensors + fsync": floor, "put": ours, "put, int8": int8}


def reading(item: KVCacheItem, directory: Path) -> dict[str, float]:
    write_item(directory / "ours", item)
    store = DiskStore(directory / "store")

    def plain_open() -> None:
        with safe_open(directory / "plain", framework="pt") as file:
            file.keys()

    def plain() -> None:
        with safe_open(directory / "plain", framework="pt") as file:
            touch([file.get_tensor(name) for name in file.keys()])  # noqa: SIM118

    def ours() -> None:
        touch([t for kv in layers_of(store.get("benchmark").memory) for t in kv])

    names = ["safetensors open", "safetensors, all layers copied", "get", "get, all layers copied"]
    names += ["get, int8, all layers copied"]
    taken = side_by_side(
        plain_open,
        plain,
        lambda: store.get("benchmark"),
        ours,
        lambda: touch([t for kv in layers_of(read_item(directory / "int8").memory) for t in kv]),
    )
    return dict(zip(names, taken, strict=True))


def checksums(size: int) -> dict[str, float]:
    data = os.urandom(size)
    names = ["xxh3_64", "xxh3_128", "crc32", "sha256"]
    taken = side_by_side(
        lambda: xxhash.xxh3_64_digest(data),
        lambda: xxhash.xxh3_128_digest(data),
        lambda: zlib.crc32(data),
        lambda: hashlib.sha256(data).digest(),
    )
    return dict(zip(names, taken, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument(
        "--directory", type=Path, help="Where to write: the file system to measure. Default: a temporary directory."
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    item = made(arguments.megabytes)
    size = len(item.token_ids) * BYTES_PER_TOKEN
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        figures = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}",
            "megabytes": size / 1e6,
            "rounds": ROUNDS,
            "milliseconds": writing(item, directory) | reading(item, directory),
            "checksum_milliseconds": checksums(size),
        }
        plain, ours, int8 = ((directory / file).stat().st_size for file in ("plain", "ours", "int8"))
    ms = figures["milliseconds"]
    figures["ratios"] = {
        "put / safetensors + fsync": ms["put"] / ms["safetensors + fsync"],
        "get / safetensors, all layers copied": ms["get, all layers copied"] / ms["safetensors, all layers copied"],
        "bytes / keys and values": ours / size,
        "int8 bytes / bfloat16 bytes": int8 / plain,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{figures['megabytes']:.0f} MB, {figures['machine']}")
    for title in ("milliseconds", "checksum_milliseconds", "ratios"):
        print(f"\n{title}")
        for name, value in figures[title].items():
            print(f"  {name:42} {value:10.3f}")


if __name__ == "__main__":
    main()
