"""Measures how long one client of a service waits for other clients.

    PYTHONPATH=. python benchmarks/service.py [--repeat 5] [--out FILE]

SmolLM2 in fp32 behind FastAPI (`tests/service.py`), real connections on 127.0.0.1:

- "hi" alone, beside a prompt of 1,500 tokens that is being prefilled, and after eight such prompts whose clients
  disconnected: seconds to the first piece;
- sixteen clients with prompts of 300 tokens, half of which disconnect: the slowest answer of `/health` meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from measuring import machine

from kvcag import HFEngine, KVCacheMemory
from kvcag.demo.model import embedded_model
from tests.service import app_of, asked, serving

LONG, SHORT = 1500, 300
NEW_TOKENS = 16


def prompt(tokens: int, number: int) -> str:
    """About so many tokens, unlike any other prompt's."""
    return f"Number {number}: " + "the library opens at nine, " * (tokens // 6)


def first_piece(address: str) -> float:
    """Seconds until the first piece of the answer to "hi"."""
    began = time.perf_counter()
    asked(address, "hi", leave_after=1)
    return time.perf_counter() - began


def slowest_health(address: str, clients: ThreadPoolExecutor, repeat: int) -> list[float]:
    """Seconds of each `/health` while sixteen clients ask and every second one leaves."""
    running = [
        clients.submit(asked, address, prompt(SHORT, 100 * repeat + number), number % 2 or None) for number in range(16)
    ]
    seconds = []
    with httpx.Client(timeout=60) as client:
        while not all(answer.done() for answer in running):
            began = time.perf_counter()
            client.get(f"{address}/health")
            seconds.append(time.perf_counter() - began)
            time.sleep(0.05)
    for answer in running:
        answer.result()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    engine = HFEngine.from_pretrained(embedded_model(), dtype="float32", device="cpu")
    memory = KVCacheMemory(engine)
    waits: dict[str, list[float]] = {"alone": [], "beside a long prompt": [], "after eight cancelled": []}
    health: list[float] = []
    with serving(app_of(memory, max_new_tokens=NEW_TOKENS)) as address, ThreadPoolExecutor(17) as clients:
        first_piece(address)  # the first question measures the model
        for repeat in range(given.repeat):
            waits["alone"].append(first_piece(address))
            long = clients.submit(asked, address, prompt(LONG, repeat))
            time.sleep(1)
            waits["beside a long prompt"].append(first_piece(address))
            long.result()
            leaving = [clients.submit(asked, address, prompt(LONG, 1000 + 8 * repeat + n), 0) for n in range(8)]
            for client in leaving:
                client.result()
            waits["after eight cancelled"].append(first_piece(address))
        for repeat in range(given.repeat):
            health += slowest_health(address, clients, repeat)
    figures = {
        "machine": machine(engine.model.device),
        "first piece of hi, s": {name: {"median": statistics.median(s), "most": max(s)} for name, s in waits.items()},
        "health, ms": {"median": 1000 * statistics.median(health), "most": 1000 * max(health), "count": len(health)},
    }
    print(json.dumps(figures, indent=1))
    if given.out:
        given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
