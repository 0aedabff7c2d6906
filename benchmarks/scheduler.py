"""How CacheScheduler's policy compares with LRU and LFU, and whether its work delays answers.

    python benchmarks/scheduler.py policy [--seeds 10]      seconds, no model
    python benchmarks/scheduler.py ttft [--questions 120]   some minutes, the embedded model

`policy` replays 2,000 retrievals over 200 documents: Zipf popularity, sets of three to five documents that are often of
one topic, lengths as documents have them, and drift: every 25 retrievals a document from anywhere becomes popular.
Counters, worth and choice are the scheduler's own. A text that is not stored is encoded by the answer and offered to
the store. LRU and LFU accept every text, and LFU never forgets a count. "Next use known" knows the future and evicts
the text that is asked for again the latest: no policy can do better.

`ttft` asks the same questions in turns: with a scheduler that always has other documents to encode, and while it must
not encode. All documents of a question are stored, so only the tail and a fifth of their tokens are computed, and any
delay shows. Times run from before the retrieval is reported to the first token. `cpu` is this process's CPU time in
between, including the scheduler's thread; other programs on the machine change it little.

Writes benchmarks/results/scheduler.json, scheduler_ttft.json and scheduler.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvcag.scheduler import Policy, TextStats, gdsf
from kvcag.scheduler.store import Cached, room_for
from kvcag.scheduler.texts import Texts, digest_of

RESULTS = Path(__file__).parent / "results"
DOCUMENTS, RETRIEVALS = 200, 2000
BUDGETS = (0.05, 0.15, 0.40)
BYTES_PER_TOKEN = 23_040  # SmolLM2-135M in bfloat16
SETTINGS = [(drift, zipf) for drift in (10, 25, 60) for zipf in (0.8, 0.9, 1.1)]


@dataclass(frozen=True)
class Workload:
    """`tokens` of each document, and the documents of each retrieval, best first."""

    tokens: np.ndarray
    retrievals: list[list[int]]


def workload(seed: int, drift: int = 25, zipf: float = 0.9, topics: int = 40) -> Workload:
    dice = np.random.default_rng(seed)
    tokens = np.clip(dice.lognormal(np.log(350), 0.7, DOCUMENTS), 40, 2400).astype(int)
    topic = dice.integers(0, topics, DOCUMENTS)
    ranking = dice.permutation(DOCUMENTS)
    weights = 1 / np.arange(1, DOCUMENTS + 1) ** zipf
    retrievals = []
    for number in range(RETRIEVALS):
        if number % drift == drift - 1:
            rising, rank = dice.integers(20, DOCUMENTS), dice.integers(0, 20)
            ranking = np.insert(np.delete(ranking, rising), rank, ranking[rising])
        popularity = np.empty(DOCUMENTS)
        popularity[ranking] = weights
        first = int(dice.choice(DOCUMENTS, p=popularity / popularity.sum()))
        related = popularity * np.where(topic == topic[first], 6.0, 1.0)
        related[first] = 0
        others = dice.choice(DOCUMENTS, size=dice.integers(2, 5), replace=False, p=related / related.sum())
        retrievals.append([first, *map(int, others)])
    return Workload(tokens, retrievals)


def lru(stats: TextStats, tokens: int, size: int, now: float) -> float:
    return stats.last


def lfu(stats: TextStats, tokens: int, size: int, now: float) -> float:
    return float(stats.count)


class Clairvoyant:
    """Knows when each text is asked for next."""

    def __init__(self, load: Workload) -> None:
        self.moment = 0
        self.uses: dict[int, list[int]] = {document: [] for document in range(DOCUMENTS)}
        for moment, documents in enumerate(load.retrievals):
            for document in documents:
                self.uses[document].append(moment)

    def of(self, document: int) -> float:
        """The worth of a cache: the sooner its text is asked for, the more."""
        later = self.uses[document]
        while later and later[0] <= self.moment:
            later.pop(0)
        return 1 / (later[0] - self.moment) if later else 0.0


def replay(load: Workload, budget: int, policy: Policy) -> list[tuple[int, int]]:
    """For each retrieval, the tokens that were kept and all its tokens."""
    texts = Texts(None, "model")
    stored: dict[str, Cached] = {}
    names = [f"document {document}" for document in range(DOCUMENTS)]
    digests = [digest_of(name) for name in names]
    account = []
    for documents in load.retrievals:
        for document in documents:
            texts.retrieved(names[document])

        def worth(entry: Cached, now: float = texts.now) -> float:
            return policy(texts.stats(entry.digest), entry.tokens, entry.bytes, now)

        account.append(serve(documents, load, stored, budget, worth, digests, admit_all=policy is not gdsf))
    return account


def foresee(load: Workload, budget: int) -> list[tuple[int, int]]:
    """`replay` for a policy that knows the future."""
    knows = Clairvoyant(load)
    stored: dict[str, Cached] = {}
    account = []
    for moment, documents in enumerate(load.retrievals):
        knows.moment = moment
        digests = [str(number) for number in range(DOCUMENTS)]
        account.append(serve(documents, load, stored, budget, lambda entry: knows.of(int(entry.digest)), digests))
    return account


def serve(
    documents: list[int],
    load: Workload,
    stored: dict[str, Cached],
    budget: int,
    worth: Callable[[Cached], float],
    digests: list[str],
    *,
    admit_all: bool = False,
) -> tuple[int, int]:
    """Answer one retrieval as `ScheduledStore` does: reuse stored caches, encode the others and offer them."""
    reused = 0
    for document in documents:
        tokens = int(load.tokens[document])
        if digests[document] in stored:
            reused += tokens
            continue
        new = Cached(digests[document], digests[document], tokens, tokens * BYTES_PER_TOKEN)
        leaving = room_for(new, stored.values(), budget, worth, force=admit_all)
        if leaving is not None:
            for entry in leaving:
                del stored[entry.key]
            stored[new.key] = new
            assert sum(entry.bytes for entry in stored.values()) <= budget
    return reused, sum(int(load.tokens[document]) for document in documents)


POLICIES: dict[str, Policy] = {"GDSF, the default": gdsf, "LFU": lfu, "LRU": lru}


def rate(account: list[tuple[int, int]]) -> float:
    return sum(reused for reused, _ in account) / sum(tokens for _, tokens in account)


def compare(seed: int, drift: int = 25, zipf: float = 0.9) -> Iterator[dict[str, Any]]:
    """One row for each budget: hit rates by tokens, tokens not encoded for each megabyte, and the course of it all."""
    load = workload(seed, drift, zipf)
    corpus = int(load.tokens.sum()) * BYTES_PER_TOKEN
    for share in BUDGETS:
        budget = int(share * corpus)
        accounts = {name: replay(load, budget, policy) for name, policy in POLICIES.items()}
        accounts["next use known"] = foresee(load, budget)
        yield {
            "seed": seed,
            "budget": share,
            "budget_bytes": budget,
            "tokens": sum(tokens for _, tokens in accounts["LRU"]),
            "hit_rate": {name: rate(account) for name, account in accounts.items()},
            "tokens_not_encoded_per_mb": {
                name: sum(reused for reused, _ in account) / (budget / 1e6) for name, account in accounts.items()
            },
            "course": {
                name: [rate(account[start : start + 100]) for start in range(0, RETRIEVALS, 100)]
                for name, account in accounts.items()
            },
        }


def policy(seeds: int) -> dict[str, Any]:
    rows = [row for seed in range(seeds) for row in compare(seed)]
    summary = [summarise([row for row in rows if row["budget"] == budget], budget) for budget in BUDGETS]
    elsewhere = []
    for drift, zipf in SETTINGS:
        found = [row for seed in range(3) for row in compare(100 + seed, drift, zipf)]
        for budget in BUDGETS:
            at = summarise([row for row in found if row["budget"] == budget], budget)
            elsewhere.append({"drift": drift, "zipf": zipf, **at})
    return {"documents": DOCUMENTS, "retrievals": RETRIEVALS, "summary": summary, "elsewhere": elsewhere, "runs": rows}


def summarise(rows: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    ours = next(iter(POLICIES))
    hits = {name: [row["hit_rate"][name] for row in rows] for name in rows[0]["hit_rate"]}
    return {
        "budget": budget,
        "hit_rate": {name: statistics.mean(values) for name, values in hits.items()},
        "least_lead": {
            name: min(a - b for a, b in zip(hits[ours], hits[name], strict=True)) for name in ("LFU", "LRU")
        },
        "tokens_not_encoded_per_mb": {
            name: statistics.mean(row["tokens_not_encoded_per_mb"][name] for row in rows) for name in hits
        },
    }


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"GDSF, the default": "tab:blue", "LFU": "tab:orange", "LRU": "tab:green", "next use known": "lightgrey"}
    figure, (bars, course) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for index, (name, colour) in enumerate(colours.items()):
        for at, row in enumerate(result["summary"]):
            hits = [run["hit_rate"][name] for run in result["runs"] if run["budget"] == row["budget"]]
            place = at + (index - 1.5) * 0.2
            bars.bar(place, row["hit_rate"][name], 0.19, color=colour, label=name if at == 0 else None)
            bars.plot([place] * len(hits), hits, "k.", markersize=2)
    bars.set_xticks(range(len(BUDGETS)), [f"{budget:.0%}" for budget in BUDGETS])
    bars.set(xlabel="budget, of the corpus's caches", ylabel="tokens not encoded", ylim=(0, 1))
    bars.legend(fontsize=8, loc="upper left")
    middle = [run for run in result["runs"] if run["budget"] == BUDGETS[1]]
    for name, colour in colours.items():
        mean = np.mean([run["course"][name] for run in middle], axis=0)
        course.plot(np.arange(1, len(mean) + 1) * 100, mean, color=colour)
    course.set(xlabel="retrievals", ylabel=f"tokens not encoded, budget {BUDGETS[1]:.0%}", ylim=(0, 1))
    for axes in (bars, course):
        axes.grid(alpha=0.3)
    seeds = len({run["seed"] for run in result["runs"]})
    figure.suptitle(f"{RETRIEVALS:,} retrievals over {DOCUMENTS} documents, Zipf and drift, {seeds} seeds")
    figure.savefig(path, dpi=140)


# --- time to first token ----------------------------------------------------------------------------------------

QUESTIONS = ["What is this about?", "What happens if it fails?", "Which names are mentioned?", "When is it used?"]
ASKED_TOKENS = 250


def passages(engine: Any, count: int) -> list[str]:
    """Texts of about `ASKED_TOKENS` tokens, from Python's own reference."""
    from kvcag.demo.corpus import python_topics

    cut = []
    for topic in (
        "assignment",
        "calls",
        "class",
        "compound",
        "comparisons",
        "dynamic-features",
        "exceptions",
        "import",
    ):
        text = python_topics([topic])[0].text
        size = 4 * ASKED_TOKENS
        cut += [text[start : start + size] for start in range(0, len(text) - size, size)]
    assert len(cut) >= count, f"only {len(cut)} passages"
    return cut[:count]


