"""A copy of MemOS's `KVCacheMemory` that behaves as MemOS does with current transformers, including its defects.

Each document becomes a separate system turn that begins with MemOS's sentence. Merging makes empty layers and assigns
the concatenated keys and values to them. transformers 5 treats a layer that was never initialised as empty: its
`get_seq_length()` is 0, and the first forward pass replaces the assigned tensors. So the answer is the same as without
any document. `Mended` initialises the layers, to show what the method gives without this defect: keys are not rotated,
so all documents have the same positions, and each has its own system turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from transformers import DynamicCache

from kvcag import HFEngine
from kvcag.cache.layers import cache_argument, layers_of, nbytes
from kvcag.engines.decode import Detokenizer
from peers.base import TOKENS, Answer, timed

OPENING = "Below is some information about the user.\n"


class MemOS:
    """Merging as it is."""

    name = "MemOS merging"

    def __init__(self, engine: HFEngine) -> None:
        self.model, self.tokenizer = engine.model, engine.tokenizer

    def prepare(self, documents: Sequence[str]) -> None:
        self.caches = [self.build_kv_cache(text) for text in documents]

    @torch.no_grad()
    def build_kv_cache(self, text: str) -> DynamicCache:
        ids = self.ids([{"role": "system", "content": OPENING + text}], add_generation_prompt=False)
        cache = DynamicCache()
        self.model(input_ids=ids, use_cache=True, **cache_argument(self.model, cache))
        return cache

    def ids(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> torch.Tensor:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(self.model.device)

    def merge(self) -> DynamicCache:
        """`get_cache`: one concatenation a layer, into layers that are not initialised."""
        merged = DynamicCache()
        for parts in zip(*(cache.layers for cache in self.caches), strict=True):
            layer = type(parts[0])()
            layer.keys = torch.cat([part.keys for part in parts], dim=-2)
            layer.values = torch.cat([part.values for part in parts], dim=-2)
            merged.layers.append(layer)
        return merged

    def ask(self, question: str) -> Answer:
        started = time.perf_counter()
        ids = self.ids([{"role": "user", "content": question}], add_generation_prompt=True)
        return timed(self.generate(ids, self.merge()), started)

    def generate(self, ids: torch.Tensor, cache: DynamicCache) -> Iterator[str]:
        detokenizer = Detokenizer(self.tokenizer)
        for _ in range(TOKENS):
            with torch.no_grad():
                logits = self.model(input_ids=ids, use_cache=True, **cache_argument(self.model, cache)).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            yield detokenizer.push(int(ids))
        yield detokenizer.flush()

    @property
    def bytes_held(self) -> int:
        return sum(nbytes(layers_of(cache)) for cache in self.caches)


class Mended(MemOS):
    """The same, through `Cache.update`, which initialises the layers."""

    name = "MemOS merging, layers initialised"

    def merge(self) -> DynamicCache:
        merged, broken = DynamicCache(), super().merge()
        for index, layer in enumerate(broken.layers):
            merged.update(layer.keys, layer.values, index)
        return merged
