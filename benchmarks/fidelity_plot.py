"""Plots KL over the share of the context that is recomputed: one panel per set of questions, kvcag in one colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

OURS, OTHERS = "tab:blue", {"cacheblend": "0.35", "epic": "0.55", "prophetkv": "0.7"}
NAMES = {
    "query": "kvcag, query",
    "anchor": "kvcag, anchor",
    "deviation": "kvcag, deviation",
    "cacheblend": "CacheBlend's choice",
    "epic": "EPIC's choice",
    "prophetkv": "ProphetKV's choice",
}
LINES = {"query": ("-", "o"), "anchor": ("--", "o"), "deviation": (":", "o")}
MARKERS = {"cacheblend": "s", "epic": "^", "prophetkv": "D"}
SETS = {"musique": "MuSiQue", "reference": "Python's reference", "faq": "FAQs of Debian packages"}


def plot(results: list[dict[str, Any]], out: Path) -> None:
    figure, panels = plt.subplots(
        1, len(results), figsize=(1.5 + 4.2 * len(results), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, result in zip(panels[0], results, strict=True):
        panel(axes, result)
    panels[0][0].set_ylabel("KL from a full prefill, nats per token (less is better)")
    figure.suptitle("How far an answer from merged documents is from the model's own", fontsize="large")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small", frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def panel(axes: plt.Axes, result: dict[str, Any]) -> None:
    shown = [row for row in result["rows"] if not row.get("in_context")]
    rows = [row for row in shown if row["strategy"] != "full"]  # equal to a full prefill: no point on a log
    nothing = next((row for row in rows if row["strategy"] == "rotate"), None)
    for strategy in dict.fromkeys(row["strategy"] for row in rows if row is not nothing):
        points = [row for row in rows if row["strategy"] == strategy]
        if strategy not in OTHERS and nothing:
            points = [nothing, *points]
        line, marker = LINES.get(strategy, ("-", MARKERS.get(strategy, "o")))
        axes.errorbar(
            [100 * row["recomputed"] for row in points],
            [row["kl"] for row in points],
            [row["kl_standard_error"] or 0 for row in points],
            color=OTHERS.get(strategy, OURS),
            linestyle=line,
            marker=marker,
            markersize=5,
            linewidth=1 if strategy in OTHERS else 2,
            capsize=3,
            label=NAMES[strategy],
        )
    questions = (
        f"{result['questions']} questions, {result['documents']} documents, {result['context_tokens']:,.0f} tokens"
    )
    axes.set_title(f"{SETS[result['set']]}: {questions}\n{result['model']}, {result['dtype']}", fontsize="small")
    axes.set(xlabel="tokens of the context that are recomputed, %", yscale="log", xlim=(-1.5, None))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
