"""Measures the parts of a first token and a decoding step, with lower bounds ("floors"), on a CPU or an accelerator.

    python benchmarks/profiling.py --out benchmarks/results/profile-cpu                       # the embedded model, fp32
    PYTHONPATH=. python benchmarks/profiling.py --geometry qwen3-8b --device cuda --context 2048 6064 32768 --out DIR

Needs torch, transformers and kvcag's own requirements; a geometry's weights are random and made on the device.
For each length of context, medians of `--repeat` rounds in which all take turns:

- full: the model's forward pass over context and question; `generate` over the same, to its first token;
- exact: `engine.stream` to its first token over a cache of the context; the model's forward pass over a ready cache
  (bare); `generate` over a deep copy of a ready cache;
- rotate, query: `KVCacheMemory.merge` of eight documents and the first token;
- step: one more token: through `engine.stream`; only the model over a `DynamicCache`; and a faster engine
  (benchmarks/graphs.py): a static cache, and on CUDA a graph.

Then the time of each part (spans; on CUDA this is the host's time, and it includes waiting for the device when a token
is chosen), and on CUDA the number and time of kernels (torch.profiler). The floor of a pass is the larger of two times:
its operations / the rate of a large matrix product, and its bytes / the memory bandwidth. Both rates are measured
first.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from geometry import GEOMETRIES, HEAD, documents_of, endless, random_engine
from graphs import captured, grouped_attention, static_pass
from measuring import Ceilings, Work, machine, median_seconds, seconds, synchronize
from peers.plain import Deepcopied, FullPrefill
from profiling_tables import report
from spans import Spans
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

from kvcag import HFEngine, KVCacheMemory, Sampling
from kvcag.cache.layers import cache_argument, generation_cache, layers_of, nbytes
from kvcag.chat_template import as_messages

DOCUMENTS = 8
STEPS = 16
QUESTION = "Which of the statements described above transfers control, and what happens to the local variables then?"
_numbers = itertools.count()


def new_question() -> str:
    """A question of the same length that was not asked before."""
    return f"{next(_numbers):05d}{QUESTION[5:]}"


@dataclass
class Case:
    """One length of context: what is encoded beforehand, and what a question then does."""

    engine: HFEngine
    tokens: int

    def __post_init__(self) -> None:
        self.documents = documents_of(self.engine, self.tokens, DOCUMENTS)
        self.device = self.engine.device
        self.sampling = Sampling(max_new_tokens=STEPS + 1)
        self.encode_s = seconds(self.device, self.encode)
        self.prompt = self.engine.build_prompt(QUESTION, self.cache)
        self.ids = torch.tensor([self.prompt.token_ids], device=self.device)
        self.tail = torch.tensor([self.prompt.tail_ids], device=self.device)
        self.context = len(self.cache.token_ids)
        head = self.engine.template.split_system(HEAD, as_messages(QUESTION)).head_ids
        self.engine.prefixes.max_bytes = 2 * len(head) * self.engine.bytes_per_token  # room for the head, no more

    def encode(self) -> None:
        self.cache = self.engine.build_kv_cache([HEAD, *self.documents])

    @cached_property
    def memory(self) -> KVCacheMemory:
        memory = KVCacheMemory(self.engine, instruction=HEAD)
        memory.add([memory.extract(text) for text in self.documents])
        return memory

    def bare(self, ids: torch.Tensor, cache: DynamicCache) -> None:
        with torch.no_grad():
            self.engine.model(
                input_ids=ids, **cache_argument(self.engine.model, cache), use_cache=True, logits_to_keep=1
            ).logits.argmax()

    def ready(self) -> DynamicCache:
        """A cache of the context, its own."""
        return generation_cache([layers_of(self.cache)], room=self.tail.shape[1] + STEPS + 1)

    def exact(self) -> Iterator[Any]:
        return self.engine.stream(self.engine.build_prompt(new_question(), self.cache), self.sampling, self.cache)

    def merged(self, strategy: str, ratio: float = 0.1) -> Iterator[Any]:
        context = self.memory.merge(self.memory.store.keys(), new_question(), strategy=strategy, ratio=ratio)  # type: ignore[arg-type]
        return self.engine.stream(self.engine.build_prompt(None, context), self.sampling, context)


def first(stream: Callable[[], Iterator[Any]]) -> None:
    chunks = stream()
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]


def ttft(case: Case, repeat: int) -> dict[str, float]:
    """Seconds to the first token, by what is done; medians."""
    full, copied = FullPrefill(case.engine), Deepcopied(case.engine)
    copied.encode(case.cache.token_ids.tolist())
    calls: dict[str, Callable[[], object]] = {
        "full, bare": lambda: case.bare(case.ids, DynamicCache()),
        "full, generate": lambda: full.run(case.ids, 1),
        "exact": lambda: first(case.exact),
        "exact, generate over a deepcopy": lambda: copied.run(case.ids, 1),
        "rotate": lambda: first(partial(case.merged, "rotate")),
        "query 10%": lambda: first(partial(case.merged, "query")),
    }
    taken: dict[str, list[float]] = {name: [] for name in ("exact, bare", *calls)}
    for _ in range(repeat + 1):
        for name, call in calls.items():
            taken[name].append(seconds(case.device, call))
        taken["exact, bare"].append(seconds(case.device, partial(case.bare, case.tail, case.ready())))
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def steps(case: Case) -> dict[str, float]:
    """Seconds of a decode step; medians over one answer."""
    token = torch.tensor([[1]], device=case.device)
    stream = case.exact()
    next(stream)
    ours = [seconds(case.device, lambda: next(stream)) for _ in range(STEPS)]
    stream.close()  # type: ignore[attr-defined]
    dynamic = DynamicCache()
    for index, (keys, values) in enumerate(layers_of(case.cache)):
        dynamic.update(keys, values, index)
    bare = [seconds(case.device, lambda: case.bare(token, dynamic)) for _ in range(STEPS)]
    return {"step": statistics.median(ours[1:]), "step, bare DynamicCache": statistics.median(bare[1:])}


def without_launches(case: Case, repeat: int) -> dict[str, float]:
    """The prototypes: seconds of a step and of the question's prefill over a static cache; on CUDA as one graph."""
    found, cuda = {}, case.device.type == "cuda"
    for name, new in (("step", 1), ("exact", case.tail.shape[1])):
        for attention, context in (("", nullcontext()), (", grouped heads", grouped_attention(case.engine.model))):
            with context:
                run = static_pass(case.engine.model, layers_of(case.cache), new)
                taken = median_seconds(case.device, captured(run) if cuda else run, repeat, warm=2)
            found[f"{name}, static{' + graph' if cuda else ''}{attention}"] = taken
            del run
            gc.collect()
    return found


