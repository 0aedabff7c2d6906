"""The report's figures as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from report_tables import EXACT, FULL, ROTATE, TENTH, middle

mpl.use("Agg")
import matplotlib.pyplot as plt

DOTTED = ("full prefill (", "the question alone")


def plots(result: dict[str, Any], out: Path) -> list[Path]:
    rows = result["rows"]
    title = f"{result['model']}, {result['dtype']}"
    if not rows:
        return []
    at = middle(rows)
    return [
        over_context(rows, "ttft_s", "time to first token, s", title, out / "ttft.png"),
        over_context(rows, "total_s", "time for 32 tokens, s", title, out / "total.png"),
        agreement(at, title, out / "agreement.png"),
        over_questions(at, title, out / "questions.png"),
    ]


def over_context(rows: list[dict[str, Any]], key: str, label: str, title: str, path: Path) -> Path:
    figure, axes = axes_of(8, 6)
    for name in rows[-1]["systems"]:
        points = [
            (row["context_tokens"], row["systems"][name][key]) for row in rows if key in row["systems"].get(name, {})
        ]
        if points:
            style = ":" if name.startswith(DOTTED) else "-" if name.startswith("kvcag") else "--"
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=name)
    if key == "ttft_s":
        lengths = [row["context_tokens"] for row in rows]
        axes.plot(lengths, [row["floors"]["full_s"] for row in rows], color="grey", lw=0.8, label="floor, full prefill")
        axes.plot(
            lengths, [row["floors"]["exact_s"] for row in rows], color="black", lw=0.8, label="floor, ready cache"
        )
    axes.set(xlabel="context, tokens", ylabel=label, xscale="log", yscale="log", title=title)
    axes.set_xticks(
        [row["context_tokens"] for row in rows], [f"{row['context_tokens']:,}" for row in rows], minor=False
    )
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    return saved(figure, axes, path)


def agreement(row: dict[str, Any], title: str, path: Path) -> Path:
    figure, axes = axes_of(8, 6)
    for name, system in row["systems"].items():
        if "ttft_s" in system:
            style = "s" if name.startswith("kvcag") else "o"
            axes.plot([system["ttft_s"]], [system["agreement"]], style, markersize=8, label=name)
    axes.set(
        xlabel="time to first token, s",
        ylabel="answer's tokens up to the first that differs from the full prefill's",
        xscale="log",
        title=f"{title}, {row['context_tokens']:,} tokens",
    )
    return saved(figure, axes, path)


def over_questions(row: dict[str, Any], title: str, path: Path) -> Path:
    figure, axes = axes_of(8, 5)
    counts = range(1, 11)
    for name in (FULL, EXACT, ROTATE, TENTH):
        system = row["systems"].get(name, {})
        if "total_s" in system:
            axes.plot(counts, [system["prepare_s"] + n * system["total_s"] for n in counts], marker="o", label=name)
    axes.set(
        xlabel="questions over the same documents",
        ylabel="seconds in all, reading the documents included",
        ylim=(0, None),
        title=f"{title}, {row['context_tokens']:,} tokens",
    )
    return saved(figure, axes, path)


def axes_of(width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set_prop_cycle(color=mpl.colormaps["tab20"].colors)  # more systems than the default has colours
    return figure, axes


def saved(figure: plt.Figure, axes: plt.Axes, path: Path) -> Path:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
