"""A cube that is dumped, moved and loaded in a fresh process, on the real model."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvcag import HFEngine, MemoryCube
from kvcag.core import TextualMemoryItem

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "memory_cube.py"
HEAD = "Answer the question using only these notes."
TEXTS = {
    "lighthouse": "The lighthouse on Harbour Street was painted green in 1931 by a man called Ottokar Lund.",
    "bakery": "The bakery opens at six, except on Mondays, when it stays closed because the oven is cleaned.",
    "ferry": "The ferry to the island costs four crowns, and dogs travel free of charge in any season.",
}
QUESTION = "Who painted the lighthouse?"

FRESH = """
import json, sys, warnings
from tests.forwards import forward_lengths
from kvcag import HFEngine, MemoryCube
model, folder, question, strategy, *dtypes = sys.argv[1:]
for dtype in dtypes:
    engine = HFEngine.from_pretrained(model, dtype=dtype, device="cpu")
    with warnings.catch_warnings(record=True) as said, forward_lengths(engine.model) as lengths:
        warnings.simplefilter("always")
        cube = MemoryCube.from_dir(folder, engine, strategy=strategy)
        loading = list(lengths)
        answer = cube.ask(question, max_new_tokens=28)
    report = answer.report
    print(json.dumps({
        "answer": answer.text, "side": answer.side, "encoded": answer.encoded, "mode": report.mode,
        "context": report.context_tokens, "encoded_tokens": report.encoded_tokens,
        "recomputed": report.recomputed_tokens, "prompt": answer.usage.prompt_tokens,
        "loading": loading, "first": lengths[len(loading)],
        "warnings": [[type(w.message).__name__, str(w.message)] for w in said],
    }))
"""


def asked_elsewhere(model: Path, folder: Path, strategy: str, *dtypes: str) -> list[dict[str, Any]]:
    """What a process that knows nothing but the folder answers, with a model of each dtype."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(model), str(folder), QUESTION, strategy, *dtypes],
        cwd=ROOT,  # where the script finds `tests`
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(dtypes) :]]


def test_a_cube_moves_to_a_fresh_process(smollm2_engine: HFEngine, smollm2_path: Path, tmp_path: Path) -> None:
    cube = MemoryCube(smollm2_engine, instruction=HEAD)
    cube.add([TextualMemoryItem(id=id, memory=text) for id, text in TEXTS.items()])
    assert cube.encode() == len(TEXTS)
    here = cube.ask(QUESTION, strategy="exact", max_new_tokens=28)  # kept together, too
    assert "Ottokar Lund" in here.text
    cube.dump(tmp_path / "dump")
    moved = (tmp_path / "dump").rename(tmp_path / "elsewhere")

    [exact] = asked_elsewhere(smollm2_path, moved, "exact", "float32")
    assert (exact["side"], exact["mode"], exact["encoded"]) == ("prefix", "prefix", [])
    assert (exact["encoded_tokens"], exact["recomputed"], exact["warnings"]) == (0, 0, [])
    assert exact["loading"] == []
    assert exact["first"] == exact["prompt"] - exact["context"]  # the tail, and nothing before it
    assert exact["answer"] == here.text  # token for token

    merged, other = asked_elsewhere(smollm2_path, moved, "query", "float32", "bfloat16")
    assert (merged["side"], merged["encoded_tokens"], merged["warnings"]) == ("merged", 0, [])
    assert 0 < merged["recomputed"] <= 0.2 * merged["context"]
    assert "Ottokar Lund" in merged["answer"]

    assert [kind for kind, _ in other["warnings"]] == ["CacheWarning"]
    assert "dtype: float32, not bfloat16" in other["warnings"][0][1]
    assert (other["side"], sorted(other["encoded"])) == ("encoded", sorted(TEXTS))
    assert other["encoded_tokens"] > other["context"] / 2
    assert "Ottokar Lund" in other["answer"]


def test_the_example_runs(smollm2_path: Path, tmp_path: Path) -> None:
    first, edited, moved = runpy.run_path(str(EXAMPLE))["main"](str(smollm2_path), tmp_path / "cube")
    assert (first.side, edited.encoded, moved.side) == ("merged", ("ferry",), "merged")
    assert moved.report.encoded_tokens == 0
    assert [text.id for text in moved.sources] == ["lighthouse", "ferry"]
    assert "Lund" in first.text
    assert "nine" in edited.text
    assert "Lund" in moved.text
