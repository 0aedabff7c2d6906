"""Files, folders and globs as texts."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcag.cli.files import Shard, Text, read_corpus, read_texts, split
from kvcag.demo.corpus import Topic, python_topics
from kvcag.errors import EmptyPromptError, InvalidInputError, MissingExtraError
from tests.commands import write


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


def test_a_folder_gives_its_texts_in_order_and_reports_skipped_files(folder: Path) -> None:
    reading = read_texts([str(folder)])
    assert [(Path(text.metadata["source"]).name, text.text) for text in reading.texts] == [
        ("b.md", "# B"),
        ("c.jsonl", "one"),
        ("c.jsonl", "two"),
        ("a.RST", "A"),
    ]
    assert [text.metadata.get("part") for text in reading.texts] == [None, 1, 2, None]
    assert {Path(path).name for path, _ in reading.skipped} == {"empty.txt", "latin.txt"}
    assert reading.unreadable == {str(folder / "latin.txt")}
    assert reading.others == {".png": 1}


def test_globs_and_overlapping_paths_read_each_file_once(folder: Path) -> None:
    reading = read_texts([str(folder / "*.md"), str(folder / "b.md"), str(folder / "**" / "*.RST")])
    assert [text.text for text in reading.texts] == ["# B", "A"]


def test_a_file_that_is_named_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    assert read_texts([str(write(tmp_path / "main.py", "print()\n"))]).texts[0].text == "print()"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("picture.png", b"\x89PNG\0", "picture.png: this is a binary file"),
        ("page.odt", b"PK", "page.odt: .odt files are not read. Convert it to text"),
        ("a.txt", b" \n\t", "a.txt: the file is empty"),
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.txt", b"fine\nfine\ncaf\xe9\n", "a.txt, line 3: byte 0xe9 is not UTF-8"),
        ("a.jsonl", b'{"text": ', "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl, line 1: byte 0xe9 is not UTF-8"),
        ("a.jsonl", b'\n["text"]', "a.jsonl, line 2: expected an object .* found list"),
        ("a.jsonl", b"null", "a.jsonl, line 1: expected an object .* found null"),
        ("a.jsonl", b'{"title": "x"}', 'a.jsonl, line 1: "text" must be a string'),
        ("a.jsonl", b'{"text": 3}', 'a.jsonl, line 1: "text" must be a string'),
        ("a.jsonl", b'{"text": "  "}', 'a.jsonl, line 1: "text" must be a string that is not blank'),
        ("a.jsonl", b'{"text": "x", "title": 3}', 'a.jsonl, line 1: "title" must be a string, found int'),
    ],
)
def test_a_file_that_is_named_and_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    with pytest.raises(InvalidInputError, match=complaint):
        read_texts([str(write(tmp_path / name, content))])


def pdf(text: str) -> bytes:
    """One page with one line."""
    stream = f"BT /F 12 Tf 9 99 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%b\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    made, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        places.append(len(made))
        made += b"%d 0 obj%b endobj\n" % (number, each)
    table = b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    return made + table + b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % len(made)


HTML = (
    b"<html><head><title>x</title></head><body><script>run()</script><h1>Keeper</h1><p>It is <a href='/o'>Ode</a>.</p>"
)


def docx(text: str) -> bytes:
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr(
            "_rels/.rels",
            '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            f'<Relationship Id="r" Type="{office}" Target="word/document.xml"/></Relationships>',
        )
        file.writestr(
            "[Content_Types].xml", '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>'
        )
        body = f"<w:body><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:body>"
        file.writestr("word/document.xml", f'<w:document xmlns:w="{word}">{body}</w:document>')
    return packed.getvalue()


def test_pdf_html_and_docx_are_read_with_their_extra_and_damage_is_named(tmp_path: Path) -> None:
    for library in ("mammoth", "markdownify", "pypdf"):
        pytest.importorskip(library)
    write(tmp_path / "a.pdf", pdf("The keeper is Ode."))
    write(tmp_path / "b.html", HTML)
    write(tmp_path / "c.docx", docx("The keeper is Ode."))
    write(tmp_path / "d.docx", b"no archive")
    reading = read_texts([str(tmp_path)])
    assert [text.text for text in reading.texts] == [
        "The keeper is Ode.",
        "# Keeper\n\nIt is Ode.",
        "The keeper is Ode.",
    ]
    assert [reason.partition(": ")[2][:23] for _, reason in reading.skipped] == ["cannot be read as .docx"]


def test_without_their_extra_pdf_html_and_docx_are_passed_over_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in ("mammoth", "markdownify", "pypdf"):
        monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr("kvcag.cli.files.find_spec", lambda name: None)
    write(tmp_path / "a.pdf", pdf("The keeper is Ode."))
    write(tmp_path / "b.md", "Text.")
    write(tmp_path / "c.png", b"PNG")
    assert [text.text for text in read_texts([str(tmp_path)]).texts] == ["Text."]
    assert "skipped files of other kinds: 1 .pdf, 1 .png; pip install 'kvcag[files]'" in capsys.readouterr().err
    with pytest.raises(MissingExtraError, match=r"kvcag\[files\]"):
        read_texts([str(tmp_path / "a.pdf")])


def test_one_bad_line_of_a_jsonl_names_itself_and_the_rest_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [b'{"text": "one"}', b'{"text": ', b'{"text": "caf\xe9"}', b"", b'{"text": "two"}']
    file = write(tmp_path / "a.jsonl", b"\n".join(lines))
    reading = read_texts([str(file)])
    assert [(text.text, text.metadata["part"]) for text in reading.texts] == [("one", 1), ("two", 5)]
    assert [reason.partition(": ")[0] for _, reason in reading.skipped] == [f"{file}, line 2", f"{file}, line 3"]
    assert reading.unreadable == {str(file)}, "sync drops nothing of a file that cannot be read as a whole"
    assert "a.jsonl, line 2: not JSON" in capsys.readouterr().err


def test_shards_are_a_partition_that_depends_on_the_content_alone(tmp_path: Path) -> None:
    for place in ("here", "there/deeper"):
        write(tmp_path / place / "lines.jsonl", "\n".join(json.dumps({"text": f"Line {n}."}) for n in range(40)))
        for number in range(40):
            write(tmp_path / place / f"{number}.txt", f"File {number}.")
    parts = [
        [
            {text.text for text in read_texts([str(tmp_path / place)], shard=Shard(number, 4)).texts}
            for number in range(1, 5)
        ]
        for place in ("here", "there")
    ]
    assert parts[0] == parts[1]
    assert min(map(len, parts[0])) > 5
    assert sum(map(len, parts[0])) == len(set().union(*parts[0])) == 80


@pytest.mark.parametrize("wrong", ["0/4", "5/4", "4", "1/0", "a/b", "-1/4"])
def test_a_shard_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidInputError, match="such as 3/64"):
        Shard.parse(wrong)


def test_missing_and_blank_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EmptyPromptError, match="empty"):
        read_texts([str(write(tmp_path / "blank.txt", "\n"))])
    for path, complaint in (("nowhere", "no such file or folder"), ("*.zzz", "nothing matches")):
        with pytest.raises(InvalidInputError, match=complaint):
            read_texts([str(tmp_path / path)])


def test_a_folder_below_a_hidden_one_can_be_named(tmp_path: Path) -> None:
    folder = write(tmp_path / ".notes" / "2026" / "a.md", "text").parent
    assert [text.text for text in read_texts([str(folder)]).texts] == ["text"]


def test_paths_keep_the_order_in_which_they_are_given(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / name, name)) for name in ("z.txt", "a.txt")]
    assert [text.text for text in read_texts(paths).texts] == ["z.txt", "a.txt"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    assert read_texts([str(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello"))]).texts[0].text == "hello"


def test_a_corpus_has_titles_and_defaults_to_topics_of_python(tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", '{"text": "first", "title": "T"}\n\n{"text": " second "}\n')
    assert read_corpus([str(file)]) == [Topic("T", "first"), Topic(f"{file}:3", "second")]
    assert read_corpus(None) == python_topics()


# JSON strings may hold U+2028 and other characters at which str.splitlines() would cut.
texts = st.text().filter(str.strip)


@given(records=st.lists(st.tuples(texts, st.text()), min_size=1), ascii_only=st.booleans())
def test_jsonl_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, str]], ascii_only: bool
) -> None:
    lines = [json.dumps({"text": text, "title": title}, ensure_ascii=ascii_only) for text, title in records]
    file = write(tmp_path_factory.getbasetemp() / "a.jsonl", "\n".join(lines))
    read = [(text.text, text.metadata["title"]) for text in read_texts([str(file)]).texts]
    assert read == [(text.strip(), title) for text, title in records]


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
