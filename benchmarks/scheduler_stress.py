"""Kills a process while a `CacheScheduler` promotes, demotes and answers, and checks that nothing was lost.

    python benchmarks/scheduler_stress.py DIR --moments 200

A child works on a tiny random model and reports the caches and counts after each step. It is killed at some moment.
Then the text of every cache that was ever reported must be known, every stored cache must be whole, no count may be
lower than reported, the database must open, and the budget must hold. Exits with 1 otherwise. The test suite runs a
short form.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from kvcag import CacheScheduler, HFEngine, KVCacheMemory
from kvcag.chat_template import Document
from kvcag.errors import UnknownItemError
from kvcag.stores.disk import DiskStore
from kvcag.stores.verify import verify
from kvcag.testing import byte_tokenizer, tiny_model

torch.set_num_threads(1)  # before any fork

TEXTS = [f"Document {number} says this and that about {number}. " * (1 + number % 4) for number in range(12)]
BUDGET = 400 * 384
STEPS = ("promote", "demote", "run", "ask")


def open_scheduler(path: Path, engine: HFEngine) -> CacheScheduler:
    memory = KVCacheMemory(engine, DiskStore(path / "kv"))
    return CacheScheduler(memory, BUDGET, state=path / "scheduler.sqlite", every_s=None, quiet_s=0)


def step(scheduler: CacheScheduler, what: str, dice: random.Random) -> None:
    text = dice.choice(TEXTS)
    if what == "promote":
        scheduler.promote(text)
    elif what == "demote":
        scheduler.demote(dice.choice(list(scheduler.memory.store.keys()) or [text]))
    elif what == "run":
        scheduler.observe([text, text])
        scheduler.run_once()
    else:
        messages = [{"role": "system", "content": [Document(text)]}, {"role": "user", "content": "What?"}]
        list(scheduler.memory.stream(messages, sampling=scheduler.memory.engine.sampling(max_new_tokens=1)))


def work_until_killed(path: Path, engine: HFEngine, seed: int, report: int) -> None:
    dice = random.Random(seed)
    scheduler = open_scheduler(path, engine)
    while True:
        what = dice.choice(STEPS)
        os.write(report, f"begin {what}\n".encode())
        step(scheduler, what, dice)
        held = scheduler.memory.store.keys()
        lines = [f"kept {key}" for key in held]
        if what == "run":
            lines += [f"count {digest} {stats.count}" for digest, stats in scheduler._texts.known.items()]
        os.write(report, "".join(f"{line}\n" for line in [*lines, "end"]).encode())


def killed_worker(path: Path, engine: HFEngine, seed: int) -> list[list[str]]:
    """What a child reported before it was killed, at some moment within its first steps."""
    reported, report = os.pipe()
    child = os.fork()
    if not child:
        try:
            work_until_killed(path, engine, seed, report)
        finally:
            os._exit(1)
    os.close(report)
    with open(reported, encoding="ascii") as lines:
        seen, ended = [], 0
        while ended < random.Random(seed).randint(1, 6):
            seen.append(next(lines))
            ended += seen[-1] == "end\n"
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return [line.split() for line in [*seen, *lines] if line.endswith("\n")]


def kill(path: Path, moments: int) -> bool:
    engine = HFEngine(tiny_model(), byte_tokenizer())
    kept: set[str] = set()
    counts: dict[str, int] = {}
    within = dict.fromkeys(STEPS, 0)
    lost = damaged = over = 0
    for moment in range(moments):
        lines = killed_worker(path, engine, moment)
        kept |= {line[1] for line in lines if line[0] == "kept"}
        counts |= {line[1]: int(line[2]) for line in lines if line[0] == "count"}
        if lines[-1][0] == "begin":
            within[lines[-1][1]] += 1
        damaged += len(verify(path / "kv", repair=True).damaged)
        with open_scheduler(path, engine) as scheduler:
            for key in kept:
                try:
                    text = scheduler.why(key).text
                except UnknownItemError:
                    text = None
                lost += text is None or text.strip() not in map(str.strip, TEXTS)
            lost += sum(scheduler._texts.stats(digest).count < count for digest, count in counts.items())
            over += scheduler.metrics()["cached_bytes"] > BUDGET
            over += scheduler.metrics()["caches"] != len(list(scheduler.memory.store.keys()))
    rubbish = list(path.rglob("*.tmp"))
    said = ", ".join(f"{count} within {what}" for what, count in within.items())
    print(
        f"killed at {moments} moments ({said}); {len(kept)} caches reported: {lost} lost, {damaged} damaged, "
        f"{over} over the budget, {len(rubbish)} files left over"
    )
    return not (lost or damaged or over or rubbish) and bool(kept and counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--moments", type=int, default=200)
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    sys.exit(0 if kill(given.directory, given.moments) else 1)


if __name__ == "__main__":
    main()
