"""llama.cpp over the same tokens, in a separate environment. `llamacpp_worker.py` runs there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A process that stays, so that its questions take turns with everybody else's. It speaks JSON lines."""

    name = "llama.cpp Q4_1"

    def __init__(self, python: Path, gguf: Path, threads: int, context: int, tokens: int) -> None:
        script = Path(__file__).with_name("llamacpp_worker.py")
        command = [str(python), str(script), str(gguf), str(threads), str(context), str(tokens)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version: str = self.read()

    def cold(self, ids: list[int]) -> float:
        """Seconds to read a context of which nothing is known."""
        return float(self.call(do="cold", ids=ids))

    def ask(self, context: list[int], tail: list[int]) -> list[float]:
        """Seconds to the first token over the context that was read, and from each token to the next."""
        return list(self.call(do="ask", ids=[*context, *tail]))

    def call(self, **given: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the llama.cpp worker ended with {self.process.wait()}; its error stands above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
