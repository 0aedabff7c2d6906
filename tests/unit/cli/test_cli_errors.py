"""Exit codes, and messages in place of tracebacks."""

from __future__ import annotations

import ast
import json
import subprocess

import pytest
from typer.testing import CliRunner

from kvcag import __version__, errors
from kvcag.cli.app import app
from kvcag.cli.common import FAILED, NEGATIVE, USAGE, exit_code
from tests.commands import Kvcag, write


def test_every_error_of_the_library_has_a_code() -> None:
    made = {
        errors.InvalidInputError("x"): USAGE,
        errors.ContextLengthError(1, 2, 2): USAGE,
        errors.UnknownItemError(["x"]): NEGATIVE,
        errors.CorruptItemError("x", "y"): NEGATIVE,
        errors.FormatError("x"): NEGATIVE,
        errors.FingerprintMismatchError("x", ["y"]): NEGATIVE,
        errors.UnsupportedModelError("x"): NEGATIVE,
        errors.StoreUnavailableError(28, "full", "x"): FAILED,
        errors.StoreFullError("x", 2, 1): FAILED,
        errors.EngineError("x"): FAILED,
        errors.ModelFetchError("x"): FAILED,
        errors.MissingExtraError("x", "y"): FAILED,
    }
    assert {type(error): exit_code(error) for error in made} == {type(error): code for error, code in made.items()}


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["no-such-command"], 2, "No such command"),
        (["ls", "--no-such-option"], 2, "No such option"),
        (["ask"], 2, "Missing argument"),
        (["ask", "Who?", "--strategy", "sideways"], 2, "sideways"),
        (["encode", "nowhere"], 2, "nowhere: no such file or folder"),
        (["encode", "notes", "--model", "/nowhere"], 2, "the model '/nowhere' could not be loaded"),
        (["ls", "--store", "nowhere"], 2, "no such folder"),
        (["verify", "--store", "nowhere"], 2, "no such folder"),
        (["encode", "notes", "--store", "notes/a.md"], 3, "notes/a.md"),
        (["bench", "--tokens", "999999"], 2, "context of 2,048"),
        (["bench", "--report", "--json"], 2, "--report takes --model, --tokens and --repeat only"),
        (["doctor", "--corpus", "nowhere"], 2, "nowhere: no such file or folder"),
    ],
)
def test_a_mistake_is_one_message_and_a_code(kvcag: Kvcag, arguments: list[str], code: int, complaint: str) -> None:
    done = kvcag(*arguments)
    assert done.code == code, done.err
    assert complaint in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert done.out == ""


def test_debug_shows_where_an_error_came_from(kvcag: Kvcag, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCAG_DEBUG", "")  # put back what --debug sets
    done = CliRunner().invoke(app, ["--debug", "encode", "nowhere"], env=kvcag.environment)
    assert isinstance(done.exception, errors.InvalidInputError)


def test_json_is_all_there_is_on_stdout(kvcag: Kvcag) -> None:
    write(kvcag.folder / "notes" / "blank.md", "")
    for arguments in (
        ["encode", "notes"],
        ["sync", "notes"],
        ["ls"],
        ["ask", "Who?", "--max-new-tokens", "2"],
        ["verify"],
        ["bench", "--tokens", "64", "--repeat", "1"],
        ["demo", "--corpus", "notes/a.md", "--max-new-tokens", "2"],
        ["rm", "--all", "--yes"],
    ):
        done = kvcag(*arguments, "--json")
        assert done.code == 0, (arguments, done.err)
        json.loads(done.out)


def test_no_colours_outside_a_terminal(kvcag: Kvcag) -> None:
    kvcag("encode", "notes")
    for arguments in (["ls"], ["inspect", "--help"], ["ask", "Who?", "--max-new-tokens", "1"]):
        done = kvcag(*arguments)
        assert "\x1b[" not in done.out + done.err


def test_bench_measures_four_ways_to_a_first_token(kvcag: Kvcag) -> None:
    done = kvcag("bench", "--tokens", "64", "--tokens", "128", "--repeat", "1", "--json").json
    assert [abs(row["context_tokens"] - tokens) < 128 for row, tokens in zip(done["rows"], (64, 128), strict=True)]
    for row in done["rows"]:
        assert all(row[way] > 0 for way in ("full_s", "memory_s", "disk_s", "merged_s"))
    assert done["machine"]["dtype"] == "float32"
    assert "full prefill" in kvcag("bench", "--tokens", "64", "--repeat", "1").out


def test_bench_runs_a_checkouts_report_with_its_own_arguments(kvcag: Kvcag) -> None:
    write(kvcag.folder / "benchmarks" / "report.py", "import sys; print(sys.argv[1:]); sys.exit(5)")
    done = kvcag.process(
        "bench", "--report", "--tokens", "64", "--tokens", "128", "--repeat", "2", stdout=subprocess.PIPE
    )
    out, _ = done.communicate(timeout=60)
    model = kvcag.environment["KVCAG_MODEL"]
    assert ast.literal_eval(out.decode()) == ["--model", model, "--repeat", "2", "--context", "64", "128"]
    assert done.returncode == 5


def test_doctor_recommends_a_strategy(kvcag: Kvcag) -> None:
    for number in range(4):
        write(kvcag.folder / "corpus" / f"{number}.txt", f"{number} " * 100)
    done = kvcag("doctor", "--corpus", "corpus", "--probes", "1", "--max-kl", "1000", "--json")
    assert {verdict["strategy"] for verdict in done.json["verdicts"]} >= {"rotate", "query"}
    assert done.code == (0 if done.json["best"] else 1)
    assert done.json["recommendation"].startswith("merge with " if done.json["best"] else "read the documents: ")
    strict = kvcag("doctor", "--corpus", "corpus", "--probes", "1", "--max-kl", "0")
    assert (strict.code, "Read the documents: no merge is" in strict.out) in ((1, True), (0, False))


def test_doctor_asks_your_questions_about_the_documents_that_fit(kvcag: Kvcag) -> None:
    for word in ("boats", "cars", "birds", "trees", "stones", "clouds"):
        write(kvcag.folder / "corpus" / f"{word}.txt", f"All about {word}. " * (40 if word == "stones" else 4))
    write(
        kvcag.folder / "questions.txt", "Tell me about boats, cars, birds, trees?\n\nAnd boats, cars, birds, clouds?\n"
    )
    given = ("doctor", "--corpus", "corpus", "--questions", "questions.txt", "--max-kl", "1000", "--json")
    done = kvcag(*given)
    assert done.json["probes"] == 2
    assert done.json["context_tokens"] < 700  # without the long text about stones
    write(kvcag.folder / "one" / "a.txt", "Alone.")
    assert kvcag("doctor", "--corpus", "one").code == 2


def test_the_version_is_the_package_s(kvcag: Kvcag) -> None:
    assert kvcag("--version") == (0, f"kvcag {__version__}\n", "")
