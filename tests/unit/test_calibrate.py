from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcag import HFEngine, KVCacheMemory, Sampling
from kvcag.calibration import Calibration, Verdict, _calibrations, calibrate, calibration_of
from kvcag.chat_template import Document
from kvcag.errors import ContextLengthError, InvalidInputError
from kvcag.testing import byte_tokenizer, tiny_model
from tests.waits import until

TEXTS = ["Alice has a red bicycle.", "Bob has a green car.", "Carol has a boat.", "Dave has none of these."]
HEAD = "Answer from the documents."


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCAG_CACHE", str(tmp_path))


def calibrated(engine: HFEngine, **settings: Any) -> Calibration:
    return calibrate(
        engine, TEXTS, **{"instruction": HEAD, "probes": 2, "documents_per_probe": 3, "tokens": 6, **settings}
    )


def verdict(strategy: Any, ratio: float, kl: float, cost: float) -> Verdict:
    return Verdict(strategy=strategy, ratio=ratio, kl=kl, agreement=1.0, cost=cost)


def known(engine: HFEngine, *verdicts: Verdict) -> HFEngine:
    _calibrations.setdefault(engine, {})[engine.fingerprint.digest] = Calibration(
        fingerprint=engine.fingerprint.digest, probes=1, context_tokens=9, verdicts=list(verdicts)
    )
    return engine


def test_recomputing_all_is_the_full_prefill_and_less_is_not(tiny_engine: HFEngine) -> None:
    verdicts = {(v.strategy, v.ratio): v for v in calibrated(tiny_engine).verdicts}
    assert verdicts["full", 1.0].kl <= 1e-6
    assert verdicts["full", 1.0].agreement == 1.0
    assert verdicts["rotate", 0.0].kl > verdicts["full", 1.0].kl
    assert all(v.cost > 0 for v in verdicts.values())


def test_the_verdict_is_kept_for_this_model_and_no_other(tiny_engine: HFEngine) -> None:
    made = calibrated(tiny_engine)
    assert calibration_of(HFEngine(tiny_engine.model, tiny_engine.tokenizer)) == made
    assert calibration_of(HFEngine(tiny_model(seed=3), byte_tokenizer())) is None


def test_a_verdict_that_cannot_be_read_is_none(tiny_engine: HFEngine, tmp_path: Path) -> None:
    calibrated(tiny_engine)
    (file,) = (tmp_path / "calibrations").iterdir()
    file.write_text(file.read_text()[:-20])
    assert calibration_of(HFEngine(tiny_engine.model, tiny_engine.tokenizer)) is None


def test_the_cheapest_that_passes_is_taken() -> None:
    rows = [verdict("rotate", 0, 0.2, 0.05), verdict("query", 0.1, 0.04, 0.2), verdict("query", 0.2, 0.01, 0.3)]
    made = Calibration(fingerprint="", probes=1, context_tokens=1, verdicts=[*rows, verdict("full", 1, 0.0, 1.2)])
    assert made.cheapest(0.5) == rows[0]
    assert made.cheapest(0.05) == rows[1]
    assert made.cheapest(0.02) == rows[2]
    assert made.cheapest(0.001) is None  # full passes, and costs more than a full prefill


def test_it_recommends_in_a_sentence() -> None:
    rows = [verdict("rotate", 0, 0.2, 0.05), verdict("query", 0.1, 0.0213, 0.21)]
    made = Calibration(fingerprint="", probes=1, context_tokens=1, verdicts=rows)
    assert made.recommendation(0.05) == "merge with query at 10%: 0.021 nats per token at 21% of the cost"
    assert made.recommendation(0.5) == "merge with rotate: 0.2 nats per token at 5% of the cost"
    assert made.recommendation(0.001).startswith("read the documents: no merge is cheaper than that and within 0.001")


def test_questions_are_asked_about_the_documents_that_are_retrieved_for_them(tiny_engine: HFEngine) -> None:
    asked = []

    def retrieve(question: str) -> list[str]:
        asked.append(question)
        return TEXTS[:2]

    made = calibrated(tiny_engine, questions=["Who?", "What?"], retrieve=retrieve, candidates=[("rotate", 0.0)])
    assert asked == ["Who?", "What?"]
    drawn = calibrated(tiny_engine, questions=["Who?", "What?"], candidates=[("rotate", 0.0)])
    assert made.context_tokens < drawn.context_tokens  # of three documents


def test_what_never_wins_is_not_measured(tiny_engine: HFEngine) -> None:
    measured = [(each.strategy, each.ratio) for each in calibrated(tiny_engine).verdicts]
    assert measured == [("rotate", 0.0), *(("query", ratio) for ratio in (0.05, 0.1, 0.2, 0.4)), ("full", 1.0)]


