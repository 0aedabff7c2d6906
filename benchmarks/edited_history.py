"""Measures an agent whose history is edited: moving the remaining messages, compared with reading them again.

    python benchmarks/edited_history.py --data FILE [--runs 3] [--out benchmarks/results/edited_history.json]

An agent calls a search tool twelve times; each result has about 480 tokens. Before the seventh and the eleventh answer
LangChain's `ClearToolUsesEdit` clears all results but the last three. `moved` answers under `auto`, `read` under
`exact`, which reuses exact prefixes; both see the same messages. Calls and results are written by this script, so that
both runs have the same history; each step's answer has 16 tokens.

KL is KL(full prefill ‖ moved), in nats per token, over the 24 greedy tokens of the full prefill, for each answer after
an edit. `by strategy` is the same for the two answers directly after the edits, with moved tokens recomputed as `query`
chooses, and the seconds to make the context. FILE is MuSiQue (`ctxs[].text`, `question`). SmolLM2 in fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from langchain.agents.middleware.context_editing import ClearToolUsesEdit
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.utils import count_tokens_approximately
from measuring import machine

from kvcag import HFEngine
from kvcag.cache.layers import LayerKV, concat, generation_cache, layers_of
from kvcag.chat_template import Prompt
from kvcag.contexts import with_kept_history
from kvcag.core import MergeSettings
from kvcag.demo.model import embedded_model
from kvcag.langchain import ChatKVCAG
from kvcag.langchain.messages import to_messages
from kvcag.tools import tool_messages

CALLS, WORDS = 12, 360
EDITED_AFTER = (6, 10)
EDIT = ClearToolUsesEdit(trigger=0, keep=3)
SYSTEM = SystemMessage("You are a research agent. Search for what you need, then answer the question in one sentence.")
STRATEGIES = {"auto": 0.2, "query 10%": 0.1, "query 20%": 0.2, "query 40%": 0.4}
TOKENS, PROBED = 16, 24


def steps(data: list[dict[str, Any]], run: int) -> list[list[BaseMessage]]:
    """A call and its result, for each step."""
    rows = data[run * CALLS : (run + 1) * CALLS]
    made = []
    for number, row in enumerate(rows):
        call = {"name": "search", "args": {"query": row["question"]}, "id": f"call{number}"}
        result = " ".join(" ".join(context["text"] for context in row["ctxs"]).split()[:WORDS])
        made.append([AIMessage("", tool_calls=[call]), ToolMessage(result, name="search", tool_call_id=call["id"])])
    return made


def prompt_of(engine: HFEngine, messages: Sequence[BaseMessage]) -> Prompt:
    return engine.template.prompt(tool_messages(engine.template, to_messages(messages)))


def decoded(
    engine: HFEngine, layers: Sequence[LayerKV], tail: Sequence[int], answer: Sequence[int] | None = None
) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities of the 24 tokens behind `tail`, and the tokens: `answer`, or the greedy ones."""
    cache = generation_cache([layers], room=len(tail) + PROBED)
    logits, tokens = [engine.forward(tail, cache)], list[int]()
    for step in range(PROBED):
        tokens.append(int(logits[-1].argmax()) if answer is None else answer[step])
        logits.append(engine.forward(tokens[-1:], cache))
    return torch.cat(logits[:-1]).log_softmax(-1), tokens


def kl(engine: HFEngine, token_ids: Sequence[int], layers: Sequence[LayerKV]) -> float:
    """Of a prompt's next tokens over `layers`, which hold its beginning."""
    held = layers[0][0].shape[-2]
    exact, _ = engine.prefill(token_ids[:-1], namespace="read")
    right, answer = decoded(engine, exact, token_ids[-1:])
    ours, _ = decoded(engine, layers, token_ids[held:], answer)
    return float((right.exp() * (right - ours)).sum(-1).mean())


