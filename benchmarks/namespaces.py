"""Checks that a namespace's first answer is not faster after another namespace asked about the same text.

    python benchmarks/namespaces.py [--rounds 7] [--out benchmarks/results/namespaces.json]

One engine and one directory. In each round one namespace asks about three documents. Then a second namespace asks
about the same documents, a third about other documents of the same length, and the first again, to show a hit.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import secrets
import tempfile
from pathlib import Path
from statistics import median

from kvcag import Document, HFEngine, KVCacheMemory, Sampling
from kvcag.demo.model import embedded_model
from kvcag.stores import DiskStore

WORDS = 90


def ask(engine: HFEngine, root: str, salt: bytes, namespace: str, documents: list[str]) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens were read from caches."""
    memory = KVCacheMemory(engine, DiskStore(root, namespace=namespace, salt=salt), namespace=namespace)
    messages = [
        {"role": "system", "content": ["Read.\n\n", *map(Document, documents)]},
        {"role": "user", "content": "What is it about?"},
    ]
    usage = list(memory.stream(messages, sampling=Sampling(max_new_tokens=1)))[-1].usage
    return usage.ttft_s, usage.cached_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "namespaces.json")
    options = parser.parse_args()
    engine = HFEngine.from_pretrained(embedded_model(), dtype="float32", device="cpu")
    words = " ".join(pydoc_data.topics.topics.values()).split()
    pieces = iter([" ".join(words[at : at + WORDS]) + "\n\n" for at in range(0, len(words), WORDS)])
    salt = secrets.token_bytes(32)
    asked: dict[str, list[tuple[float, int]]] = {"same text": [], "other text": [], "own text again": []}
    with tempfile.TemporaryDirectory() as root:
        ask(engine, root, salt, "warm", [next(pieces) for _ in range(3)])
        for number in range(options.rounds):
            same, other = ([next(pieces) for _ in range(3)] for _ in range(2))
            ask(engine, root, salt, f"first-{number}", same)
            turns = [
                ("same text", f"second-{number}", same),
                ("other text", f"third-{number}", other),
                ("own text again", f"first-{number}", same),
            ]
            for name, namespace, documents in turns if number % 2 else [turns[1], turns[0], turns[2]]:
                asked[name].append(ask(engine, root, salt, namespace, documents))
    result = {
        name: {
            "median_s": median(s for s, _ in rows),
            "s": [s for s, _ in rows],
            "cached_tokens": max(n for _, n in rows),
        }
        for name, rows in asked.items()
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in result.items():
        print(f"{name:15} {row['median_s']:.3f} s, {row['cached_tokens']} tokens from caches")


if __name__ == "__main__":
    main()
