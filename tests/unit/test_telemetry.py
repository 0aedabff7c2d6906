"""Spans and metrics of answers, through OpenTelemetry's own SDK and its exporter for Prometheus."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from kvcag import HFEngine, KVCacheMemory
from kvcag.engines.decode import Detokenizer
from kvcag.errors import KVCAGError


@pytest.fixture(scope="module")
def spans() -> Any:
    """What OpenTelemetry exported. Its providers are set once a process."""
    pytest.importorskip("opentelemetry.sdk")
    pytest.importorskip("opentelemetry.exporter.prometheus")
    from opentelemetry import metrics, trace
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider([PrometheusMetricReader()]))
    return exporter


@pytest.fixture
def memory(tiny_engine: HFEngine) -> KVCacheMemory:
    memory = KVCacheMemory(tiny_engine, instruction="Answer.")
    memory.add(["The library opens at nine.", "It is in Harbour Street."])
    return memory


def test_a_span_has_the_usage_of_an_answer_after_the_conventions(memory: KVCacheMemory, spans: Any) -> None:
    from opentelemetry import trace

    spans.clear()
    with trace.get_tracer("test").start_as_current_span("request") as parent:
        answer = memory.ask("When?", max_new_tokens=3, strategy="rotate", temperature=0.5, seed=1)
    [span, _] = spans.get_finished_spans()
    assert span.name == f"chat {memory.engine.model_name}"
    assert span.parent.span_id == parent.get_span_context().span_id
    usage, report = answer.usage, answer.report
    assert report is not None
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "kvcag",
        "gen_ai.request.model": memory.engine.model_name,
        "gen_ai.response.model": memory.engine.model_name,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 1,
        "gen_ai.response.finish_reasons": (answer.finish_reason,),
        "gen_ai.response.time_to_first_chunk": usage.ttft_s,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.usage.cache_creation.input_tokens": usage.created_tokens,
        "kvcag.context.mode": "merged",
        "kvcag.context.strategy": "rotate",
        "kvcag.context.reused_tokens": report.reused_tokens,
        "kvcag.context.recomputed_tokens": 0,
        "kvcag.context.encoded_tokens": report.encoded_tokens,
    }
    assert usage.cached_tokens > 0
    took = (span.end_time - span.start_time) / 1e9
    assert usage.total_s <= took + 0.01


def test_metrics_are_ready_for_prometheus(memory: KVCacheMemory, spans: Any) -> None:
    from prometheus_client import generate_latest

    memory.ask("When?", max_new_tokens=2)
    shown = generate_latest().decode()
    for name in (
        "gen_ai_client_operation_duration_seconds_count",
        "gen_ai_server_time_to_first_token_seconds_bucket",
        "gen_ai_client_token_usage",
        "kvcag_context_tokens",
    ):
        assert name in shown, shown
    assert 'kvcag_context_source="reused"' in shown


def test_a_reader_who_leaves_ends_the_span_and_an_error_is_named(
    memory: KVCacheMemory, spans: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans.clear()
    chunks = memory.stream("When?", max_new_tokens=50)
    next(chunks)
    chunks.close()
    [span] = spans.get_finished_spans()
    assert "error.type" not in span.attributes
    assert "gen_ai.usage.input_tokens" not in span.attributes

    def fail(*_: object) -> None:
        raise KVCAGError("no")

    spans.clear()
    monkeypatch.setattr(Detokenizer, "push", fail)
    with pytest.raises(KVCAGError, match="no"):
        memory.ask("And on Saturdays?", max_new_tokens=50)
    assert [span.attributes.get("error.type") for span in spans.get_finished_spans()] == ["KVCAGError"]


def test_without_opentelemetry_answers_are_what_they_were() -> None:
    """In a process of its own, where it cannot be imported."""
    script = """
import sys
sys.modules["opentelemetry"] = None
from kvcag import KVCacheMemory
from kvcag.testing import EchoEngine
assert KVCacheMemory(EchoEngine()).ask("Are you there?").text == "Are you there?"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
