"""Measures the error of merging documents that were encoded after another instruction than the question's.

    python benchmarks/instruction_key.py --data musique.json --out benchmarks/results/instruction-key.json

The protocol is that of `fidelity.py`: the same head, documents and question, and as the reference a full prefill of the
same token ids. Only the instruction before each document while it was encoded differs: the same, none, another
short one, or another long one. After the same instruction the first document is exact and is not recomputed. After
another it is moved and recomputed like the rest. `short, first same` separates the two effects: the first document
was encoded after the same instruction, the others after the short one.

`extra` is KL minus KL of `same`, question by question, with the standard error of its mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fidelity import HEAD, QUESTION, full_prefill, over_cache
from measuring import machine

from kvcag import HFEngine, KVCacheMemory
from kvcag.demo.model import embedded_model

SHORT = "You are a pirate. Answer in rhyme."
LONG = (
    "You work for the customer service of a company that sells garden furniture, lamps and barbecues in twelve "
    "countries. Be friendly and brief. Always greet the customer by name if you know it, and never promise a refund, a "
    "discount or a date of delivery: only the branch manager may do so. If a customer is angry, apologise once, and "
    "then explain what happens next. Write numbers as digits, prices in euros with two decimals, and dates as day, "
    "month and year. Use lists where there are more than three steps. Do not mention other companies or their "
    "products. When you cannot help, say so, and give the telephone number of the nearest branch. Below are the notes "
    "that our staff took during earlier calls, the newest first."
)
INSTRUCTIONS: dict[str, str | None] = {"same": HEAD, "none": None, "short": SHORT, "long": LONG}
SOURCES = {name: (name, name) for name in INSTRUCTIONS} | {"short, first same": ("same", "short")}
"""What the first document was encoded behind, and what the others were."""

STRATEGIES = (("query", 0.1), ("query", 0.2), ("rotate", 0.0))


@dataclass
class Row:
    source: str
    strategy: str
    ratio: float
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    recomputed: list[float] = field(default_factory=list)

    def summary(self, same: Row) -> dict[str, Any]:
        extra = [kl - least for kl, least in zip(self.kl, same.kl, strict=True)]
        return {
            "encoded_behind": self.source,
            "strategy": self.strategy,
            "ratio": self.ratio,
            "kl": statistics.mean(self.kl),
            "extra_kl": statistics.mean(extra),
            "extra_kl_standard_error": statistics.stdev(extra) / len(extra) ** 0.5 if len(extra) > 1 else None,
            "agreement": statistics.mean(self.agreement),
            "recomputed_share": statistics.mean(self.recomputed),
            "kl_by_question": self.kl,
        }


def measure(memories: Mapping[str, KVCacheMemory], documents: list[str], question: str, rows: list[Row]) -> int:
    """Add one question's figures to each row. Returns the tokens of its context."""
    memory, model = memories["same"], memories["same"].engine.model
    items = {name: [encoder.extract(text) for text in documents] for name, encoder in memories.items()}
    for encoded in items.values():
        memory.add(encoded)
    reference = None
    for row in rows:
        first, others = SOURCES[row.source]
        ids = [item.id for item in (items[first][0], *items[others][1:])]
        context = memory.merge(ids, question, strategy=row.strategy, ratio=row.ratio)
        if reference is None:
            reference = full_prefill(model, torch.cat([context.token_ids, context.tail_ids]))
        _, answer, expected = reference
        found = over_cache(model, context.cache, context.tail_ids, answer)
        row.kl.append((expected.exp() * (expected - found)).sum(-1).mean().item())
        row.agreement.append((expected.argmax(-1) == found.argmax(-1)).float().mean().item())
        row.recomputed.append(context.report.recomputed_tokens / context.report.context_tokens)
    memory.delete_all()
    return len(context.token_ids)


def summaries(rows: list[Row]) -> list[dict[str, Any]]:
    same = {(row.strategy, row.ratio): row for row in rows if row.source == "same"}
    return [row.summary(same[row.strategy, row.ratio]) for row in rows]


def table(size: Mapping[str, Any]) -> str:
    lines = [f"{size['documents']} documents x {size['words']} words, {size['questions']} questions"]
    lines.append(f"{'strategy':10} {'encoded behind':18} {'KL':>7} {'extra KL':>17} {'agree':>6} {'recomp.':>8}")
    for s in size["rows"]:
        name = f"{s['strategy']} {s['ratio']:.0%}" if s["ratio"] else s["strategy"]
        extra = f"{s['extra_kl']:+.4f} ± {s['extra_kl_standard_error'] or 0:.4f}"
        lines.append(
            f"{name:10} {s['encoded_behind']:18} {s['kl']:7.4f} {extra:>17} {s['agreement']:6.3f} "
            f"{s['recomputed_share']:8.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON list of questions with passages")
    parser.add_argument(
        "--size",
        nargs=3,
        type=int,
        action="append",
        metavar=("DOCS", "WORDS", "QUESTIONS"),
        help="may be repeated; default: 5 120 15 and 8 300 6",
    )
    parser.add_argument("--skip", type=int, default=50, help="questions to leave out first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    engine = HFEngine.from_pretrained(embedded_model(), "float32", "cpu")
    memories = {name: KVCacheMemory(engine, instruction=head) for name, head in INSTRUCTIONS.items()}
    result: dict[str, Any] = {
        "model": engine.fingerprint.model_name.rsplit("/", 1)[-1],
        "dtype": engine.fingerprint.dtype,
        "machine": machine(engine.model.device),
        "skipped_questions": options.skip,
        "head_tokens": {
            name: len(engine.template.split_system(head, [{"role": "user", "content": "…"}]).head_ids)
            for name, head in INSTRUCTIONS.items()
        },
        "sizes": [],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for docs, words, limit in options.size or [(5, 120, 15), (8, 300, 6)]:
        rows = [Row(source, *strategy) for strategy in STRATEGIES for source in SOURCES]
        size: dict[str, Any] = {"documents": docs, "words": words}
        result["sizes"].append(size)
        tokens = []
        for question in json.loads(options.data.read_text())[options.skip : options.skip + limit]:
            texts = [" ".join(ctx["text"].split()[:words]) for ctx in question["ctxs"][:docs]]
            documents = [f"Passage: {text}\n\n" for text in texts]
            tokens.append(measure(memories, documents, QUESTION.format(question["question"]), rows))
            size |= {"questions": len(tokens), "context_tokens": statistics.mean(tokens), "rows": summaries(rows)}
            options.out.write_text(json.dumps(result, indent=1) + "\n")  # what is measured is kept, whatever comes
            print(f"question {len(tokens)} of {limit}: {tokens[-1]} tokens", file=sys.stderr, flush=True)
        print(table(size), flush=True)


if __name__ == "__main__":
    main()