def test_auto_follows_the_verdict_and_says_so(tiny_engine: HFEngine) -> None:
    memory = KVCacheMemory(known(tiny_engine, verdict("query", 0.1, 0.04, 0.2)), instruction=HEAD)
    items = [memory.extract(text) for text in TEXTS]
    memory.add(items)
    ids = [item.id for item in items]
    merged = memory.merge(ids, "Who?", strategy="auto").report
    assert (merged.mode, merged.strategy) == ("merged", "query")
    assert 0 < merged.recomputed_tokens <= 0.1 * merged.context_tokens
    assert merged.reason == "auto: query 0.1, KL 0.040 of 0.05 allowed, at 20% of a full prefill"
    strict = memory.merge(ids, "Who?", strategy="auto", max_kl=0.01).report
    assert strict.strategy == "exact"
    assert strict.is_exact


def test_auto_merges_by_query_where_nothing_was_measured(tiny_engine: HFEngine) -> None:
    memory = KVCacheMemory(tiny_engine, instruction=HEAD)
    items = [memory.extract(text) for text in TEXTS]
    memory.add(items)
    report = memory.merge([item.id for item in items], "Who?", strategy="auto").report
    assert report.strategy == "query"
    assert "calibrate(engine, documents)" in report.reason


def test_too_little_to_put_together_is_refused(tiny_engine: HFEngine) -> None:
    with pytest.raises(InvalidInputError, match="at least two documents with text"):
        calibrate(tiny_engine, ["one", "  "])
    with pytest.raises(ContextLengthError):
        calibrate(HFEngine(tiny_model(max_position_embeddings=64), byte_tokenizer()), TEXTS)


def asked(*texts: str, question: str = "Who?") -> list[dict[str, Any]]:
    documents = [Document(f"{text}\n\n") for text in texts]
    return [{"role": "system", "content": [f"{HEAD}\n\n", *documents]}, {"role": "user", "content": question}]


def reports(memory: KVCacheMemory, *texts: str, times: int, question: str = "Who?") -> list[Any]:
    settings = Sampling(max_new_tokens=1)
    streams = (
        memory.stream(asked(*texts, question=question), strategy="auto", sampling=settings) for _ in range(times)
    )
    return [list(stream)[-1].usage.context for stream in streams]  # type: ignore[union-attr]


def test_what_is_asked_again_and_again_becomes_exact(tiny_engine: HFEngine) -> None:
    memory = KVCacheMemory(known(tiny_engine, verdict("query", 0.1, 0.04, 0.2)))
    first, same, other = (reports(memory, *TEXTS, times=1, question=asks)[0] for asks in ("Who?", "Who?", "What?"))
    assert [first.mode, same.mode, other.mode] == ["merged"] * 3
    assert first.recomputed_tokens > same.recomputed_tokens == 0
    assert same.reason.startswith("merged for an earlier question")
    assert "refined for this one" in other.reason
    prompt = tiny_engine.template.prompt(asked(*TEXTS))
    until(lambda: tiny_engine.known_prefix(prompt.context_ids) == len(prompt.context_ids))  # encoded when idle
    [last] = reports(memory, *TEXTS, times=1, question="Where?")
    assert last.is_exact
    assert last.encoded_tokens == last.recomputed_tokens == 0
    assert reports(memory, *reversed(TEXTS), times=1)[0].mode == "merged"


def test_nothing_is_promoted_without_room(tiny_engine: HFEngine) -> None:
    full = HFEngine(tiny_engine.model, tiny_engine.tokenizer, prefix_cache_bytes=20 * tiny_engine.bytes_per_token)
    memory = KVCacheMemory(known(full, verdict("query", 0.1, 0.04, 0.2)))
    assert {report.mode for report in reports(memory, *TEXTS, times=5)} == {"merged"}


def test_a_named_strategy_answers_the_same_every_time(tiny_engine: HFEngine) -> None:
    memory = KVCacheMemory(tiny_engine)
    streams = (memory.stream(asked(*TEXTS), strategy="query", sampling=Sampling(max_new_tokens=12)) for _ in range(5))
    assert len({"".join(chunk.text for chunk in stream) for stream in streams}) == 1


def test_canonical_order_makes_one_context_of_any_order(tiny_engine: HFEngine) -> None:
    memory = KVCacheMemory(tiny_engine)
    items = [memory.extract(text) for text in TEXTS]
    memory.add(items)
    ids = [item.id for item in items]
    contexts = [memory.merge(order, "Who?", canonical=True) for order in (ids, ids[::-1], ids[1:] + ids[:1])]
    assert len({tuple(context.token_ids.tolist()) for context in contexts}) == 1
    assert sorted(contexts[0].token_ids.tolist()) == sorted(memory.merge(ids, "Who?").token_ids.tolist())
