"""OpenTelemetry: a span and metrics per answer, by OpenTelemetry's semantic conventions for generative AI.

kvcag calls OpenTelemetry's API if it is installed. The application sets up an SDK, which exports spans and metrics
(docs/operations.md); without an SDK, nothing is recorded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from kvcag.core import Chunk, Usage

if TYPE_CHECKING:
    from kvcag.engines.base import Sampling

try:
    from opentelemetry import metrics, trace
except ImportError:
    _IS_INSTALLED = False
else:
    _IS_INSTALLED = True

_SECONDS = [0.01 * 2**n for n in range(14)]
_FIRST = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]
_TOKENS = [4.0**n for n in range(14)]
"""Bounds of the histograms' buckets that the conventions recommend."""


def observed(
    chunks: Generator[Chunk, None, None], model: str, sampling: Sampling, started: float
) -> Generator[Chunk, None, None]:
    """Pass an answer's chunks through, and record a span and metrics with the answer's usage at their end.

    Args:
        chunks: the answer.
        model: the model's name.
        sampling: the settings of the answer.
        started: the time of the call, by `time.perf_counter`.
    """
    if not _IS_INSTALLED:
        return chunks
    common = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "kvcag",
        "gen_ai.request.model": model,
    }
    began = time.time_ns() - int(1e9 * (time.perf_counter() - started))
    attributes = {**common, **_settings(sampling)}
    span = trace.get_tracer("kvcag").start_span(f"chat {model}", attributes=attributes, start_time=began)
    return _observed(chunks, span, common, started)


def _observed(
    chunks: Generator[Chunk, None, None], span: trace.Span, common: Mapping[str, str], started: float
) -> Generator[Chunk, None, None]:
    error: dict[str, str] = {}
    try:
        with contextlib.closing(chunks):
            for chunk in chunks:
                if chunk.usage is not None:
                    span.set_attribute("gen_ai.response.finish_reasons", [str(chunk.finish_reason)])
                    _record(chunk.usage, span, common)
                yield chunk
    except Exception as failed:
        error["error.type"] = type(failed).__name__
        span.set_attributes(error)
        span.record_exception(failed)
        span.set_status(trace.StatusCode.ERROR, str(failed))
        raise
    finally:
        span.end()
        _instruments()["duration"].record(time.perf_counter() - started, {**common, **error})


def _settings(sampling: Sampling) -> dict[str, Any]:
    named = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop_sequences": list(sampling.stop) or None,
    }
    return {f"gen_ai.request.{name}": value for name, value in named.items() if value is not None}


def _record(usage: Usage, span: trace.Span, common: Mapping[str, str]) -> None:
    instruments = _instruments()
    span.set_attributes(
        {
            "gen_ai.response.model": common["gen_ai.request.model"],
            "gen_ai.response.time_to_first_chunk": usage.ttft_s,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.usage.cache_creation.input_tokens": usage.created_tokens,
        }
    )
    instruments["first"].record(usage.ttft_s, common)
    for kind, tokens in (("input", usage.prompt_tokens), ("output", usage.completion_tokens)):
        instruments["tokens"].record(tokens, {**common, "gen_ai.token.type": kind})
    context = usage.context
    if context is None:
        return
    span.set_attributes({"kvcag.context.mode": context.mode, "kvcag.context.strategy": context.strategy})
    for source in ("reused", "recomputed", "encoded"):
        tokens = getattr(context, f"{source}_tokens")
        span.set_attribute(f"kvcag.context.{source}_tokens", tokens)
        instruments["context"].add(tokens, {**common, "kvcag.context.source": source})


@cache
def _instruments() -> dict[str, Any]:
    meter = metrics.get_meter("kvcag")

    def histogram(name: str, unit: str, about: str, bounds: list[float]) -> metrics.Histogram:
        return meter.create_histogram(name, unit, about, explicit_bucket_boundaries_advisory=bounds)

    return {
        "duration": histogram("gen_ai.client.operation.duration", "s", "From the call to the answer's end.", _SECONDS),
        "first": histogram("gen_ai.server.time_to_first_token", "s", "From the call to the first token.", _FIRST),
        "tokens": histogram("gen_ai.client.token.usage", "{token}", "Tokens of prompts and answers.", _TOKENS),
        "context": meter.create_counter(
            "kvcag.context.tokens", "{token}", "Tokens of documents and instructions, by where they came from."
        ),
    }
