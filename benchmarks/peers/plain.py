"""transformers alone: `generate` over everything, over a deepcopied prefix cache, and without any context."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvcag import HFEngine
from kvcag.cache.layers import cache_argument, layers_of, nbytes
from peers.base import TOKENS, Answer, context_ids, prompt_ids


class _FirstToken(BaseStreamer):
    """When the first token came; the prompt is put first."""

    def __init__(self) -> None:
        self.puts, self.at = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


class FullPrefill:
    """`model.generate` reads instruction, documents and question each time."""

    name = "transformers, full prefill"

    def __init__(self, engine: HFEngine) -> None:
        self.engine = engine
        self.context: tuple[int, ...] = ()

    def prepare(self, documents: Sequence[str]) -> None:
        self.context = context_ids(self.engine, documents)

    def ask(self, question: str) -> Answer:
        started = time.perf_counter()
        return self.run(prompt_ids(self.engine, self.context, question), TOKENS, started)

    def run(self, ids: torch.Tensor, new: int, started: float | None = None) -> Answer:
        """Generate from a prompt of ids, `(1, tokens)`."""
        started, first = started or time.perf_counter(), _FirstToken()
        out = self.engine.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            streamer=first,
            **cache_argument(self.engine.model, self.cache()),
        )
        text = self.engine.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return Answer(text, first.at - started, time.perf_counter() - started)

    def cache(self) -> Cache:
        """What a generation starts with."""
        return DynamicCache()

    @property
    def bytes_held(self) -> int:
        return 0


class NoContext(FullPrefill):
    """The question alone, in a user turn: what the model says without having read anything."""

    name = "the question alone, without documents"

    def prepare(self, documents: Sequence[str]) -> None:
        pass

    def ask(self, question: str) -> Answer:
        started = time.perf_counter()
        ids = self.engine.template.prompt([{"role": "user", "content": question}]).token_ids
        return self.run(torch.tensor([ids], device=self.engine.device), TOKENS, started)


class Deepcopied(FullPrefill):
    """What people do by hand: encode the prefix once, and give `generate` a deep copy each time."""

    name = "transformers, deepcopied prefix cache"
    prefix: DynamicCache

    def prepare(self, documents: Sequence[str]) -> None:
        super().prepare(documents)
        self.encode(self.context)

    def encode(self, ids: Sequence[int]) -> None:
        self.prefix = DynamicCache()
        with torch.no_grad():
            prefix = torch.tensor([list(ids)], device=self.engine.device)
            self.engine.model(
                prefix, **cache_argument(self.engine.model, self.prefix), use_cache=True, logits_to_keep=1
            )

    def cache(self) -> Cache:
        return copy.deepcopy(self.prefix)

    @property
    def bytes_held(self) -> int:
        return nbytes(layers_of(self.prefix))
