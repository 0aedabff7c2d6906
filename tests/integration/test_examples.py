"""Every example runs on the embedded model, and shows what it says it shows."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ELSEWHERE = {"langchain_rag_to_cag", "llama_index_rag_to_cag", "vllm_server", "memory_cube", "encode_on_ray"}
"""Examples that other tests run."""


def run(name: str, *arguments: object) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)


def test_the_faq_bot_encodes_its_entries_once(smollm2_path: Path, tmp_path: Path, capsys: Any) -> None:
    answers = run("faq_bot", str(smollm2_path), tmp_path)
    assert "5 entries encoded, 0 kept already" in capsys.readouterr().out
    for (answer, _), fact in zip(answers, ["30 days", "two days", "one day"], strict=True):
        assert fact in answer
    # The head is encoded with the first question; the entries never again.
    assert [encoded for _, encoded in answers[1:]] == [0, 0]


def test_a_conversation_prefills_what_is_said(smollm2_path: Path) -> None:
    answers, prefilled = run("multi_turn_chat", str(smollm2_path))
    for answer, fact in zip(answers, ["green", "1887", "07:40", "12 euros"], strict=True):
        assert fact in answer
    assert all(tokens < 25 for tokens in prefilled)


def test_facts_are_extracted_from_a_document_that_is_read_once(smollm2_path: Path) -> None:
    ferry, ticket, captain, pier = run("structured_extraction", str(smollm2_path))
    assert json.loads(ferry) == {"captain": "Mira Sand", "leaves_at": "07:40"}
    assert json.loads(ticket)["price"] == 12
    assert captain == "Mira Sand"
    assert re.fullmatch(r"pier \d", pier)


def test_a_whole_corpus_outlives_its_process(smollm2_path: Path, tmp_path: Path) -> None:
    answers = run("whole_corpus", str(smollm2_path), tmp_path)
    here, there = answers[:2], answers[2:]
    assert [text for text, _ in here] == [text for text, _ in there]
    assert "ZeroDivisionError" in here[0][0]
    assert {usage.context.encoded_tokens for _, usage in here} == {0}
    assert all(usage.context.recomputed_tokens == 0 for _, usage in answers)
    assert there[0][1].context.reused_tokens > 0.9 * there[0][1].context.context_tokens


def test_users_share_a_store_and_nothing_in_it(smollm2_path: Path, tmp_path: Path, capsys: Any) -> None:
    encoded = run("many_users_one_store", str(smollm2_path), tmp_path)
    assert encoded["ann"][0] == encoded["bob"][0] > 0  # what the other keeps makes nothing quicker
    assert encoded["ann"][1] == encoded["bob"][1] == 0
    assert "1 item deleted" in capsys.readouterr().out


def test_an_agent_answers_from_documents_and_calls_its_tool(smollm2_path: Path) -> None:
    price, call, weather = run("agent_with_documents", str(smollm2_path))
    assert "12 euros" in price.text
    assert [each["name"] for each in call.tool_calls] == ["weather"]
    assert "Storm" in weather.text
    for later in (call, weather):
        report = later.response_metadata["kvcag"]
        assert report["reused_tokens"] == report["context_tokens"]


def test_the_notebook_runs_and_its_pictures_are_kept(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells one after another, over less than it shows, without Jupyter."""
    import matplotlib.pyplot

    matplotlib.use("Agg")
    notebook = json.loads((EXAMPLES / "ttft_and_fidelity.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    pictures = [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))

    monkeypatch.setattr("matplotlib.pyplot.show", lambda: matplotlib.pyplot.close("all"))
    smaller = {"LENGTHS": "[64]", "RATIOS": "[0.0, 1.0]", "REPEAT": "1"}
    names: dict[str, Any] = {}
    for cell in cells:
        source = "".join(cell["source"])
        for name, value in smaller.items():
            source = re.sub(rf"^{name} = .*$", f"{name} = {value}", source, flags=re.MULTILINE)
        source = source.replace("texts[-4:]", "(text[:400] for text in texts[-2:])")
        exec(compile(source, "ttft_and_fidelity.ipynb", "exec"), names)
    assert all(len(values) == 1 and values[0] > 0 for values in names["seconds"].values())
    for nothing, everything in names["kl"].values():
        assert everything < 1e-4 < nothing  # all recomputed, it is the full prefill


def test_the_index_names_every_example_and_they_are_short() -> None:
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for example in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert f"({example.name})" in index, f"{example.name} is not in examples/README.md"
    tested = Path(__file__).read_text(encoding="utf-8")
    for example in EXAMPLES.glob("*.py"):
        assert example.stem in ELSEWHERE or f'"{example.stem}"' in tested, f"no test runs {example.name}"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_says_how_to_run_it(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert f"python examples/{name}.py" in source.split('"""')[1]
