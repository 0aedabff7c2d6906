"""Plots the report's figures: at most five series each, kvcag in one colour, legible on light and dark pages."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from report_tables import EXACT, FULL, ROTATE, TENTH, middle

mpl.use("Agg")
import matplotlib.pyplot as plt

mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kvcag", "font.size": 11})

OURS, OTHERS, TEXT = "#00a08a", ("#d1495b", "#8f7ad1", "#c98a1b"), "#7d8590"
"""Ours is always the first; text and axes are grey enough for a light page and light enough for a dark one."""

STYLES: dict[str, dict[str, Any]] = {
    FULL: {"color": OTHERS[0], "marker": "o", "label": "transformers, reads everything"},
    "ChatHuggingFace": {"color": OTHERS[1], "marker": "v", "label": "LangChain's ChatHuggingFace"},
    "llama-index HuggingFaceLLM": {"color": OTHERS[2], "marker": "^", "label": "LlamaIndex's HuggingFaceLLM"},
    TENTH: {"color": OURS, "marker": "s", "ls": "--", "label": "kvcag, documents in a new order (merged)"},
    EXACT: {"color": OURS, "marker": "o", "label": "kvcag, documents asked about before (exact)"},
}

POINTS = [
    (FULL, "transformers, reads everything", 2),
    (EXACT, "kvcag, exact", -2),
    ("transformers, deepcopied prefix cache", "transformers, deepcopied cache", 2),
    (TENTH, "kvcag, merged, 10% recomputed", -2),
    ("kvcag, query 20%", "kvcag, merged, 20% recomputed", 2),
    (ROTATE, "kvcag, merged by rotation", 2),
    ("MemOS merging, layers initialised", "MemOS merging", 2),
]
"""System, how the plot names it, and whether its name stands above or below its point."""


def plots(result: dict[str, Any], out: Path) -> list[Path]:
    rows = result["rows"]
    if not rows:
        return []
    at, about = middle(rows), f"{result['model']}, {result['dtype']}, CPU"
    first = "seconds to the first word"
    return [
        over_context(rows, "ttft_s", first, f"Time to the first word ({about})", out / "ttft.svg"),
        over_context(rows, "total_s", "seconds for 32 tokens", f"Time for 32 tokens ({about})", out / "total.svg"),
        agreement(at, about, out / "agreement.svg"),
        over_questions(at, about, out / "questions.svg"),
    ]


def over_context(rows: list[dict[str, Any]], key: str, label: str, title: str, path: Path) -> Path:
    """A line a system: medians over the questions, with bars from the first to the third quartile."""
    figure, axes = axes_of(8, 5)
    for name, style in STYLES.items():
        found = [(row["context_tokens"], row["systems"][name]) for row in rows if key in row["systems"].get(name, {})]
        if found:
            lengths, medians = [tokens for tokens, _ in found], [system[key] for _, system in found]
            quartiles = [quartiles_of(system, key) for _, system in found]
            bars = [
                [max(0.0, middle_ - low) for middle_, (low, _) in zip(medians, quartiles, strict=True)],
                [max(0.0, high - middle_) for middle_, (_, high) in zip(medians, quartiles, strict=True)],
            ]
            axes.errorbar(lengths, medians, bars, markersize=6, capsize=3, lw=1.8, **style)
    axes.set(xlabel="tokens of the documents", ylabel=label, xscale="log", yscale="log")
    axes.set_title(title, color=TEXT)
    axes.set_xticks([row["context_tokens"] for row in rows], [f"{row['context_tokens']:,}" for row in rows])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    return saved(figure, axes, path)


def quartiles_of(system: dict[str, Any], key: str) -> tuple[float, float]:
    seconds = [answer[key] for answer in system.get("answers", []) if key in answer]
    if len(seconds) < 2:
        return system[key], system[key]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, high


def agreement(row: dict[str, Any], about: str, path: Path) -> Path:
    """How early the first word comes, and how far the answer agrees with the full prefill's."""
    figure, axes = axes_of(8, 5)
    for name, label, side in POINTS:
        system = row["systems"].get(name, {})
        if "ttft_s" not in system:
            continue
        x, y = system["ttft_s"], 100 * system["agreement"]
        color = OURS if label.startswith("kvcag") else OTHERS[0] if name == FULL else TEXT
        axes.plot([x], [y], "s" if color == OURS else "o", color=color, markersize=9)
        axes.annotate(label, (x, y), (0, 9 * side - 4), textcoords="offset points", ha="center", color=color)
    axes.set(xlabel="seconds to the first word", ylabel="% of the answer as the full prefill's", xscale="log")
    axes.set_title(f"{about}, {row['context_tokens']:,} tokens of documents", color=TEXT)
    axes.margins(x=0.2, y=0.12)
    axes.xaxis.set_major_formatter("{x:g}")
    return saved(figure, axes, path)


def over_questions(row: dict[str, Any], about: str, path: Path) -> Path:
    figure, axes = axes_of(8, 5)
    counts = range(1, 11)
    styles = {**STYLES, ROTATE: {"color": OURS, "marker": "d", "ls": ":", "label": "kvcag, merged by rotation"}}
    for name in (FULL, TENTH, ROTATE, EXACT):
        system = row["systems"].get(name, {})
        if "total_s" in system:
            axes.plot(counts, [system["prepare_s"] + n * system["total_s"] for n in counts], lw=1.8, **styles[name])
    axes.set(xlabel="questions over the same documents", ylabel="seconds in all, encoding included", ylim=(0, None))
    axes.set_title(f"{about}, {row['context_tokens']:,} tokens of documents", color=TEXT)
    return saved(figure, axes, path)


def axes_of(width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.tick_params(colors=TEXT)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    for side in axes.spines.values():
        side.set_color(TEXT)
    return figure, axes


def saved(figure: plt.Figure, axes: plt.Axes, path: Path) -> Path:
    axes.grid(alpha=0.25, color=TEXT)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, labelcolor=TEXT, fontsize=10)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)
    return path