def ttft(questions: int, think_s: float) -> dict[str, Any]:
    import torch

    from kvcag import CacheScheduler, HFEngine, KVCacheMemory
    from kvcag.demo.model import embedded_model
    from kvcag.stores.memory import MemoryStore

    engine = HFEngine.from_pretrained(embedded_model(), dtype="float32", device="cpu")
    texts = passages(engine, 60)
    asked, others = texts[:12], texts[12:]
    store = MemoryStore()
    plain, scheduled = KVCacheMemory(engine, store), KVCacheMemory(engine, store)
    times: dict[str, list[float]] = {"beside": [], "alone": []}
    cpu: dict[str, list[float]] = {"beside": [], "alone": []}
    waited: list[float] = []
    working = 0
    dice = random.Random(0)
    with CacheScheduler(scheduled, 8 << 30, quiet_s=0.1) as scheduler:
        for _ in range(3):
            with engine.lock.acquire():  # so that only these are hot when the questions begin
                ask(plain, asked[:6], "Begin.")
                ask(plain, asked[6:], "Begin.")
        for number in range(questions):
            documents = dice.sample(asked, 3)
            arms = ["beside", "alone"]
            dice.shuffle(arms)
            for arm in arms:
                pause = think_s * dice.uniform(0.7, 1.3)
                if arm == "beside":
                    supply(scheduler, others)
                    time.sleep(pause)
                    working += engine.lock._holds_in_background
                    began, working_began = time.perf_counter(), time.process_time()
                    scheduler.observe(documents)
                    with engine.lock.acquire():  # the worker has paused
                        waited.append(time.perf_counter() - began)
                    first = ask(scheduled, documents, QUESTIONS[number % 4])
                else:
                    with engine.lock.acquire():  # no other thread gets the model meanwhile
                        time.sleep(pause)
                    began, working_began = time.perf_counter(), time.process_time()
                    first = ask(plain, documents, QUESTIONS[number % 4])
                times[arm].append(first[0] - began)
                cpu[arm].append(first[1] - working_began)
            print(number, *(f"{arm} {values[-1]:.3f}" for arm, values in times.items()), flush=True)
        metrics = scheduler.metrics()
    return {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "questions": questions,
        "working_when_asked": working,
        "promoted": metrics["promoted"],
        "waited_for_the_model_s": {"median": statistics.median(waited), "most": max(waited)},
        "median_s": {arm: statistics.median(values) for arm, values in times.items()},
        "p95_s": {arm: float(np.quantile(values, 0.95)) for arm, values in times.items()},
        "median_ratio": statistics.median(times["beside"]) / statistics.median(times["alone"]),
        "p95_ratio": float(np.quantile(times["beside"], 0.95) / np.quantile(times["alone"], 0.95)),
        "cpu_p95_ratio": float(np.quantile(cpu["beside"], 0.95) / np.quantile(cpu["alone"], 0.95)),
        "cpu_median_ratio": statistics.median(cpu["beside"]) / statistics.median(cpu["alone"]),
        "times_s": times,
        "cpu_s": cpu,
    }


