"""Measures decoding steps and first tokens over a cached context on a GPU, compared with lower bounds and transformers.

    PYTHONPATH=. python benchmarks/gpu.py --out benchmarks/results/gpu-h100.json      # nine minutes on one H100

Random bf16 weights in a geometry (benchmarks/geometry.py), made on the device. For each length of context, in one run:

- the floor of a pass: the longer of operations over the rate of a large matrix product and bytes over the bandwidth of
  memory, both measured first;
- `engine.stream` over a cache of the context: seconds to the first token, and a step, as the mean over an answer; with
  CUDA graphs (`graphs`) and without (`plain`);
- the captured pass alone, replayed (`replay`): what is left to Python is the difference;
- how far the logits of the two are apart, and those of `plain` from its own when it runs again; on how many tokens of
  an answer they agree;
- eight streams at once, each in a thread and over a context of its own, and 32 questions over one context
  (`KVCacheMemory.ask_all`): tokens per second of all, and a step while all of them run;
- `KVCacheMemory.merge` of eight documents and the first token (`merged`), beside the model's pass over the whole prompt
  (`full`);
- `model.generate` over the whole prompt, with a `DynamicCache` and with a static cache that transformers compiles: a
  step is what one more token costs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from geometry import GEOMETRIES, HEAD, endless, random_engine
from measuring import Ceilings, Work, machine, median_seconds, ms, seconds, synchronize, table
from profiling import QUESTION, Case, new_question
from transformers import DynamicCache

from kvcag import HFEngine, KVCacheMemory, Sampling
from kvcag.cache.layers import generation_cache, layers_of

STEPS = 64


def stream(case: Case, engine: HFEngine) -> Iterator[Any]:
    prompt = engine.build_prompt(new_question(), case.cache)
    return engine.stream(prompt, Sampling(max_new_tokens=STEPS + 1), case.cache)


def step_seconds(case: Case, engine: HFEngine) -> float:
    """Mean over one answer, from its first token to its last."""
    chunks = stream(case, engine)
    next(chunks)
    started = time.perf_counter()
    count = sum(1 for chunk in chunks if chunk.token_ids)
    return (time.perf_counter() - started) / count


def first_token_seconds(case: Case, engine: HFEngine) -> float:
    """Until the first token over the exact context is there."""
    return until_first(case, partial(stream, case, engine))


def until_first(case: Case, answer: Callable[[], Iterator[Any]]) -> float:
    """Until an answer's first token is there; what was launched behind it does not count."""
    synchronize(case.device)
    started = time.perf_counter()
    chunks = answer()
    next(chunks)
    taken = time.perf_counter() - started
    chunks.close()  # type: ignore[attr-defined]
    return taken


def ours(case: Case, engine: HFEngine, repeat: int) -> dict[str, float]:
    return {
        "first_token_s": statistics.median([first_token_seconds(case, engine) for _ in range(repeat + 2)][2:]),
        "step_s": statistics.median(step_seconds(case, engine) for _ in range(3)),
    }


def together(streams: Sequence[Callable[[], Iterator[Any]]]) -> dict[str, float]:
    """Streams at once, each in a thread: tokens per second of all, and of a step while all of them run."""

    def read(index: int) -> list[float]:
        return [time.perf_counter() for chunk in streams[index]() for _ in chunk.token_ids]

    started = time.perf_counter()
    with ThreadPoolExecutor(len(streams)) as threads:
        times = list(threads.map(read, range(len(streams))))
    begun, ended = max(each[0] for each in times), min(each[-1] for each in times)
    within = sum(1 for each in times for at in each if begun < at <= ended)
    return {
        "tokens_per_s": sum(map(len, times)) / (max(each[-1] for each in times) - started),
        "all_begun_s": begun - started,
        "step_s": len(streams) * (ended - begun) / within if within else float("nan"),
        "tokens_per_s_in_steps": within / (ended - begun) if within else float("nan"),
    }


def answers(engine: HFEngine, cache: Any, question: str, count: int) -> Iterator[Any]:
    return engine.stream(engine.build_prompt(question, cache), Sampling(max_new_tokens=count), cache)


