"""Run by `compressing.py` in kvpress's environment: compresses a context to a share, and answers over the rest.

    python compressing_worker.py MODEL DTYPE THREADS TOKENS

Reads one JSON object per line, and writes one. A ratio of 0 is `model.generate` over everything, each time.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import kvpress
import torch
import transformers
from kvpress import ExpectedAttentionPress, KVPressTextGenerationPipeline
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation.streamers import BaseStreamer


class FirstToken(BaseStreamer):
    """When the first token came; the prompt is put first."""

    puts, at = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


class Compressed:
    def __init__(self, name: str, dtype: str, tokens: int) -> None:
        self.tokens = tokens
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype.removeprefix("torch.")))
        self.model.eval().generation_config.eos_token_id = None
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.pipeline = KVPressTextGenerationPipeline(model=self.model, tokenizer=self.tokenizer)
        self.context, self.cache = 0, DynamicCache()

    def prepare(self, ids: list[int], ratio: float) -> dict[str, Any]:
        if ratio:
            self.context, self.cache = len(ids), DynamicCache()
            with ExpectedAttentionPress(compression_ratio=ratio)(self.model):
                self.model.model(input_ids=torch.tensor([ids]), past_key_values=self.cache)
        held = sum(t.nbytes for layer in self.cache.layers for t in (layer.keys, layer.values)) if ratio else 0
        return {"bytes": held}

    def ask(self, ids: list[int], ratio: float) -> dict[str, Any]:
        return self.over_cache(ids) if ratio else self.full(ids)

    def over_cache(self, ids: list[int]) -> dict[str, Any]:
        """As the pipeline answers. Its first token and its answer are two generations, since it does not stream."""
        first, _ = self.generate(ids, 1)
        total, text = self.generate(ids, self.tokens)
        return {"ttft_s": first, "total_s": total, "text": text}

    def generate(self, ids: list[int], tokens: int) -> tuple[float, str]:
        started = time.perf_counter()
        question = torch.tensor([ids[self.context :]])
        lengths = [self.cache.get_seq_length(layer) for layer in range(len(self.cache))]
        text = self.pipeline.generate_answer(question, self.cache, self.context, tokens)
        self.pipeline._remove_answer_from_cache(self.cache, lengths)
        return time.perf_counter() - started, text

    def full(self, ids: list[int]) -> dict[str, Any]:
        started, first, prompt = time.perf_counter(), FirstToken(), torch.tensor([ids])
        given = {"max_new_tokens": self.tokens, "do_sample": False, "pad_token_id": 0, "streamer": first}
        out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **given)
        total = time.perf_counter() - started
        text = self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        return {"ttft_s": first.at - started, "total_s": total, "text": text}


@torch.inference_mode()
def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what others print is no answer
    torch.set_num_threads(int(sys.argv[3]))
    peer = Compressed(sys.argv[1], sys.argv[2], int(sys.argv[4]))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**versions, "kvpress": getattr(kvpress, "__version__", "")}), file=out, flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        print(json.dumps(getattr(peer, given.pop("do"))(**given)), file=out, flush=True)


if __name__ == "__main__":
    main()
