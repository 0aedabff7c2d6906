"""Measures a newcomer's first minutes: three ways to a first right answer, each in a new environment.

    python benchmarks/first_minutes.py                  # writes benchmarks/results/first-minutes.json

It clones this checkout as it is committed, and types what the README says: `make demo`. Then it builds a wheel of the
clone, installs it into a clean environment, asks a folder of text files from the command line, and runs the chain of
`examples/langchain_rag_to_cag.py` before and after. An answer counts if it has the word that is right. Needs uv and a
package registry; takes five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pydoc_data.topics
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from measuring import processor

import kvcag

ROOT = Path(__file__).parents[1]
QUESTION, RIGHT, SOURCE = "What happens when 0.0 is raised to a negative power?", "ZeroDivisionError", "power.txt"
SECOND, SECOND_RIGHT = "What exception is raised if the name is unbound?", "NameError"
TOPICS = (
    *("break", "pass", "continue", "while", "return", "yield", "lists", "imaginary", "numbers", "del", "nonlocal"),
    "power",
)


class Journey:
    """Steps of one way, each with its seconds."""

    def __init__(self, name: str) -> None:
        self.name, self.steps = name, []

    def step(
        self, what: str, command: list[str | Path], folder: Path, environment: dict[str, str], right: str = ""
    ) -> str:
        """Run a command and keep its time. Ends the measurement if it fails, or does not say what is right."""
        began = time.perf_counter()
        done = subprocess.run(
            list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        taken = time.perf_counter() - began
        said = done.stdout + done.stderr
        if done.returncode or right not in said:
            raise SystemExit(f"{what}: exit code {done.returncode}, expected {right!r}\n{said[-3000:]}")
        self.add(what, taken)
        return said

    def add(self, what: str, seconds: float) -> None:
        self.steps.append({"step": what, "s": round(seconds, 1 if seconds < 10 else 0)})
        print(f"{self.name}: {what}: {seconds:.1f} s", flush=True)

    @property
    def facts(self) -> dict[str, object]:
        total = sum(step.get("s", 0) for step in self.steps)
        return {"name": self.name, "steps": self.steps, "total_s": round(total)}


def first_answer(folder: Path, environment: dict[str, str]) -> Journey:
    """From a clone to the first right answer."""
    journey = Journey("clone to first right answer")
    journey.step("git clone", ["git", "clone", "--quiet", ROOT, "clone"], folder, environment)
    clone = folder / "clone"
    journey.step("make demo: the packages", ["make", ".venv/.installed-demo"], clone, environment)
    model = [".venv/bin/python", "-m", "kvcag.demo.model"]
    journey.step("make demo: the model, downloaded and converted", model, clone, environment)
    asked = ["make", "demo", f"ARGS=--question '{QUESTION}'"]
    said = journey.step("make demo: documents encoded, both answers", asked, clone, environment, RIGHT)
    print(said)
    return journey


def clean(folder: Path, environment: dict[str, str], journey: Journey) -> Path:
    """The Python of a clean environment with the wheel of the clone."""
    clone, python = folder / "clone", folder / "clean" / "bin" / "python"
    uv = shutil.which("uv") or str(clone / ".venv" / "bin" / "uv")
    subprocess.run(
        [uv, "build", "--quiet", "--wheel", "--out-dir", folder / "dist", clone], env=environment, check=True
    )
    wheel = next((folder / "dist").glob("*.whl"))
    began = time.perf_counter()
    lock = clone / "requirements.lock"
    for command in (
        [uv, "venv", "--quiet", "--seed", "--python", clone / ".venv" / "bin" / "python", folder / "clean"],
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--constraint",
            lock,
            "torch",
        ],  # by pip: its own settings say where
        [
            *(uv, "pip", "install", "--quiet", "--python", python, "--constraint", lock),
            *(f"{wheel}[demo,langchain]", "langchain-classic", "langchain-huggingface"),
        ],
    ):
        subprocess.run(command, env=environment, cwd=folder, check=True)
    journey.add("the wheel and what it needs, installed", time.perf_counter() - began)
    return python


def first_citation(folder: Path, environment: dict[str, str]) -> Journey:
    """From a folder of files to the first cited answer."""
    journey = Journey("folder of files to first cited answer")
    python = clean(folder, environment, journey)
    notes = folder / "notes"
    notes.mkdir()
    for topic in TOPICS:
        (notes / f"{topic}.txt").write_text(pydoc_data.topics.topics[topic], encoding="utf-8")
    kvcag_ = python.with_name("kvcag")
    for what, question, right in (
        ("first question: twelve files encoded, answered", QUESTION, RIGHT),
        ("second question: nothing encoded", SECOND, SECOND_RIGHT),
    ):
        asked = [kvcag_, "ask", "notes/", question, "--max-new-tokens", "48"]
        said = journey.step(what, asked, folder, environment, right)
        print(said)
        assert re.search(r"^from .*\.txt", said, re.MULTILINE), "it cites its files"
        if question == QUESTION:
            assert SOURCE in said, said
    return journey


def chains(folder: Path, environment: dict[str, str]) -> Journey:
    """From a RAG chain to a CAG chain: how many lines change, and when the first words of each answer come."""
    journey = Journey("RAG chain to CAG chain")
    script = shutil.copy(ROOT / "examples" / "langchain_rag_to_cag.py", folder)
    said = journey.step(
        "both chains, three questions each", [folder / "clean" / "bin" / "python", script], folder, environment, RIGHT
    )
    print(said)
    assert said.count(RIGHT) == said.count(SECOND_RIGHT) == 2, "both chains answer rightly"
    before, after = said.split("after:")
    for name, part in (("before", before), ("after", after)):
        first = [float(each) for each in re.findall(r"^\s+([\d.]+) s to the first words", part, re.MULTILINE)]
        assert len(first) == 3, part
        journey.steps.append({"step": f"{name}: seconds to the first words of three answers", "each_s": first})
    return journey


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "first-minutes.json")
    out = parser.parse_args().out
    load = os.getloadavg()[0]
    example = (ROOT / "examples" / "langchain_rag_to_cag.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="stranger-") as made:
        folder = Path(made)
        hidden = ("PYTHON", "VIRTUAL_ENV", "KVCAG")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        environment |= {"KVCAG_CACHE": str(folder / "cache"), "NO_COLOR": "1"}
        journeys = [make(folder, environment) for make in (first_answer, first_citation, chains)]
    facts = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            "load_before": round(load, 2),
            "python": platform.python_version(),
            "kvcag": kvcag.__version__,
        },
        "changed_lines": example.split("def after(")[1].split("\ndef ")[0].count("# <-"),
        "journeys": [journey.facts for journey in journeys],
    }
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
