"""A scheduler's figures, for people and for Prometheus."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

_HELP = {
    "documents": ("gauge", "Texts whose uses are known."),
    "caches": ("gauge", "Caches that are kept."),
    "cached_bytes": ("gauge", "Bytes of keys and values that are kept."),
    "budget_bytes": ("gauge", "Bytes of keys and values that may be kept."),
    "retrieved_total": ("counter", "Texts that retrievers found."),
    "asked_total": ("counter", "Texts that stood in prompts."),
    "reused_tokens_total": ("counter", "Tokens of documents that were found in the store."),
    "encoded_tokens_total": ("counter", "Tokens that were put: of documents that a question had to encode."),
    "promoted_total": ("counter", "Caches encoded ahead of a question, and kept."),
    "promoted_tokens_total": ("counter", "Their tokens."),
    "promoting_seconds_total": ("counter", "Seconds from beginning to encode to having kept, waiting included."),
    "kept_total": ("counter", "Caches encoded for a question, and kept."),
    "passed_total": ("counter", "Caches that were encoded and not kept: worth less than what they would displace."),
    "demoted_total": ("counter", "Caches that went back to text."),
    "dropped_total": ("counter", "Caches whose text changed, or whose owner deleted them."),
    "gone_total": ("counter", "Caches that the store let go by itself."),
    "interruptions_total": ("counter", "How often encoding ahead stepped aside for a question."),
    "failures_total": ("counter", "What could not be encoded, or written down."),
}


@dataclass(frozen=True, slots=True)
class SchedulerMetrics:
    """What a scheduler keeps now, and what it did since it was made. Names in `_total` only ever grow."""

    documents: int
    caches: int
    cached_bytes: int
    budget_bytes: int
    retrieved_total: int
    asked_total: int
    reused_tokens_total: int
    encoded_tokens_total: int
    promoted_total: int
    promoted_tokens_total: int
    promoting_seconds_total: float
    kept_total: int
    passed_total: int
    demoted_total: int
    dropped_total: int
    gone_total: int
    interruptions_total: int
    failures_total: int

    @property
    def hit_rate(self) -> float:
        """Of the tokens of documents that were asked for, the share that was found in the store."""
        tokens = self.reused_tokens_total + self.encoded_tokens_total
        return self.reused_tokens_total / tokens if tokens else 0.0

    def prometheus(self, prefix: str = "kvcag_scheduler", labels: Mapping[str, str] | None = None) -> str:
        """The figures in Prometheus' text format, for whatever serves `/metrics`.

        Args:
            prefix: begins every name.
            labels: put on every figure, such as `{"namespace": "a"}` where each namespace has a scheduler.
        """
        shown = ",".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in (labels or {}).items())
        labelled = f"{{{shown}}}" if shown else ""
        lines: list[str] = []
        for each in fields(self):
            kind, told = _HELP[each.name]
            name = f"{prefix}_{each.name}"
            lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}", f"{name}{labelled} {getattr(self, each.name)}"]
        return "\n".join(lines) + "\n"


@dataclass(slots=True)
class Tally:
    """What was done, counted."""

    actions: dict[str, int] = field(default_factory=dict)
    retrieved: int = 0
    asked: int = 0
    reused_tokens: int = 0
    encoded_tokens: int = 0
    promoted_tokens: int = 0
    promoting_seconds: float = 0.0
    interruptions: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, action: str, tokens: int, seconds: float) -> None:
        """Something of the log."""
        with self.lock:
            self.actions[action] = self.actions.get(action, 0) + 1
            if action == "promoted":
                self.promoted_tokens += tokens
                self.promoting_seconds += seconds

    def add(self, **more: int) -> None:
        """Raise counts by what is given."""
        with self.lock:
            for name, amount in more.items():
                setattr(self, name, getattr(self, name) + amount)
