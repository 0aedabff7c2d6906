"""Processes that die, and processes that end without closing. The long form is `benchmarks/scheduler_stress.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcag.scheduler import read_texts

ROOT = Path(__file__).parents[2]
LEFT_OPEN = """
import time
from kvcag.testing import byte_tokenizer, tiny_model
from kvcag import CacheScheduler, HFEngine, KVCacheMemory
engine = HFEngine(tiny_model(max_position_embeddings=200_000), byte_tokenizer())
scheduler = CacheScheduler(KVCacheMemory(engine), 1 << 30, state={state!r}, quiet_s=0)
scheduler.observe(["x" * 100_000, "x" * 100_000])
while not engine.lock._holds_in_background:
    time.sleep(0.001)
print("encoding", flush=True)
"""


def python(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )


@pytest.mark.skipif(os.name == "nt", reason="fork and kill are POSIX")
def test_a_scheduler_killed_at_any_moment_loses_nothing_that_was_there(tmp_path: Path) -> None:
    done = python(str(ROOT / "benchmarks" / "scheduler_stress.py"), str(tmp_path), "--moments", "25", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 lost, 0 damaged, 0 over the budget, 0 files left over" in done.stdout


def test_a_process_ends_though_its_scheduler_is_open_and_encoding(tmp_path: Path) -> None:
    script = LEFT_OPEN.format(state=str(tmp_path / "scheduler.sqlite"))
    began = time.monotonic()
    done = python("-c", script, timeout=120)
    said = [line for line in done.stderr.splitlines() if "torchao" not in line and "_pytree.py" not in line]
    assert (done.returncode, done.stdout, said) == (0, "encoding\n", [])  # torchao speaks when it is imported
    assert time.monotonic() - began < 60  # attention over a hundred thousand tokens would take minutes
    [stats] = read_texts(tmp_path / "scheduler.sqlite")
    assert stats.count == 2  # saved on the way out
