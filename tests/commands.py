"""The `kvcag` command as its user meets it: in this process by typer's runner, or as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from kvcag.cli.app import app
from kvcag.testing import byte_tokenizer, tiny_model


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Kvcag:
    """Runs commands with a model and a store of their own.

    Args:
        folder: for the store, the cache folder, and what the caller writes; it is the working directory too.
        model: a folder with a model.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.environment = {
            "KVCAG_MODEL": str(model),
            "KVCAG_STORE": str(folder / "kv"),
            "KVCAG_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }

    def __call__(self, *arguments: object, input: str | None = None) -> Done:
        done = CliRunner().invoke(
            app, [str(argument) for argument in arguments], input=input, env=self.environment, catch_exceptions=False
        )
        return Done(done.exit_code, done.stdout, done.stderr)

    def run_python(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script in a Python of its own, where the commands find the same model and store."""
        return subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **self.environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def process(self, *arguments: object, **popen: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(
            [sys.executable, "-m", "kvcag", *map(str, arguments)],
            env={**os.environ, **self.environment},
            cwd=self.folder,
            **popen,
        )


def saved_model(folder: Path, **config: Any) -> Path:
    """A tiny model that never ends an answer by itself, saved to a folder."""
    tiny_model(eos_token_id=None, **config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file
