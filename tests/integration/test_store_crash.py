"""What is promised when processes die, race and multiply. The short form of what `benchmarks/store_stress.py` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STRESS = Path(__file__).parents[2] / "benchmarks" / "store_stress.py"


def stress(*arguments: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(STRESS), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_writer_killed_at_any_moment_loses_nothing_that_put_reported(tmp_path: Path) -> None:
    assert "0 lost, 0 torn, 0 files left over" in stress("kill", tmp_path, "--moments", 60)


def test_processes_and_threads_on_the_same_keys_never_tear_or_lose(tmp_path: Path) -> None:
    assert "0 torn, 0 lost, 0 stuck" in stress("race", tmp_path, "--seconds", 6)


def test_ten_thousand_items_open_list_and_look_up_with_flat_memory(tmp_path: Path) -> None:
    assert "10000 listed" in stress("many", tmp_path, "--items", 10_000)


@pytest.fixture(autouse=True)
def _posix() -> None:
    if os.name == "nt":
        pytest.skip("locks and kill are POSIX here")