def eight_streams(case: Case, engine: HFEngine) -> dict[str, float]:
    """Over eight contexts."""
    few = case.documents
    caches = [engine.build_kv_cache([HEAD, *few[i:], *few[:i]]) for i in range(8)]
    streams = [partial(answers, engine, cache, f"{i}: {QUESTION}", 2 * STEPS) for i, cache in enumerate(caches)]
    together(streams)  # captures
    return together(streams)


def many_questions(case: Case, engine: HFEngine, count: int = 32) -> dict[str, float]:
    """Over one context."""
    streams = [partial(answers, engine, case.cache, f"{i}: {QUESTION}", 4 * STEPS) for i in range(count)]
    together(streams)  # captures
    found = together(streams)
    memory = KVCacheMemory(engine, instruction=HEAD)
    ids = memory.add([memory.extract("".join(case.documents))])
    engine.prefixes.max_bytes = 4 * case.context * engine.bytes_per_token
    asked = partial(memory.ask_all, [f"{i}: {QUESTION}" for i in range(count)], ids, strategy="exact")
    memory.ask(QUESTION, ids, strategy="exact", max_new_tokens=2)
    asked(max_new_tokens=2)
    taken = seconds(case.device, partial(asked, max_new_tokens=4 * STEPS))
    engine.prefixes.clear()
    engine.prefixes.max_bytes = 0
    return {**found, "ask_all_tokens_per_s": count * 4 * STEPS / taken}


def difference(case: Case, engines: dict[str, HFEngine]) -> dict[str, float]:
    """Relative error of the logits after the question, and the share of an answer's tokens that agree at a margin."""
    logits: dict[str, list[torch.Tensor]] = {}
    answer: list[int] = []
    for name in ("plain", "plain again", "graphs"):  # the others read the answer of the first
        engine = engines[name.split()[0]]
        cache = generation_cache([layers_of(case.cache)], room=case.tail.shape[1] + STEPS)
        found = [engine.forward(case.tail[0].tolist(), cache).float()]
        for i in range(STEPS - 1):
            if len(answer) == i:
                answer.append(int(found[-1].argmax()))
            found.append(engine.forward([answer[i]], cache).float())
        logits[name] = found
    right, again, got = (torch.cat(logits[name]) for name in ("plain", "plain again", "graphs"))
    top = right.topk(2).values
    clear = top[:, 0] - top[:, 1] > 0.1
    same = right.argmax(-1) == got.argmax(-1)
    errors, noise = ((each - right).norm(dim=-1) / right.norm(dim=-1) for each in (got, again))
    return {
        "logits_error_first": float(errors[0]),
        "logits_error_median": float(errors.median()),
        "plain_against_itself_median": float(noise.median()),
        "agreement": float(same.float().mean()),
        "agreement_where_clear": float(same[clear].float().mean()) if clear.any() else 1.0,
    }


def merged(case: Case, repeat: int = 5) -> dict[str, float]:
    """Seconds to the first token over merged documents, and of the model's own pass over the whole prompt."""
    found = {"full_s": median_seconds(case.device, lambda: case.bare(case.ids, DynamicCache()), repeat, warm=2)}
    for name, strategy in (("rotate_s", "rotate"), ("query_10_s", "query")):
        taken = [until_first(case, partial(case.merged, strategy)) for _ in range(repeat + 3)]
        found[name] = statistics.median(taken[3:])
    return found


def replays(case: Case, engine: HFEngine) -> dict[str, float]:
    """A captured pass alone, by the number of new tokens."""
    cache = generation_cache([layers_of(case.cache)], room=512)
    found = {}
    for new in (1, case.tail.shape[1]):
        engine.forward([1] * new, cache)
        key = min(key for key in engine._graphs._passes if key >= (1, new))  # type: ignore[union-attr]
        found[str(key[1])] = median_seconds(case.device, engine._graphs._passes[key]._replay, 20, warm=3)  # type: ignore[union-attr]
    return found


