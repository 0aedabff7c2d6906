"""Writes the report's figures as Markdown, in marked sections that docs/benchmarks.md includes."""

from __future__ import annotations

import math
from typing import Any

import torch
from measuring import ms, table
from peers.ours import Exact
from peers.plain import FullPrefill

FULL, EXACT = FullPrefill.name, Exact.name
TENTH = "kvcag, query 10%"
ROTATE = "kvcag, rotate"
CORPORA = (10_000, 100_000, 1_000_000, 10_000_000)
INT8 = 0.516
"""Bytes over bfloat16's, scales included (benchmarks/int8.py)."""


def markdown(result: dict[str, Any]) -> str:
    rows = result["rows"]
    parts = {
        "machine": described(result),
        "summary": overview(rows),
        "contexts": "\n\n".join(map(context, rows)),
        "memos": memos(rows),
        "questions": questions(rows),
        "corpora": corpora(rows, result["dtype"]),
    }
    title = f"# {result['model']}, {result['dtype']}: kvcag beside what people would use instead"
    marked = (
        f"<!-- --8<-- [start:{name}] -->\n\n{text}\n\n<!-- --8<-- [end:{name}] -->" for name, text in parts.items()
    )
    return "\n\n".join([title, "Made by `make bench`; do not edit.", *marked]) + "\n"


def described(result: dict[str, Any]) -> str:
    """Machine and versions; of each row, if they differ."""
    seen = {}
    for row in result["rows"]:
        facts = {name: value for name, value in row["machine"].items() if name != "load_before"}
        seen.setdefault(str(facts), (facts, []))[1].append(f"{row['context_tokens']:,}")
    lines = []
    for facts, lengths in seen.values():
        accelerator = (
            f"{facts['accelerator']}, {facts['accelerator_memory_gib']} GiB; " if "accelerator" in facts else ""
        )
        lines.append(
            f"{result['model']} in {result['dtype']}, {accelerator}{facts['processor']}, {facts['cores']} cores, "
            f"{facts['memory_gib']} GiB, {facts['threads']} threads; Python {facts['python']}, torch {facts['torch']}, "
            f"transformers {facts['transformers']}, kvcag {facts['kvcag']}."
            + (f" Contexts of {', '.join(lengths)} tokens." if len(seen) > 1 else "")
        )
    worker = result.get("kvpress")
    if worker:
        lines.append(f"kvpress runs in an environment of its own: transformers {worker['transformers']}.")
    rates = [row["ceilings"] for row in result["rows"]]
    if rates:
        lines.append(
            f"Ceilings measured before: {max(r['operations_per_s'] for r in rates) / 1e9:,.0f} GFLOP/s in a matrix "
            f"product, {max(r['bytes_per_s'] for r in rates) / 1e9:,.1f} GB/s of memory."
        )
    return "\n".join([*lines, *result.get("left_out", [])])


def overview(rows: list[dict[str, Any]]) -> str:
    heads = [
        "context, tokens",
        "full prefill",
        "exact",
        "faster",
        "exact over bare",
        "query 10%",
        "faster",
        "rotate",
        "faster",
    ]
    lines = []
    for row in rows:
        at = {name: row["systems"].get(name, {}).get("ttft_s", math.nan) for name in (FULL, EXACT, TENTH, ROTATE)}
        lines.append(
            [
                f"{row['context_tokens']:,}",
                f"{ms(at[FULL])} ms",
                f"{ms(at[EXACT])} ms",
                f"{at[FULL] / at[EXACT]:.1f}×",
                f"{at[EXACT] / row['bare_s']:.2f}",
                f"{ms(at[TENTH])} ms",
                f"{at[FULL] / at[TENTH]:.1f}×",
                f"{ms(at[ROTATE])} ms",
                f"{at[FULL] / at[ROTATE]:.1f}×",
            ]
        )
    return table(heads, lines)


def context(row: dict[str, Any]) -> str:
    """Every system over one length."""
    floors = row["floors"]
    heads = ["", "first token", "of full prefill", "32 tokens", "agreement", "held", "prepared in"]
    lines = []
    full = row["systems"][FULL]["ttft_s"]
    for name, system in row["systems"].items():
        if "ttft_s" not in system:
            lines.append([name, f"failed: {system.get('failed', '')}", "", "", "", "", ""])
            continue
        lines.append(
            [
                name,
                f"{ms(system['ttft_s'])} ms",
                f"{system['ttft_s'] / full:.3f}",
                f"{system['total_s']:.2f} s",
                f"{system['agreement']:.0%}",
                f"{system['bytes_held'] / 2**20:,.0f} MiB",
                f"{system['prepare_s']:.2f} s",
            ]
        )
    below = (
        f"Floors: full prefill {ms(floors['full_s'])} ms, first token over a ready cache {ms(floors['exact_s'])} ms, "
        f"with a tenth recomputed {ms(floors['query_10_s'])} ms, a decode step {ms(floors['step_s'])} ms. The model's "
        f"own pass over a ready cache (bare) took {ms(row['bare_s'])} ms."
    )
    return f"### {row['context_tokens']:,} tokens of context\n\n{table(heads, lines)}\n\n{below}"


def memos(rows: list[dict[str, Any]]) -> str:
    """Whether its answer is the one that the question gets without documents."""
    lines = []
    for row in rows:
        for name in ("MemOS merging", "MemOS merging, layers initialised", ROTATE, TENTH):
            system = row["systems"].get(name, {})
            if "agreement" in system:
                shares = (system["agreement"], system["agreement_without_documents"])
                lines.append([name, f"{row['context_tokens']:,}", *(f"{share:.0%}" for share in shares)])
    return table(
        ["", "context, tokens", "agrees with the full prefill", "agrees with the answer without documents"], lines
    )


def questions(rows: list[dict[str, Any]]) -> str:
    """From which question over the same documents on it has cost less to read them beforehand than each time."""
    heads = ["context, tokens", "one question: full", "exact", "query 10%", "exact pays from", "query 10% pays from"]
    lines = []
    for row in rows:
        full = row["systems"][FULL]["total_s"]
        cells = [f"{row['context_tokens']:,}", f"{full:.2f} s"]
        paid = []
        for name in (EXACT, TENTH):
            system = row["systems"].get(name, {})
            if "total_s" not in system:
                cells.append("–")
                paid.append("–")
                continue
            cells.append(f"{system['prepare_s'] + system['total_s']:.2f} s")
            saved = full - system["total_s"]
            count = math.floor(system["prepare_s"] / saved) + 1 if saved > 0 else None
            paid.append(f"question {count}" if count else "never")
        lines.append(cells + paid)
    return table(heads, lines)


def corpora(rows: list[dict[str, Any]], dtype: str) -> str:
    """What keeping a whole corpus takes: arithmetic on the measured rate of encoding, not a measurement."""
    row = middle(rows)
    if row is None:
        return ""
    exact = row["systems"][EXACT]
    held, rate = exact["bytes_held"] / row["context_tokens"], row["context_tokens"] / exact["prepare_s"]
    half = held * 2 / torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    lines = [[f"{n:,}", duration(n / rate), gib(n * held), gib(n * half), gib(n * half * INT8)] for n in CORPORA]
    return table(["corpus, tokens", "encoding it once", f"held in {dtype}", "in bfloat16", "as int8"], lines)


def middle(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row nearest to 2,048 tokens."""
    return min(rows, key=lambda row: abs(row["context_tokens"] - 2048), default=None)


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"


def gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