def agent(engine: HFEngine, data: list[dict[str, Any]], run: int) -> dict[str, Any]:
    """Both agents, step by step."""
    llms = {
        name: ChatKVCAG(engine=engine, namespace=name, merge_strategy=strategy, max_tokens=TOKENS)
        for name, strategy in (("moved", "auto"), ("read", "exact"))
    }
    for name in llms:
        engine.forget(name)
    history: list[BaseMessage] = [SYSTEM, HumanMessage(data[run * CALLS]["question"])]
    rows: list[dict[str, Any]] = []
    by_strategy: dict[str, dict[str, list[float]]] = {name: {"kl": [], "seconds": []} for name in STRATEGIES}
    for number, step in enumerate(steps(data, run), start=1):
        if edited := number - 1 in EDITED_AFTER:
            EDIT.apply(history, count_tokens=count_tokens_approximately)
        history += step
        prompt = prompt_of(engine, history)
        row: dict[str, Any] = {"step": number, "edited": edited, "prompt_tokens": len(prompt.token_ids)}
        contexts = {}
        if edited:
            documents = llms["moved"].memory().documents
            for name, ratio in STRATEGIES.items():
                began = time.perf_counter()
                strategy: Any = name.split()[0]
                contexts[name] = with_kept_history(documents, prompt, None, MergeSettings(strategy, ratio))
                by_strategy[name]["seconds"].append(time.perf_counter() - began)
        for name, llm in llms.items():
            began = time.perf_counter()
            answer = llm.invoke(history)
            usage = answer.usage_metadata
            row[name] = {
                "prefilled": usage["input_tokens"] - usage["input_token_details"]["cache_read"],
                "seconds": time.perf_counter() - began,
                "ttft_s": answer.response_metadata["kvcag"]["ttft_s"],
                "mode": answer.response_metadata["kvcag"]["mode"],
            }
        if number > EDITED_AFTER[0]:
            _, pieces = engine.prefixes.match(prompt.token_ids[:-1], "moved", merged=True)
            row["kl"] = kl(engine, prompt.token_ids, concat(pieces))
        for name, context in contexts.items():
            by_strategy[name]["kl"].append(kl(engine, prompt.token_ids, layers_of(context.cache)))
        rows.append(row)
    tokens = len(prompt_of(engine, [*history[:2], *chain.from_iterable(steps(data, run))]).token_ids)
    return {"tokens": tokens, "steps": rows, "by_strategy": by_strategy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    data = json.loads(given.data.read_text(encoding="utf-8"))
    path = embedded_model()
    engine = HFEngine.from_pretrained(path, dtype="float32", device="cpu", prefix_cache_bytes=4 << 30)
    runs = []
    for run in range(given.runs):
        runs.append(agent(engine, data, run))
        print(f"run {run + 1}", json.dumps(summary(runs), indent=1), sep="\n", flush=True)
    if given.out:
        figures = {"machine": machine(engine.device), **summary(runs), "runs": runs}
        given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of sums over a run's steps, and means of KL."""
    steps = [row for run in runs for row in run["steps"]]
    whole = statistics.median(run["tokens"] for run in runs)
    figures: dict[str, Any] = {"runs": len(runs), "tokens_without_edits": whole}
    for name in ("moved", "read"):
        for field in ("prefilled", "seconds"):
            figures[f"{name}_{field}"] = statistics.median(sum(r[name][field] for r in run["steps"]) for run in runs)
        edits = [row[name] for row in steps if row["edited"]]
        figures[f"{name}_prefilled_at_an_edit"] = statistics.median(row["prefilled"] for row in edits)
        figures[f"{name}_ttft_s_at_an_edit"] = statistics.median(row["ttft_s"] for row in edits)
    figures["kl"] = statistics.mean(row["kl"] for row in steps if "kl" in row)
    figures["highest_kl"] = max(row["kl"] for row in steps if "kl" in row)
    names = runs[0]["by_strategy"]
    for figure in ("kl", "seconds"):
        figures[f"{figure}_by_strategy"] = {
            name: statistics.mean(value for run in runs for value in run["by_strategy"][name][figure]) for name in names
        }
    return figures


if __name__ == "__main__":
    main()
