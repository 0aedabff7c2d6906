"""Measures the time of parts of the engine and the model with nested spans, each without its inner spans."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

import kvcag.cache.merge
import kvcag.engines.hf
from kvcag.cache.prefix_cache import PrefixCache
from kvcag.chat_template import ChatTemplate
from kvcag.engines.decode import Detokenizer, Sampler

ENGINE = [
    (ChatTemplate, "render", "chat template"),
    (ChatTemplate, "encode", "tokenise"),
    (PrefixCache, "match", "prefix lookup"),
    (PrefixCache, "insert", "prefix kept"),
    (kvcag.engines.hf, "reusable_prefix", "context checked"),
    (kvcag.engines.hf, "generation_cache", "cache copied"),
    (kvcag.cache.merge, "_place", "documents placed and re-rotated"),
    (kvcag.cache.merge, "select", "choosing: other"),
    (kvcag.cache.merge, "recompute", "recomputing: other"),
    (Sampler, "choose", "token chosen, device waited for"),
    (Detokenizer, "push", "detokenise"),
]
"""(owner, name, span). A part that was renamed is an error here, not a span that is silently missing."""

MODEL = [
    (r"rotary_emb$", "model: RoPE tables"),
    (r"embed_tokens$", "model: embedding"),
    (r"lm_head$", "model: output head"),
    (r"mlp(\.\w+)?$", "model: MLP"),
    (r"_proj$", "model: attention projections"),
    (r"norm$", "model: norms"),
    (r"self_attn$", "model: attention, RoPE, cache"),
]
"""(pattern of a module's name, span), the first that fits."""


class Spans:
    """Own seconds by name. A span's time does not count for the one around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, name: str) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._open.append(name)
        self._since = now

    def leave(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open.pop()] += now - self._since
        self._since = now

    def split_system(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def spanned(*given: Any, **named: Any) -> Any:
            self.enter(name)
            try:
                return function(*given, **named)
            finally:
                self.leave()

        return spanned

    @contextmanager
    def watching(self, model: torch.nn.Module, other: str = "other") -> Iterator[Spans]:
        """Measure what runs in this block; what no span claims is `other`."""
        with ExitStack() as stack:
            for owner, name, span in ENGINE:
                stack.enter_context(patch.object(owner, name, self.split_system(span, getattr(owner, name))))
            decoder = model.get_decoder()  # type: ignore[operator]
            self._hook(stack, decoder, "model: between its modules")
            for name, module in model.named_modules():
                span = next((span for pattern, span in MODEL if re.search(pattern, name)), None)
                if span:
                    self._hook(stack, module, span)
            self.enter(other)
            try:
                yield self
            finally:
                self.leave()

    def _hook(self, stack: ExitStack, module: torch.nn.Module, span: str) -> None:
        before = module.register_forward_pre_hook(lambda *_: self.enter(span))
        after = module.register_forward_hook(lambda *_: self.leave(), always_call=True)  # a pass may end early
        stack.callback(before.remove)
        stack.callback(after.remove)
