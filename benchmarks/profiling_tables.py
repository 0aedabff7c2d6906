"""Writes a profile's figures as Markdown."""

from __future__ import annotations

from typing import Any

from measuring import ms, table


def floor_of(row: dict[str, Any], name: str) -> float:
    key = name.split(",")[0]
    floors = row["floors"]["exact" if key == "rotate" else key]
    return max(floors["floor_operations_s"], floors["floor_bytes_s"])


def report(result: dict[str, Any]) -> str:
    """The figures as Markdown, between marks by which docs/benchmarks.md shows them."""
    facts, ceilings = result["machine"], result["ceilings"]
    place = facts.get("accelerator") or f"{facts['processor']}, {facts['threads']} threads"
    about = (
        f"{result['model']}, {result['dtype']}, {place}; torch {facts['torch']}, transformers {facts['transformers']}. "
        f"Ceilings: {ceilings['operations_per_s'] / 1e12:,.3g} TFLOP/s, {ceilings['bytes_per_s'] / 1e9:,.0f} GB/s."
    )
    texts = ["# Profile", "<!-- --8<-- [start:figures] -->", about]
    for row in sorted(result["rows"], key=lambda row: row["context_tokens"]):
        texts += row_report(row)
    return "\n\n".join([*texts, "<!-- --8<-- [end:figures] -->"]) + "\n"


def row_report(row: dict[str, Any]) -> list[str]:
    held, peak = row["bytes_held"] / 2**20, row.get("peak_bytes", 0) / 2**30
    texts = [
        f"### {row['context_tokens']:,} tokens of context, {row['question_tokens']} of question",
        f"Keys and values: {held:,.0f} MiB"
        + (f", encoded once in {row['encode_once_s']:.2f} s." if "encode_once_s" in row else ".")
        + (f" Peak of the accelerator's memory: {peak:.1f} GiB." if peak else ""),
    ]
    timed = {**row.get("ttft_s", {}), **row.get("step_s", {}), **row.get("without_launches_s", {})}
    lines = [
        [name, ms(value), ms(floor_of(row, name)), f"{value / floor_of(row, name):.1f}"]
        for name, value in timed.items()
    ]
    texts.append(table(["first token, or step", "ms", "floor, ms", "times the floor"], lines))
    spans = row.get("where_s", {})
    names = sorted({part for parts in spans.values() for part in parts}, key=lambda n: (-spans["exact"].get(n, 0), n))
    lines = [[part, *(ms(spans[kind].get(part, 0)) for kind in spans)] for part in names]
    lines.append(["all", *(ms(sum(parts.values())) for parts in spans.values())])
    texts.append(table(["where it goes, ms", *spans], lines))
    busy = row.get("kernels", {})
    if any(found["kernels"] for found in busy.values()):
        lines = [[name, found["kernels"], ms(found["busy_s"])] for name, found in busy.items()]
        texts.append(table(["on the device", "kernels", "busy, ms"], lines))
    return texts + [f"failed: {name}: {error}" for name, error in row.get("failed", {}).items()]
