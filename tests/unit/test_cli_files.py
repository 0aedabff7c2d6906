"""Files, folders and globs as texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import write
from hypothesis import given
from hypothesis import strategies as st

from kvcag.cli.files import Text, read_paths, split
from kvcag.errors import EmptyPromptError, InvalidInputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "b.md", "# B\n")
    write(tmp_path / "deep" / "a.RST", "A\n")
    write(tmp_path / "c.jsonl", '{"text": "one", "title": "T"}\n{"text": "two"}\n')
    write(tmp_path / ".git" / "hidden.txt", "hidden")
    write(tmp_path / "picture.png", b"\x89PNG\0")
    write(tmp_path / "empty.txt", " \n")
    write(tmp_path / "latin.txt", "caf\xe9".encode("latin-1"))
    return tmp_path


def test_a_folder_gives_its_texts_in_order_and_says_what_it_leaves_out(folder: Path) -> None:
    reading = read_paths([str(folder)])
    assert [(Path(text.metadata["source"]).name, text.text) for text in reading.texts] == [
        ("b.md", "# B"),
        ("c.jsonl", "one"),
        ("c.jsonl", "two"),
        ("a.RST", "A"),
    ]
    assert [text.metadata.get("part") for text in reading.texts] == [None, 1, 2, None]
    assert {Path(path).name for path, _ in reading.skipped} == {"empty.txt", "latin.txt"}
    assert reading.unreadable == {str(folder / "latin.txt")}
    assert reading.others == 1


def test_globs_and_overlapping_paths_read_each_file_once(folder: Path) -> None:
    reading = read_paths([str(folder / "*.md"), str(folder / "b.md"), str(folder / "**" / "*.RST")])
    assert [text.text for text in reading.texts] == ["# B", "A"]


def test_a_file_that_is_named_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    assert read_paths([str(write(tmp_path / "main.py", "print()\n"))]).texts[0].text == "print()"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("picture.png", b"\x89PNG\0", "binary file"),
        ("page.html", b"<p>", "Convert it to text"),
        ("latin.txt", b"caf\xe9", "line 1: byte 0xe9 is not UTF-8"),
        ("bad.jsonl", b"{}", '"text" must be a string'),
    ],
)
def test_a_file_that_is_named_and_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    with pytest.raises(InvalidInputError, match=complaint):
        read_paths([str(write(tmp_path / name, content))])


def test_what_is_missing_or_blank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmptyPromptError, match="empty"):
        read_paths([str(write(tmp_path / "blank.txt", "\n"))])
    for path, complaint in (("nowhere", "no such file or folder"), ("*.zzz", "nothing matches")):
        with pytest.raises(InvalidInputError, match=complaint):
            read_paths([str(tmp_path / path)])


def words(text: str) -> int:
    return len(text.split())


@given(st.text("ab .\n", min_size=1, max_size=300), st.integers(1, 12))
def test_parts_hold_the_whole_text_in_order_and_none_is_longer_than_asked(text: str, limit: int) -> None:
    parts = split(Text(text, {"source": "s"}), limit, words)
    assert " ".join(part.text for part in parts).split() == text.split()
    assert all(words(part.text) <= limit for part in parts)
    if len(parts) > 1:
        assert [part.metadata["part"] for part in parts] == list(range(1, len(parts) + 1))
        assert {part.metadata["parts"] for part in parts} == {len(parts)}


def test_short_paragraphs_stay_together() -> None:
    parts = split(Text("a b\n\nc d\n\ne f g", {"source": "s"}), 4, words)
    assert [part.text for part in parts] == ["a b\n\nc d", "e f g"]
