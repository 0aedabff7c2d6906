"""The demonstration's corpus: Python's own topics, or a user's files."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcag.demo.corpus import (
    DEFAULT_QUESTIONS,
    DEFAULT_TOPICS,
    CorpusDocument,
    load_corpus,
    parse_jsonl,
    python_topics,
)
from kvcag.errors import InvalidInputError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_dozen_topics_of_the_running_python():
    documents = python_topics()
    assert [document.title for document in documents] == list(DEFAULT_TOPICS)
    assert len(set(DEFAULT_TOPICS)) == 12
    assert 4_000 < sum(len(document.text) for document in documents) < 12_000


def test_the_default_topics_answer_the_default_questions():
    text = " ".join(" ".join(document.text.split()) for document in python_topics())
    assert len(DEFAULT_QUESTIONS) == 4
    for answer in ('results in a "ZeroDivisionError"', '"NameError" exception will be raised', "real part of 0.0"):
        assert answer in text
    assert 'The "while" statement is used for repeated execution as long as an expression is true' in text


def test_an_unknown_topic_is_named():
    with pytest.raises(InvalidInputError, match="'no-such-topic'"):
        python_topics(["break", "no-such-topic"])


def test_folders_are_read_in_order_and_hidden_and_foreign_files_passed_over(tmp_path):
    write(tmp_path / "b.md", "# B\n")
    write(tmp_path / "a" / "deep" / "one.TXT", "one")
    write(tmp_path / "c.jsonl", '{"text": "first", "title": "T"}\n\n{"text": " second "}\n')
    write(tmp_path / ".git" / "description.txt", "hidden")
    write(tmp_path / "picture.png", b"\x89PNG")
    assert load_corpus([tmp_path]) == [
        CorpusDocument(str(tmp_path / "a" / "deep" / "one.TXT"), "one"),
        CorpusDocument(str(tmp_path / "b.md"), "# B"),
        CorpusDocument("T", "first"),
        CorpusDocument(f"{tmp_path / 'c.jsonl'}:3", "second"),
    ]


def test_a_folder_below_a_hidden_one_can_be_asked_for(tmp_path):
    folder = tmp_path / ".notes" / "2026"
    write(folder / "a.md", "text")
    assert [document.text for document in load_corpus([folder])] == ["text"]


def test_paths_keep_the_order_they_were_given_in(tmp_path):
    first, second = write(tmp_path / "z.txt", "z"), write(tmp_path / "a.txt", "a")
    assert [document.text for document in load_corpus([first, str(second)])] == ["z", "a"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert load_corpus([write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")])[0].text == "hello"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", " \n\t", "a.txt: the file is empty"),
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.txt", b"fine\nfine\ncaf\xe9\n", "a.txt, line 3: byte 0xe9 is not UTF-8"),
        ("a.pdf", b"%PDF", r"a.pdf: only .*\.md.* files can be read"),
        ("a.jsonl", '{"text": "ok"}\n{"text": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '\n["text"]', "a.jsonl, line 2: expected an object .* found list"),
        ("a.jsonl", "null", "a.jsonl, line 1: expected an object .* found null"),
        ("a.jsonl", '{"title": "x"}', 'a.jsonl, line 1: "text" must be a string'),
        ("a.jsonl", '{"text": 3}', 'a.jsonl, line 1: "text" must be a string'),
        ("a.jsonl", '{"text": "  "}', 'a.jsonl, line 1: "text" must be a string that is not blank'),
        ("a.jsonl", '{"text": "x", "title": 3}', 'a.jsonl, line 1: "title" must be a string, found int'),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, content, complaint):
    write(tmp_path / "good.txt", "good")
    bad = write(tmp_path / name, content)
    with pytest.raises(InvalidInputError, match=complaint):
        load_corpus([tmp_path / "good.txt", bad])


def test_missing_paths_and_folders_without_documents_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="nowhere: no such file or folder"):
        load_corpus([tmp_path / "nowhere"])
    with pytest.raises(InvalidInputError, match=r"no .* file in this folder"):
        load_corpus([tmp_path])
    with pytest.raises(InvalidInputError, match="no path to read"):
        load_corpus([])


# Texts hold whatever JSON can, U+2028 and other characters at which str.splitlines() would cut among it.
texts = st.text().filter(str.strip)


@given(st.lists(st.tuples(texts, st.text()), min_size=1), st.booleans())
def test_jsonl_comes_back_as_it_was_written(records, ascii_only):
    lines = [json.dumps({"text": text, "title": title}, ensure_ascii=ascii_only) for text, title in records]
    documents = list(parse_jsonl("\n".join(lines), "a.jsonl"))
    assert documents == [CorpusDocument(title, text.strip()) for text, title in records]
