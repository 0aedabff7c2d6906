"""The benchmark that compares merging with a full prefill, and with what others published."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcag.testing import byte_tokenizer, tiny_model

ROOT = Path(__file__).parents[2]
PUBLISHED = ("cacheblend", "epic", "prophetkv")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("fidelity")


@pytest.fixture
def sets(script: Any) -> Any:
    return sys.modules["question_sets"]


def test_it_measures_whole_answers_beside_what_others_published(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("KVCAG_CACHE", str(tmp_path))
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    contexts = [{"text": f"{name} has a {thing} of her own."} for name, thing in (("Ada", "boat"), ("Eve", "car"))]
    questions = [{"question": "Who has a boat?", "answers": ["Ada"], "ctxs": contexts}] * 2
    (tmp_path / "data.json").write_text(json.dumps(questions))
    strategies = ["rotate", "query", "full", *PUBLISHED]
    out = tmp_path / "made" / "figures.json"
    given = ["--data", str(tmp_path / "data.json"), "--docs", "2", "--limit", "2", "--ratio", "0.1"]
    place = ["--model", str(tmp_path / "model"), "--device", "cpu", "--memory", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["fidelity.py", *given, "--strategy", *strategies, *place])
    script.main()
    made = json.loads(out.read_text())
    rows = {row["strategy"]: row for row in made["rows"]}
    assert list(rows) == strategies
    assert all({"same_answer", "answer_f1", "f1", "em", "ttft_ratio", "memory"} <= row.keys() for row in rows.values())
    assert abs(rows["full"]["kl"]) < 1e-5
    assert rows["full"]["same_answer"] == rows["full"]["answer_f1"] == rows["full"]["agreement"] == 1
    for name in ("query", *PUBLISHED):
        assert 0.08 < rows[name]["recomputed"] <= 0.1
    assert len({round(row["kl"], 9) for row in rows.values()}) == len(strategies)
    assert 0 < rows["query"]["choosing"] < 1
    assert "| full | 0.000 ± 0.000 | 1.00 | 1.00 |" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_run_that_was_cut_off_goes_on_with_the_drift_that_it_learned(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("KVCAG_CACHE", str(tmp_path))
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    questions = [
        {
            "question": "Who?",
            "answers": ["Ada"],
            "ctxs": [{"text": f"{name} {number} is here."} for name in ("Ada", "Eve")],
        }
        for number in range(8)
    ]
    (tmp_path / "data.json").write_text(json.dumps(questions))
    out = tmp_path / "figures.json"
    given = ["--data", str(tmp_path / "data.json"), "--docs", "2", "--ratio", "0.2", "--learn", "--in-context"]
    place = ["--model", str(tmp_path / "model"), "--device", "cpu", "--strategy", "rotate", "query", "--out", str(out)]

    def run(*more: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["fidelity.py", *given, *place, *more])
        script.main()
        made: dict[str, Any] = json.loads(out.read_text())
        return made

    before = run("--limit", "2")
    assert [row["name"] for row in before["rows"]] == [
        "rotate",
        "query 20%",
        "rotate, in context",
        "query 20%, in context",
    ]
    assert before["rows"][2]["recomputed"] > before["rows"][0]["recomputed"] == 0  # its first document
    after = run("--limit", "3", "--resume")
    assert after["questions"] == 3
    assert after["learned_drift"] == before["learned_drift"] != ""
    for name, figures in before["by_question"].items():
        assert after["by_question"][name]["kl"][:2] == figures["kl"]
        assert len(after["by_question"][name]["kl"]) == 3
    without = [word for word in given if word != "--learn"]
    monkeypatch.setattr("sys.argv", ["fidelity.py", *without, *place, "--limit", "1"])
    script.main()
    assert json.loads(out.read_text())["learned_drift"] == ""


def test_answers_are_compared_as_others_do(script: Any) -> None:
    assert script.f1([1, 2, 3], [1, 2, 4]) == pytest.approx(2 / 3)
    assert script.f1([], []) == 1.0
    assert script.f1([], [1]) == 0.0
    found = script.against_reference("The Exeter college!", ["a school", "Exeter College"])
    assert found == {"f1": 1.0, "em": 1.0}
    assert script.against_reference("at Exeter", ["Exeter College"]) == {"f1": 0.5, "em": 0.0}


def test_questions_over_pythons_reference_come_with_chunks_of_it(sets: Any) -> None:
    questions = sets.reference(4, 60)
    assert len(questions) > 50
    asked = {question.prompt: question for question in questions}
    center = asked["What does str.center() do?"]
    assert center.answers == ["Return centered in a string of length *width*."]
    assert len(center.documents) == 4
    assert any("str.center(" in text for text in center.documents)
    assert max(len(text) for question in questions for text in question.documents) <= 360
    assert questions == sets.reference(4, 60)


def test_a_question_with_too_few_passages_gets_those_of_the_next_questions(sets: Any, tmp_path: Path) -> None:
    rows = [
        {"question": f"{name}?", "answers": [name], "ctxs": [{"text": f"{name} one"}, {"text": f"{name} two"}]}
        for name in ("Ada", "Eve")
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    first, last = sets.musique(tmp_path / "data.json", 3, 2)
    assert first.documents == ["Ada one", "Ada two", "Eve one"]
    assert last.documents == ["Eve one", "Eve two", "Ada one"]


def test_a_chunk_knows_what_stands_before_it_in_its_source(sets: Any) -> None:
    source = "One is first.\n\nTwo is second.\n\nThree is third."
    [question] = sets.over([source, "Nothing."], [("three third", "third")], 2, 3)
    assert question.documents[0] == "Three is third."
    assert question.before[0] == "Two is second."


def test_a_faq_is_read_as_questions_and_answers(sets: Any) -> None:
    text = (
        "FAQ\n===\n\nQ:  What is it\n    for?\n\nA:  It is for those who ask. And more words.\n\n"
        " 2. Does it work?\n\n    Yes, it does. It always did, they say.\n\n3. A heading\n\nNo question here at all.\n"
    )
    assert [(question, sets.first_sentence(answer)) for question, answer in sets.questions_of(text)] == [
        ("What is it for?", "It is for those who ask."),
        ("Does it work?", "Yes, it does."),
    ]