def where(case: Case, repeat: int) -> dict[str, dict[str, float]]:
    """Own seconds of each part, means of `repeat` runs after one that warms up."""
    calls: dict[str, Callable[[], object]] = {
        "exact": lambda: first(case.exact),
        "rotate": lambda: first(partial(case.merged, "rotate")),
        "query 10%": lambda: first(partial(case.merged, "query")),
    }
    found: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        call()
        with Spans().watching(case.engine.model) as spans:
            for _ in range(repeat):
                call()
            synchronize(case.device)
        found[name] = {part: value / repeat for part, value in spans.seconds.items()}
    stream = case.exact()
    next(stream)
    with Spans().watching(case.engine.model) as spans:
        for _ in range(repeat):
            next(stream)
        synchronize(case.device)
    found["step"] = {part: value / repeat for part, value in spans.seconds.items()}
    return found


def kernels(case: Case) -> dict[str, dict[str, Any]]:
    """Of one first token and one step: how long kernels ran (on a CPU: operators), how many, and the longest."""
    stream = case.exact()
    next(stream)
    calls = {
        "full, bare": lambda: case.bare(case.ids, DynamicCache()),
        "exact": lambda: first(case.exact),
        "query 10%": lambda: first(partial(case.merged, "query")),
        "step": lambda: next(stream),
    }
    cuda = case.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    found = {}
    for name, call in calls.items():
        call()
        synchronize(case.device)
        with profile(activities=activities, acc_events=True) as profiled:
            call()
            synchronize(case.device)
        on_device = [e for e in profiled.events() if e.device_type != torch.autograd.DeviceType.CPU]
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        top = sorted(profiled.key_averages(), key=lambda e: getattr(e, key), reverse=True)[:10]
        found[name] = {
            "kernels": len(on_device),
            "busy_s": sum(e.time_range.elapsed_us() for e in on_device) / 1e6,
            "longest": [{"name": e.key[:80], "count": e.count, "s": getattr(e, key) / 1e6} for e in top],
        }
    return found


