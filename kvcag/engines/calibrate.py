"""Is merging good enough for this model and these documents? Measured against a full prefill, and kept."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from kvcag.cache.hf import cache_argument, generation_cache
from kvcag.cache.merge import Part, Strategy, merge
from kvcag.engines.learned import learned_file, write_learned
from kvcag.errors import InvalidInputError
from kvcag.prompt import as_messages

if TYPE_CHECKING:
    from kvcag.engines.hf import HFEngine

Candidate: TypeAlias = tuple[Strategy, float]

CANDIDATES: tuple[Candidate, ...] = (
    ("rotate", 0.0),
    ("anchor", 0.1),
    ("deviation", 0.2),
    ("query", 0.05),
    ("query", 0.1),
    ("query", 0.2),
    ("query", 0.4),
    ("full", 1.0),
)

Progress: TypeAlias = Callable[[int, int], None]
"""Called as `progress(done, total)`."""


class CalibrationSettings(TypedDict, total=False):
    """The settings of `calibrate`, all optional."""

    head: str | None
    probes: int
    documents_per_probe: int
    tokens: int
    candidates: Sequence[Candidate]
    seed: int
    progress: Progress | None


class Verdict(BaseModel):
    """What one strategy gave, averaged over the probes.

    Attributes:
        kl: KL(full prefill ‖ merged), nats a token, over the greedy tokens of the full prefill.
        agreement: share of those tokens where the likeliest one is the same.
        cost: time to first token over that of a full prefill of the same tokens.
    """

    model_config = ConfigDict(frozen=True)

    strategy: Strategy
    ratio: float
    kl: float
    agreement: float
    cost: float


class Calibration(BaseModel):
    """The verdicts on one model, on probes made from somebody's own documents."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    probes: int
    context_tokens: int
    verdicts: list[Verdict]

    def cheapest(self, max_kl: float) -> Verdict | None:
        """The strategy that costs least, and less than a full prefill, among those within `max_kl`; else None."""
        passing = [verdict for verdict in self.verdicts if verdict.kl <= max_kl and verdict.cost < 1]
        return min(passing, key=lambda verdict: verdict.cost, default=None)

    def save(self) -> Path:
        """Keep it for this model, in place of an earlier one."""
        return write_learned(_file(self.fingerprint), self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, fingerprint: str) -> Calibration | None:
        """What was kept for a model; None where nothing was, or what there is cannot be read."""
        try:
            return cls.model_validate_json(_file(fingerprint).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None


def calibrate(
    engine: HFEngine,
    documents: Sequence[str],
    questions: Sequence[str] = (),
    *,
    head: str | None = None,
    probes: int = 6,
    documents_per_probe: int = 4,
    tokens: int = 16,
    candidates: Sequence[Candidate] = CANDIDATES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Compare strategies with a full prefill, on contexts made from `documents`. Keeps nothing by itself.

    Args:
        engine: the model.
        documents: at least two; a probe is some of them, in random order.
        questions: asked in turn; without them each probe asks about the beginning of one of its documents.
        head: the instruction that will stand before the documents.
        probes: how many contexts to try.
        documents_per_probe: how many documents a context has.
        tokens: how many greedy tokens of the full prefill are compared.
        candidates: strategies and recompute ratios.
        seed: which documents are drawn.
        progress: called after each probe.

    Raises:
        InvalidInputError: fewer than two documents that are not empty.
        ContextLengthError: a probe exceeds the model's context.
        UnsupportedModelError: the model's caches cannot be merged.
    """
    texts = [text if text.endswith("\n") else f"{text}\n\n" for text in documents if text.strip()]
    if len(texts) < 2:
        raise InvalidInputError(f"calibrate needs at least two documents to put together, not {len(texts)}")
    draw = random.Random(seed)
    measured: dict[Candidate, list[tuple[float, float, float]]] = {candidate: [] for candidate in candidates}
    lengths = []
    for probe in range(probes):
        chosen = draw.sample(texts, min(documents_per_probe, len(texts)))
        about = " ".join(chosen[-1].split()[:8])
        question = questions[probe % len(questions)] if questions else f"What do the documents say about: {about}?"
        one = _Probe(engine, chosen, question, head, tokens)
        lengths.append(len(one.context_ids))
        for candidate in candidates:
            measured[candidate].append(one.measure(*candidate))
        if progress:
            progress(probe + 1, probes)
    return Calibration(
        fingerprint=engine.fingerprint.digest,
        probes=probes,
        context_tokens=int(statistics.mean(lengths)),
        verdicts=[
            Verdict(
                strategy=strategy,
                ratio=ratio,
                kl=statistics.mean(kl for kl, _, _ in rows),
                agreement=statistics.mean(agreement for _, agreement, _ in rows),
                cost=statistics.median(cost for _, _, cost in rows),
            )
            for (strategy, ratio), rows in measured.items()
        ],
    )


class _Probe:
    """One context and question: its full prefill, and what merging it gives."""

    def __init__(self, engine: HFEngine, texts: Sequence[str], question: str, head: str | None, tokens: int) -> None:
        self.engine = engine
        prompt = engine.template.around(head, as_messages(question))
        segments = [engine.template.encode(text) for text in texts]
        self.tail_ids = prompt.tail_ids
        self.context_ids = tuple(chain(prompt.head_ids, *segments))
        engine.check_fits(len(self.context_ids) + len(self.tail_ids), tokens)
        before, _ = engine.prefill(prompt.head_ids)
        self.parts = [Part(torch.tensor(prompt.head_ids), before, 0, exact=True)]
        for index, ids in enumerate(segments):
            layers = engine.encode_after(prompt.head_ids, ids)
            self.parts.append(Part(torch.tensor(ids), layers, len(prompt.head_ids), exact=index == 0))
        begin = time.perf_counter()
        cache, first = self._answer([], (*self.context_ids, *self.tail_ids))
        self.full_s = time.perf_counter() - begin
        self.tokens, rows = [int(first.argmax())], [first]
        while len(self.tokens) < tokens:
            rows.append(self._run(cache, self.tokens[-1:])[-1])
            self.tokens.append(int(rows[-1].argmax()))
        self.reference = torch.stack(rows).log_softmax(-1)

    def measure(self, strategy: Strategy, ratio: float) -> tuple[float, float, float]:
        """KL a token, agreement, and time to first token over that of the full prefill."""
        drift = self.engine.usual_drift  # found once a model: no cost of the strategy that is measured first
        begin = time.perf_counter()
        with self.engine.exclusive() as model:
            tail_ids = torch.tensor(self.tail_ids)
            merged = merge(model, self.parts, tail_ids, strategy=strategy, ratio=ratio, usual_drift=lambda: drift)
        cache, first = self._answer(merged.layers, self.tail_ids)
        seconds = time.perf_counter() - begin
        rest = self._run(cache, self.tokens[:-1]) if len(self.tokens) > 1 else first[:0]
        logits = torch.cat([first[None], rest]).log_softmax(-1)
        kl = (self.reference.exp() * (self.reference - logits)).sum(-1).mean()
        agreement = (self.reference.argmax(-1) == logits.argmax(-1)).float().mean()
        return max(float(kl), 0.0), float(agreement), seconds / self.full_s

    def _answer(self, layers: list[Any], token_ids: Sequence[int]) -> tuple[Any, torch.Tensor]:
        """The cache and the logits after the last of `token_ids`: a first token, as `HFEngine.stream` makes it."""
        cache = generation_cache([layers] if layers else [], room=len(token_ids) + len(self.context_ids))
        return cache, self.engine.forward(token_ids, cache)[0].float()

    def _run(self, cache: Any, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits after each of a few tokens, in fp32, `(tokens, vocabulary)`."""
        with self.engine.exclusive() as model:
            ids = torch.tensor([list(token_ids)], device=self.engine.device)
            return model(input_ids=ids, use_cache=True, **cache_argument(model, cache)).logits[0].float()  # type: ignore[no-any-return]


def _file(fingerprint: str) -> Path:
    return learned_file("calibrations", f"{fingerprint}.json")
