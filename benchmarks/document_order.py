"""Measures the share of documents that a server finds cached at the beginning of prompts, for each document order.

    python benchmarks/document_order.py

Questions retrieve a few of many documents, by Zipf's law; the popular documents change over time. A document counts as
found if an earlier prompt began with the same documents up to this one. A prefix cache without a limit would reuse it.
"""

from __future__ import annotations

import argparse
import random

from kvcag.chat_template import Prompt
from kvcag.engines.vllm.engine import DocumentSorter


def retrievals(questions: int, documents: int, retrieved: int, seed: int) -> list[list[int]]:
    """The documents of each question; every quarter of the questions, popularity moves on by a tenth."""
    chosen = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(documents)]
    asked = []
    for question in range(questions):
        moved = question * 4 // questions * (documents // 10)
        found: dict[int, None] = {}
        while len(found) < retrieved:
            found[(chosen.choices(range(documents), weights)[0] + moved) % documents] = None
        asked.append(list(found))
    return asked


def found(order: str, asked: list[list[int]]) -> float:
    """The share of documents found."""
    sorter, begun, hits = DocumentSorter(order), set(), 0
    for numbers in asked:
        prompt = Prompt((), tuple((number,) for number in numbers), (0,))
        ids = sorter.arrange(prompt, count=True).document_ids
        beginnings = [ids[: end + 1] for end in range(len(ids))]
        hits += sum(beginning in begun for beginning in beginnings)
        begun.update(beginnings)
    return hits / sum(map(len, asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--retrieved", type=int, nargs="+", default=[2, 5, 8])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("documents a question | as retrieved | canonical | frequent first")
    for retrieved in given.retrieved:
        asked = retrievals(given.questions, given.documents, retrieved, given.seed)
        shares = " | ".join(f"{found(order, asked):.0%}" for order in ("given", "canonical", "frequent"))
        print(f"{retrieved} | {shares}")


if __name__ == "__main__":
    main()
