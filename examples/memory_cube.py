"""A memory cube: edit notes, ask about them, and move them with their caches.

    python examples/memory_cube.py [MODEL]

Each note is encoded once. An edit deletes the cache of that note only. A dump contains texts and caches, so on another
machine the model reads only the question. Needs `pip install "kvcag[demo]"`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from kvcag import HFEngine, MemoryCube, TextualMemoryItem
from kvcag.cube.memory_cube import CubeAnswer
from kvcag.demo.model import embedded_model

NOTES = {
    "lighthouse": "The lighthouse on Harbour Street was painted green in 1931 by a man called Ottokar Lund.",
    "bakery": "The bakery opens at six in the morning, and is closed on Mondays.",
    "ferry": "The ferry to the island costs four crowns, and dogs travel free of charge.",
}
INSTRUCTION = "Answer the question using only these notes."


def ask(cube: MemoryCube, question: str) -> CubeAnswer:
    """Ask a question, and show which side of the cube answered."""
    answer = cube.ask(question, max_new_tokens=28)
    report = answer.report
    print(f"{question}\n  {answer.text.strip()}")
    print(f"  [{answer.side}: {report.encoded_tokens} of {report.context_tokens} tokens encoded]")
    return answer


def main(model: str, folder: str | Path) -> list[CubeAnswer]:
    engine = HFEngine.from_pretrained(model)
    cube = MemoryCube(engine, instruction=INSTRUCTION, namespace="harbour")
    cube.add([TextualMemoryItem(id=id, memory=text) for id, text in NOTES.items()])
    print(f"{cube.encode()} notes encoded\n")
    answers = [ask(cube, "Who painted the lighthouse?")]

    cube.edit("ferry", "The ferry to the island costs nine crowns since May.")  # deletes its cache; the others stay
    answers.append(ask(cube, "What does the ferry cost?"))  # encodes only that note
    cube.delete("bakery")  # deletes every cache made from it

    cube.dump(folder)  # copy this folder to another machine …
    elsewhere = MemoryCube.from_dir(folder, HFEngine.from_pretrained(model))  # … and load it there
    print(f"\nmoved: {len(elsewhere.get_all())} notes")
    answers.append(ask(elsewhere, "Who painted the lighthouse?"))
    return answers


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(sys.argv[1] if len(sys.argv) > 1 else str(embedded_model()), Path(place) / "cube")
