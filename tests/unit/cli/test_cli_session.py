"""A session in a terminal of 60 and of 110 columns, beside what it showed when it was last looked at.

KVCAG_WRITE_SESSIONS=1 python -m pytest tests/unit/cli/test_cli_session.py    # after a look at the difference
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import pytest

from kvcag.cli import answer, common
from kvcag.cli.answer import Corpus
from kvcag.engines.decode import Detokenizer
from tests.commands import Kvcag, write

SESSIONS = Path(__file__).parent / "sessions"
COMMANDS: list[list[object]] = [
    ["encode", "notes"],
    ["ls"],
    ["ask", "notes", "Who keeps the lighthouse of Varn?", "--k", 1, "--max-new-tokens", 12],
    ["ask", "Who keeps the lighthouse of Varn?", "--max-new-tokens", 12],
    ["sync", "notes", "--dry-run"],
    ["verify"],
    ["ask", "nowhere", "Who?"],
    ["rm", "--all", "--yes"],
    ["ls"],
]


def steady(text: str, folder: Path) -> str:
    """Remove the parts that differ between runs: times, ids and the folder."""
    text = text.replace(str(folder), "~")
    text = re.sub(r"\b\d+\.\d+ s\b", "0.00 s", text)
    text = re.sub(r"\b(\d+(\.\d)? ×|no) faster", "9 × faster", text)
    return re.sub(r"\b[0-9a-f]{12}\b", "0123456789ab", text)


@pytest.mark.parametrize("width", [60, 110])
def test_a_session_looks_as_it_did(kvcag: Kvcag, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = itertools.cycle(["The", "keeper", "of", "the", "lighthouse", "of", "Varn", "is", "called", "Ode,", "and"])
    gain, summary = Corpus.gain, answer._summary
    monkeypatch.setattr(Corpus, "gain", lambda *given: steady(gain(*given), kvcag.folder))
    monkeypatch.setattr(answer, "_summary", lambda usage: steady(summary(usage), kvcag.folder))
    monkeypatch.setattr(common, "age", lambda timestamp: "5 s")
    monkeypatch.setattr(common, "size", lambda count: "9.9 kB")
    monkeypatch.setattr(common, "terminal_width", lambda stream: width)
    monkeypatch.setattr(Detokenizer, "push", lambda *_: f"{next(words)} ")
    kvcag.environment |= {"COLUMNS": str(width), "NO_COLOR": "1", "KVCAG_STORE": "kv"}
    write(kvcag.folder / "notes" / "a-file-with-a-rather-long-name-of-its-own.md", "The lighthouse stands at the pier.")
    write(kvcag.folder / "notes" / "picture.png", b"PNG")
    shown = ""
    for command in COMMANDS:
        done = kvcag(*command)
        typed = " ".join(f'"{word}"' if " " in str(word) else str(word) for word in command)
        shown += f"$ kvcag {typed}\n{steady(done.out, kvcag.folder)}{steady(done.err, kvcag.folder)}\n"
    lines = [line.rstrip() for line in shown.splitlines()]
    assert [line for line in lines if len(line) > width and not line.startswith("$ ")] == []
    file = SESSIONS / f"{width}.txt"
    if os.environ.get("KVCAG_WRITE_SESSIONS"):
        write(file, "\n".join(lines) + "\n")
    assert "\x1b" not in shown, "NO_COLOR"
    assert lines == file.read_text(encoding="utf-8").splitlines()


def test_an_answer_in_a_terminal_breaks_no_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "terminal_width", lambda stream: 12)
    flow = common.Flow()
    said = "One two three\nfour, and a verylongwordofmany letters  end."
    for at in range(0, len(said), 3):
        flow.write(said[at : at + 3])
    flow.end()
    shown = capsys.readouterr().out
    assert shown.split() == said.split()
    assert all(len(line.rstrip()) <= 12 or line.split() == ["verylongwordofmany"] for line in shown.splitlines())


def test_text_without_spaces_is_written_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "terminal_width", lambda stream: 12)
    flow, shown = common.Flow(), []
    for piece in ("A\n", "東京は", "日本の首都", "です。", "\nandoneverylong", "wordwithout end"):
        flow.write(piece)
        shown.append(capsys.readouterr().out)
    assert shown == ["A\n", "東京は", "日本の\n首都", "です。", "\nandoneverylong", "wordwithout\nend"]
    flow.write(" of")
    assert capsys.readouterr().out == " ", "it may grow"
    flow.end()
    assert capsys.readouterr().out == "of\n"


def test_an_answer_in_a_pipe_is_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    flow = common.Flow()
    for piece in ("One  two ", "three\n", "f"):
        flow.write(piece)
    flow.end()
    assert capsys.readouterr().out == "One  two three\nf\n"
