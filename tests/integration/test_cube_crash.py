"""A process that is killed while it dumps a cube."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcag import HFEngine, MemoryCube
from kvcag.cube.dump import read_dump
from kvcag.testing import byte_tokenizer, tiny_model

DUMPING = """
import os, sys
import torch
torch.set_num_threads(1)
from kvcag.testing import byte_tokenizer, tiny_model
from kvcag import HFEngine, MemoryCube
cube = MemoryCube(HFEngine(tiny_model(), byte_tokenizer()), instruction="Answer from the notes.")
cube.add([f"Note {number} of many, each of some words." for number in range(12)])
cube.encode()
for _ in sys.stdin:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        print("dead", flush=True)
        continue
    print(os.getpid(), flush=True)
    turn = 0
    while True:
        turn += 1
        cube.edit(cube.get_all()[0].id, f"Turn {turn}.")
        cube.dump(sys.argv[1])
        print(turn, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="fork and kill are POSIX")
def test_a_dump_killed_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    folder, engine = tmp_path / "cube", HFEngine(tiny_model(), byte_tokenizer())
    arguments = [sys.executable, "-c", DUMPING, str(folder)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for moment in range(20):
            process.stdin.write("go\n")
            process.stdin.flush()
            child, done = int(process.stdout.readline()), int(process.stdout.readline())
            time.sleep(0.007 * moment)  # one dump is whole, and the next one somewhere
            os.kill(child, signal.SIGKILL)
            while (line := process.stdout.readline()) != "dead\n":
                done = int(line)
            read = read_dump(folder)
            current = json.loads((folder / "cube.json").read_text())["directory"]
            assert {path.name for path in folder.iterdir()} == {".cube.json.lock", "cube.json", current}
            assert len(read.texts) == 12
            assert int(read.texts[0].memory.removeprefix("Turn ").rstrip(".")) in (done, done + 1)
        process.stdin.close()
    cube = MemoryCube.from_dir(folder, engine)
    assert cube.get_all() == read.texts
    assert cube.encode() == 1  # the text that was edited last
    cube.dump(folder)
    current = json.loads((folder / "cube.json").read_text())["directory"]
    assert {path.name for path in folder.iterdir()} == {".cube.json.lock", "cube.json", current}