def transformers_generate(case: Case, **how: Any) -> dict[str, float]:
    """Seconds of the first call, and of one more token."""
    model = case.engine.model

    def run(count: int) -> None:
        model.generate(
            case.ids,
            attention_mask=torch.ones_like(case.ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **how,
        )

    began = seconds(case.device, lambda: run(4))
    few, many = (median_seconds(case.device, partial(run, count), 3) for count in (2, 34))
    return {"first_call_s": began, "step_s": (many - few) / 32, "prompt_and_two_tokens_s": few}


def measure(engines: dict[str, HFEngine], tokens: int, repeat: int, ceilings: Ceilings) -> dict[str, Any]:
    case = Case(engines["graphs"], tokens)
    question = case.tail.shape[1]
    model = engines["graphs"].model
    row: dict[str, Any] = {
        "context_tokens": case.context,
        "question_tokens": question,
        "floor": {
            "first_token_s": Work.of(model, question, case.context).floor(ceilings),
            "step_s": Work.of(model, 1, case.context + question).floor(ceilings),
        },
    }
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "graphs": partial(ours, case, engines["graphs"], repeat),
        "replay_s": partial(replays, case, engines["graphs"]),
        "plain": partial(ours, case, engines["plain"], 5),
        "difference": partial(difference, case, engines),
        "merged": partial(merged, case),
        "eight_streams": partial(eight_streams, case, engines["graphs"]),
        "questions_32": partial(many_questions, case, engines["graphs"]),
    }
    for name, part in parts.items():
        try:
            row[name] = part()
        except Exception as error:
            row[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(case.context, name, row[name], flush=True)
    return row


def peers(engines: dict[str, HFEngine], tokens: int, *, static: bool) -> dict[str, Any]:
    case = Case(engines["plain"], tokens)
    del case.cache
    found: dict[str, Any] = {"dynamic": transformers_generate(case)}
    print(tokens, found, flush=True)
    if static:
        found["static"] = transformers_generate(case, cache_implementation="static")
        print(tokens, found, flush=True)
    return found


def report(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['context_tokens']:,}",
            *(
                ms(row.get(who, {}).get(what))
                for what in ("step_s", "first_token_s")
                for who in ("floor", "graphs", "plain", "dynamic", "static")
                if not (what == "first_token_s" and who in ("dynamic", "static"))
            ),
        ]
        for row in result["rows"]
    ]
    heads = ["context", "step: floor", "graphs", "plain", "generate, dynamic", "generate, static"]
    alone = table([*heads, "first token: floor", "graphs", "plain"], rows)
    rows = [
        [
            f"{row['context_tokens']:,}",
            *(
                f"{row[what].get('tokens_per_s_in_steps', 0):,.0f} ({ms(row[what].get('step_s'))})"
                for what in ("eight_streams", "questions_32")
            ),
            *(
                f"{row[what].get(rate, 0):,.0f}"
                for what, rate in (
                    ("eight_streams", "tokens_per_s"),
                    ("questions_32", "tokens_per_s"),
                    ("questions_32", "ask_all_tokens_per_s"),
                )
            ),
        ]
        for row in result["rows"]
    ]
    heads = ["context", "8 streams, 8 contexts: tokens/s (a step, ms)", "32 questions, one context", "8, whole answers"]
    return alone + "\n\n" + table([*heads, "32, whole answers", "ask_all"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="qwen3-8b")
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 6064, 32768])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--peers", type=int, default=2, help="lengths, from the first, at which `generate` is timed")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = torch.device("cuda")
    described = machine(device)
    graphs = random_engine(given.geometry, device, torch.bfloat16)
    plain = endless(HFEngine(graphs.model, graphs.tokenizer, prefix_cache_bytes=0, cuda_graphs=False))
    engines = {"graphs": graphs, "plain": plain}
    ceilings = Ceilings.of(device, torch.bfloat16)
    layers, _ = graphs.prefill(list(range(1, 40)))
    started = seconds(device, lambda: graphs.forward([1], generation_cache([layers], room=8)))
    result: dict[str, Any] = {
        "model": f"{given.geometry} (random weights, bf16)",
        "machine": described,
        "engine": repr(graphs),
        "ceilings": asdict(ceilings),
        "first_captured_pass_s": started,
        "rows": [],
    }
    print(repr(graphs), ceilings, f"first captured pass {started:.1f} s", flush=True)

    def write() -> None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        gc.collect()

    for tokens in given.context:
        result["rows"].append(measure(engines, tokens, given.repeat, ceilings))
        write()
    for index, row in enumerate(result["rows"][: given.peers]):
        row.update(peers(engines, given.context[index], static=index == 0))
        write()
    print(report(result))


if __name__ == "__main__":
    main()