def supply(scheduler: Any, others: list[str]) -> None:
    """Let there always be something to encode."""
    cached = scheduler.metrics()["caches"]
    if cached > 0.8 * len(others):
        scheduler.demote(others)
    scheduler.observe(others)
    scheduler.observe(others)


def ask(memory: Any, documents: list[str], question: str) -> tuple[float, float]:
    """When the first token came, on the wall and in this process's CPU time."""
    from kvcag.chat_template import Document

    system = ["Answer from these passages.\n\n", *(Document(f"{text}\n\n") for text in documents)]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    stream = memory.stream(messages, sampling=memory.engine.sampling(max_new_tokens=4))
    next(stream)
    first = time.perf_counter(), time.process_time()
    for _ in stream:
        pass
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["policy", "ttft"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--think", type=float, default=0.6, help="seconds between questions, about")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what == "policy":
        result = policy(given.seeds)
        (given.out / "scheduler.json").write_text(json.dumps(result, indent=1) + "\n")
        plot(result, given.out / "scheduler.png")
        print(json.dumps(result["summary"], indent=1))
        behind = [row for row in result["summary"] + result["elsewhere"] if min(row["least_lead"].values()) <= 0]
        for row in behind:
            print("not ahead for every seed:", json.dumps(row))
        sys.exit(1 if any(row in result["summary"] for row in behind) else 0)
    result = ttft(given.questions, given.think)
    (given.out / "scheduler_ttft.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name not in ("times_s", "cpu_s")}, indent=1))
    sys.exit(0 if result["p95_ratio"] <= 1.1 else 1)


if __name__ == "__main__":
    main()