def measure(engine: HFEngine, tokens: int, repeat: int, ceilings: Ceilings) -> dict[str, Any]:
    case = Case(engine, tokens)
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    question = case.tail.shape[1]
    row: dict[str, Any] = {
        "context_tokens": case.context,
        "question_tokens": question,
        "encode_once_s": case.encode_s,
        "bytes_held": nbytes(layers_of(case.cache)),
        "floors": {
            "full": asdict(Work.of(engine.model, case.context + question, 0))
            | Work.of(engine.model, case.context + question, 0).floors(ceilings),
            "exact": asdict(Work.of(engine.model, question, case.context))
            | Work.of(engine.model, question, case.context).floors(ceilings),
            "query 10%": Work.of(engine.model, question + case.context // 10, case.context).floors(ceilings),
            "step": Work.of(engine.model, 1, case.context + question).floors(ceilings),
        },
    }
    parts = {
        "ttft_s": partial(ttft, case, repeat),
        "step_s": partial(steps, case),
        "without_launches_s": partial(without_launches, case, max(repeat, 10)),
        "where_s": partial(where, case, repeat),
        "kernels": partial(kernels, case),
    }
    for name, part in parts.items():
        with reported(row, name):
            row[name] = part()
            print(f"  {case.context} {name}", file=sys.stderr, flush=True)
    if case.device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


@contextmanager
def reported(row: dict[str, Any], name: str) -> Iterator[None]:
    """A part that fails is named in the result, and the others are measured all the same."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        row[name] = {}
        row.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), help="random weights; default: the embedded model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="folder for profile.json and profile.md")
    parser.add_argument("--only-write", action="store_true", help="measure nothing: profile.md of profile.json")
    given = parser.parse_args()
    if given.only_write:
        result = json.loads((given.out / "profile.json").read_text())
        (given.out / "profile.md").write_text(report(result))
        return
    device = torch.device(given.device)
    dtype = getattr(torch, given.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    described = machine(device)
    if given.geometry:
        engine = random_engine(given.geometry, device, dtype)
    else:
        from kvcag.demo.model import embedded_model

        engine = endless(HFEngine.from_pretrained(embedded_model(), dtype, device, prefix_cache_bytes=0))
    ceilings = Ceilings.of(device, dtype)
    result: dict[str, Any] = {
        "model": f"{given.geometry} (random weights)" if given.geometry else Path(engine.model_name).name,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": described,
        "ceilings": asdict(ceilings),
        "repeat": given.repeat,
        "rows": [],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    for tokens in given.context:
        result["rows"].append(measure(engine, tokens, given.repeat, ceilings))
        (given.out / "profile.json").write_text(json.dumps(result, indent=1) + "\n")
        (given.out / "profile.md").write_text(report(result))
        gc.collect()
    print(report(result))


if __name__ == "__main__":
    main()
