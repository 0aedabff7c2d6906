"""A process that is forked while another thread generates works: it does not wait for threads that it does not have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WAIT = """
import os, time
def ended(child):
    until = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
    print("hung" if done == (0, 0) else os.waitstatus_to_exitcode(done[1]), flush=True)
"""

FORKS = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(2)
from kvcag import HFEngine, KVCacheMemory
from kvcag.testing import byte_tokenizer, tiny_model
engine = HFEngine(tiny_model(hidden_size=256, intermediate_size=512), byte_tokenizer())
memory = KVCacheMemory(engine, instruction="Answer.")
memory.add(["The library opens at nine. " * 8, "The harbour opens at five. " * 8])
expected = str(memory.ask("When?", max_new_tokens=4))
stop = threading.Event()
def generate():
    number = 0
    while not stop.is_set():
        number += 1
        memory.ask(f"{number}. Which of them opens first, and when? " * 10, max_new_tokens=20)
thread = threading.Thread(target=generate)
thread.start()
for number in range(8):
    time.sleep(0.05 + 0.013 * number)
    child = os.fork()
    if not child:
        memory.add(f"Child {number}. " * 5)
        again = KVCacheMemory(engine, memory.store, instruction="Answer.")
        os._exit(0 if again.ask("What?", max_new_tokens=4).usage.completion_tokens else 1)
    ended(child)
stop.set()
thread.join()
"""


LEARNS = """
import threading
from kvcag import HFEngine
from kvcag.calibration import usual_drift_of
from kvcag.testing import byte_tokenizer, tiny_model
engine = HFEngine(tiny_model(), byte_tokenizer())
begun, forward = threading.Event(), engine.forward
def slowly(*given):
    begun.set()
    time.sleep(0.2)
    return forward(*given)
engine.forward = slowly
thread = threading.Thread(target=usual_drift_of, args=(engine,))
thread.start()
begun.wait()
child = os.fork()
if not child:
    engine.forward = forward
    os._exit(usual_drift_of(engine) is None)
ended(child)
thread.join()
"""


def run(script: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "KVCAG_CACHE": str(cache)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-c", WAIT + script]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX")
def test_a_child_that_is_forked_while_another_thread_generates_works(tmp_path: Path) -> None:
    """It hung, 10 times of 10."""
    done = run(FORKS, tmp_path)
    assert done.stdout.split() == ["0"] * 8, done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX")
def test_a_child_that_is_forked_while_another_thread_learns_a_drift_works(tmp_path: Path) -> None:
    done = run(LEARNS, tmp_path)
    assert done.stdout.split() == ["0"], done.stdout + done.stderr
