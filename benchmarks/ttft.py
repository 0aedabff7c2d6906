"""Time to first token over a cached context, beside a full prefill and beside the bare model, in one run.

    python benchmarks/ttft.py [--model DIR] [--dtype float32] [--context 512 1024 2048 4096] [--repeat 5] [--out FILE]

For each context length three things are timed in turn, `--repeat` times, and their medians are shown:

- full: transformers alone reads context and question (`model(ids)`), as it does without caches;
- bare: the model's forward pass over the question and a cache that is ready, nothing else: what remains to be paid;
- cached: `engine.stream` from the call to the first token, over a cache that `engine.build_kv_cache` made.

The floor of a cached first token is what has to be read once, weights and keys and values, over the memory's bandwidth
as a copy measures it; on a CPU the question's own arithmetic comes on top, so the second floor divides the operations
of the question's tokens by the rate of a large matrix product.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from kvcag import HFEngine, Sampling
from kvcag.cache.hf import layers_of, nbytes
from kvcag.demo.corpus import python_topics
from kvcag.demo.model import embedded_model

QUESTION = "Which of the statements described above transfers control, and what happens to the local variables then?"


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def bandwidth() -> float:
    """Bytes a second that are read in a large copy."""
    source = torch.empty(64 << 20, dtype=torch.float32)
    target = torch.empty_like(source)
    return source.nbytes / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(5))


def rate(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    return 2 * 1024**3 / statistics.median(seconds(lambda: a @ b) for _ in range(5))


def context_of(engine: HFEngine, tokens: int) -> str:
    """A text of about as many tokens, from Python's own documentation."""
    texts = [document.text for document in python_topics()]
    joined = "\n\n".join(texts * (1 + tokens // 1000))
    ids = engine.template.encode(joined)[:tokens]
    return str(engine.tokenizer.decode(ids))


@torch.no_grad()
def measure(engine: HFEngine, tokens: int, repeat: int) -> dict[str, float]:
    cache = engine.build_kv_cache(context_of(engine, tokens))
    prompt = engine.plan(QUESTION, cache)
    ids = torch.tensor([prompt.token_ids], device=engine.device)
    tail = torch.tensor([prompt.tail_ids], device=engine.device)

    def cached() -> None:
        stream = engine.stream(prompt, Sampling(max_new_tokens=8), cache)
        next(stream)
        stream.close()

    times: dict[str, list[float]] = {"full": [], "bare": [], "cached": []}
    for _ in range(repeat + 1):  # the first round warms up
        ready = copy.deepcopy(cache)
        times["full"].append(seconds(lambda: engine.model(ids, use_cache=True, logits_to_keep=1)))
        times["bare"].append(
            seconds(lambda: engine.model(tail, past_key_values=ready, use_cache=True, logits_to_keep=1))  # noqa: B023
        )
        times["cached"].append(seconds(cached))
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    parameters = sum(p.numel() for p in engine.model.parameters())
    size = torch.empty(0, dtype=engine.model.dtype).element_size()
    return {
        "context_tokens": cache.get_seq_length(),
        "tail_tokens": len(prompt.tail_ids),
        **{f"{name}_s": round(value, 4) for name, value in median.items()},
        "speedup": round(median["full"] / median["cached"], 1),
        "over_bare": round(median["cached"] / median["bare"], 3),
        "floor_bytes_s": round((parameters * size + nbytes(layers_of(cache))) / bandwidth(), 4),
        "floor_operations_s": round(2 * parameters * len(prompt.tail_ids) / rate(engine.model.dtype), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=str, default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--context", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ttft.json")
    given = parser.parse_args()
    engine = HFEngine.from_pretrained(given.model or embedded_model(), dtype=given.dtype, prefix_cache_bytes=0)
    rows = []
    print(f"{'context':>8} {'tail':>5} {'full':>9} {'cached':>9} {'sooner':>7} {'bare':>9} {'cached/bare':>12} floors")
    for tokens in given.context:
        row = measure(engine, tokens, given.repeat)
        rows.append(row)
        print(
            f"{row['context_tokens']:>8} {row['tail_tokens']:>5} {row['full_s'] * 1e3:>6.0f} ms "
            f"{row['cached_s'] * 1e3:>6.0f} ms {row['speedup']:>6.1f}x {row['bare_s'] * 1e3:>6.0f} ms "
            f"{row['over_bare']:>12.3f} {row['floor_bytes_s'] * 1e3:.0f} ms bytes, "
            f"{row['floor_operations_s'] * 1e3:.0f} ms operations",
            flush=True,
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "device": str(engine.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    model = Path(engine.model_name).name
    result = {"model": model, "dtype": given.dtype, "machine": machine, "repeat": given.repeat, "rows": rows}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"figures: {given.out}")


if __name__ == "__main__":
    main()
