"""Measures from which length on storing an instruction saves time: reading it, writing it, and loading it.

    python benchmarks/stored_instruction.py --out benchmarks/results/stored_instruction.json

Medians in milliseconds, each without recent contexts, as after a restart. `read` is the prefill, `write` is
the first process's time to write the file, and `take` is the time of a restarted process to load it instead of `read`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import machine, seconds

from kvcag import HFEngine, KVCacheMemory, contexts
from kvcag.demo.model import embedded_model
from kvcag.stores import DiskStore
from kvcag.stores.files import is_instruction


def measure(engine: HFEngine, token_ids: tuple[int, ...], folder: Path) -> dict[str, float]:
    """Milliseconds of one instruction."""
    store, cpu = DiskStore(folder), torch.device("cpu")

    def instruct() -> None:
        with KVCacheMemory(engine, store).documents.instruction(token_ids):
            engine.prefill(token_ids)

    engine.forget()
    read = seconds(cpu, lambda: engine.prefill(token_ids))
    write = seconds(cpu, instruct)
    engine.forget()
    take = seconds(cpu, instruct)
    size = store.stats().bytes
    store.erase(key for key in list(store.keys()) if is_instruction(key))
    return {"read": 1000 * read, "write": 1000 * write, "take": 1000 * take, "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="*", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    contexts.WORTH_STORING = 1  # what is measured here decides it
    engine = HFEngine.from_pretrained(embedded_model())
    word = engine.template.encode_text(" reading")
    rows = []
    for tokens in options.tokens:
        token_ids = (word * tokens)[:tokens]
        with tempfile.TemporaryDirectory() as folder:
            taken = [measure(engine, token_ids, Path(folder)) for _ in range(options.times)]
        medians = {name: round(statistics.median(one[name] for one in taken), 1) for name in taken[0]}
        rows.append({"tokens": tokens, **medians})
        print(rows[-1], flush=True)
    result: dict[str, Any] = {"model": engine.model_name, "machine": machine(torch.device("cpu")), "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
