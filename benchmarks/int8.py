"""Measures how caches stored as int8 change answers, during decoding, with the small model in bfloat16.

    python benchmarks/int8.py [--questions 20] [--tokens 512]

For each context: prefill it, store the cache as a kvcag file would, once in bfloat16 and once as int8, and decode the
same 24 tokens one by one from each (the greedy tokens of the bfloat16 cache). The figure is KL(bfloat16 || int8)
in nats per token. A single pass over the whole text would not read the cache, so the figure would be zero.

With float32 arithmetic only the caches differ. With bfloat16 arithmetic the last bit of a number changes every logit,
so the script also measures a bfloat16 cache with random last bits. Writes benchmarks/results/int8.json.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvcag.cache.layers import LayerKV, cache_argument, cache_of, layers_of
from kvcag.core import KVCacheItem
from kvcag.demo.model import embedded_model
from kvcag.stores.format import item_from_bytes, item_to_bytes

RESULTS = Path(__file__).parent / "results" / "int8.json"
STEPS = 24


def decode(model: torch.nn.Module, cache: DynamicCache, first: int, forced: list[int] | None) -> torch.Tensor:
    """Log-probabilities, `(STEPS, vocab)`, decoding `forced`, or greedily. The cache grows."""
    token, steps = first, []
    for step in range(STEPS):
        logits = model(torch.tensor([[token]]), **cache_argument(model, cache)).logits[0, -1]
        steps.append(logits.float().log_softmax(-1))
        token = forced[step] if forced is not None else int(logits.argmax())
    return torch.stack(steps)


def at_rest(layers: list[LayerKV], quantize: str | None) -> tuple[list[LayerKV], int]:
    """What a file gives back, and the file's bytes."""
    item = KVCacheItem(memory=cache_of(layers), token_ids=torch.zeros(layers[0][0].shape[-2], dtype=torch.long))
    data = item_to_bytes(item, quantize=quantize)
    return layers_of(item_from_bytes(data, "at rest").memory), len(data)


def last_bits(states: torch.Tensor) -> torch.Tensor:
    noise = torch.randint(0, 2, states.shape, dtype=torch.int16)
    return (states.view(torch.int16) ^ noise).view(torch.bfloat16)


def divergences(model: torch.nn.Module, ids: list[int]) -> dict[str, float]:
    """Of one context, whose last token is the first to be decoded."""
    cache = DynamicCache()
    model(torch.tensor([ids[:-1]]), **cache_argument(model, cache))
    kept = [(keys.bfloat16(), values.bfloat16()) for keys, values in layers_of(cache)]
    (plain, plain_bytes), (int8, int8_bytes) = at_rest(kept, None), at_rest(kept, "int8")
    noisy = [(last_bits(keys), last_bits(values)) for keys, values in kept]

    def steps(layers: list[LayerKV], forced: list[int] | None) -> torch.Tensor:
        own = cache_of((keys.to(model.dtype), values.to(model.dtype)) for keys, values in layers)
        return decode(model, own, ids[-1], forced)

    reference = steps(plain, None)
    forced = reference.argmax(-1).tolist()
    quantized, noise = steps(int8, forced), steps(noisy, forced)
    return {
        "kl_int8": float((reference.exp() * (reference - quantized)).sum(-1).mean()),
        "kl_random_last_bits": float((reference.exp() * (reference - noise)).sum(-1).mean()),
        "argmax_agreement": float((quantized.argmax(-1) == reference.argmax(-1)).float().mean()),
        "bytes_ratio": int8_bytes / plain_bytes,
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    topics = [t for t in sorted(pydoc_data.topics.topics.items()) if len(t[1]) > 5 * arguments.tokens]
    figures: dict[str, object] = {
        "model": "SmolLM2-135M-Instruct, CPU",
        "questions": arguments.questions,
        "context_tokens": arguments.tokens,
        "decoded_tokens_a_question": STEPS,
    }
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        found = []
        for name, text in topics[: arguments.questions]:
            ids = tokenizer(text).input_ids[: arguments.tokens]
            ids += tokenizer(f"\n\nIn one sentence, what is said about {name} above? Answer:").input_ids
            found.append(divergences(model, ids))
        means = {figure: statistics.mean(each[figure] for each in found) for figure in found[0]}
        figures[f"arithmetic in {dtype}".replace("torch.", "")] = {
            **means,
            "kl_int8_of_the_worst_question": max(each["kl_int8"] for each in found),
        }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
