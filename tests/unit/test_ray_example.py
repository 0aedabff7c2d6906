"""The Ray example, over a stand-in for Ray Data: one that reads lines, and calls an actor with batches as Ray does."""

from __future__ import annotations

import json
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcag.stores import DiskStore
from tests.commands import write

EXAMPLE = Path(__file__).parents[2] / "examples" / "encode_on_ray.py"


class Rows(list[dict[str, Any]]):
    """A data set in this process."""

    def map_batches(
        self,
        actor: Callable[..., Callable[[dict[str, Any]], dict[str, Any]]],
        *,
        fn_constructor_args: tuple[Any, ...],
        compute: int,
        num_gpus: float,
        batch_size: int,
    ) -> Rows:
        actors = [actor(*fn_constructor_args) for _ in range(compute)]
        made = Rows()
        for at in range(0, len(self), batch_size):
            columns = {name: np.array([row[name] for row in self[at : at + batch_size]]) for name in self[0]}
            out = actors[at // batch_size % compute](columns)
            made += [dict(zip(out, values, strict=True)) for values in zip(*out.values(), strict=True)]
        return made

    def count(self) -> int:  # type: ignore[override]
        return len(self)


def read_json(files: list[str]) -> Rows:
    return Rows(json.loads(line) for file in files for line in Path(file).read_text().splitlines())


def test_the_ray_example_encodes_each_document_once(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = types.SimpleNamespace(read_json=read_json, ActorPoolStrategy=lambda size: size)
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(data=data))
    lines = [json.dumps({"text": f"Document {number}."}) for number in range(40)]
    file = write(tmp_path / "corpus.jsonl", "\n".join([*lines, lines[0]]))
    main = runpy.run_path(str(EXAMPLE))["main"]
    store = DiskStore(tmp_path / "kv")
    assert main([str(file)], str(tmp_path / "kv"), str(tiny_folder), actors=2) == 41
    assert store.stats().items == 40
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "kv").rglob("*.safetensors")}
    assert main([str(file)], str(tmp_path / "kv"), str(tiny_folder), actors=2) == 41
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kv").rglob("*.safetensors")} == written
