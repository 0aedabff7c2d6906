"""kvpress, in a separate environment with the version of transformers that it needs, and a full prefill to compare.

`make bench` makes this environment (`benchmarks/peers/kvpress.txt`). The worker process keeps running, so that its
questions take turns with those of the other systems.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from kvcag import HFEngine
from peers.base import TOKENS, Answer, context_ids, prompt_ids

PYTHON = Path(__file__).parents[2] / ".venv" / "peers" / "kvpress" / "bin" / "python"


class Worker:
    """Speaks JSON lines with `compressing_worker.py`."""

    def __init__(self, engine: HFEngine, threads: int) -> None:
        script = Path(__file__).with_name("compressing_worker.py")
        command = [str(PYTHON), str(script), engine.model_name, str(engine.model.dtype), str(threads), str(TOKENS)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions: dict[str, str] = self.read()

    def call(self, **given: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the kvpress worker ended with {self.process.wait()}; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class KVPress:
    """A cache that `ExpectedAttentionPress` compressed to a half, kept between questions."""

    def __init__(self, engine: HFEngine, worker: Worker, ratio: float) -> None:
        self.engine, self.worker, self.ratio = engine, worker, ratio
        versions = f"transformers {worker.versions['transformers']}"
        self.name = f"kvpress, half kept ({versions})" if ratio else f"full prefill ({versions})"
        self.held = 0

    def prepare(self, documents: Sequence[str]) -> None:
        self.context = context_ids(self.engine, documents)
        self.held = self.worker.call(do="prepare", ids=self.context, ratio=self.ratio)["bytes"]

    def ask(self, question: str) -> Answer:
        ids = prompt_ids(self.engine, self.context, question)[0].tolist()
        return Answer(**self.worker.call(do="ask", ids=ids, ratio=self.ratio))

    @cached_property
    def versions(self) -> dict[str, str]:
        return self.worker.versions

    @property
    def bytes_held(self) -> int:
        return self.held
