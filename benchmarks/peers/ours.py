"""kvcag, through `KVCacheMemory.stream`, which both adapters call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from geometry import HEAD

from kvcag import HFEngine, KVCacheMemory, Sampling
from kvcag.cache.layers import layers_of, nbytes
from kvcag.chat_template import Document
from peers.base import TOKENS, Answer, timed


class Exact:
    """The corpus is one context, read once; a question that begins alike finds it by its tokens."""

    name = "kvcag, exact"
    strategy: Any = "exact"
    ratio = 0.0

    def __init__(self, engine: HFEngine) -> None:
        self.engine = engine
        self.sampling = Sampling(max_new_tokens=TOKENS)

    def prepare(self, documents: Sequence[str]) -> None:
        self.documents = [Document(text) for text in documents]
        self.engine.prefixes.clear(self.name)
        self.memory = KVCacheMemory(self.engine, namespace=self.name)
        self.encode()

    def encode(self) -> None:
        prompt = self.engine.template.prompt(self.messages("…"))
        layers, _ = self.engine.prefill(prompt.context_ids, namespace=self.name)
        self.held = nbytes(layers)

    def messages(self, question: str) -> list[dict[str, Any]]:
        system = {"role": "system", "content": [f"{HEAD}\n\n", *self.documents]}
        return [system, {"role": "user", "content": question}]

    def ask(self, question: str) -> Answer:
        started = time.perf_counter()
        chunks = self.memory.stream(
            self.messages(question), strategy=self.strategy, ratio=self.ratio, sampling=self.sampling
        )
        return timed((chunk.text for chunk in chunks), started)

    @property
    def bytes_held(self) -> int:
        return self.held


class Merged(Exact):
    """Each document is encoded by itself, once, and put together per question."""

    def __init__(self, engine: HFEngine, strategy: str, ratio: float = 0.0) -> None:
        super().__init__(engine)
        self.strategy, self.ratio = strategy, ratio
        self.name = f"kvcag, {strategy}" + (f" {ratio:.0%}" if ratio else "")

    def encode(self) -> None:
        self.memory.keep(self.messages("…"))
        items = self.memory.get_all()
        self.held = sum(nbytes(layers_of(item.memory)) for item in items)
