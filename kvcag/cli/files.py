"""Reads files, folders and globs: UTF-8 text, and PDF, HTML and DOCX with the extra `files`."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from kvcag.cli import common
from kvcag.demo.corpus import Topic, python_topics
from kvcag.errors import EmptyPromptError, InvalidInputError, MissingExtraError

SUFFIXES = (".jsonl", ".markdown", ".md", ".rst", ".text", ".txt")
"""The suffixes of files that are read in folders. A file that is named itself may have any suffix, if it is text."""

_CUTS = (r"\n[ \t]*\n\s*", r"\n", r"[.!?]\s+", r"\s+")
"""Patterns after which a text may be cut: blank lines, lines, sentences, words."""

_CONVERTED = (".docx", ".htm", ".html", ".pdf")
"""The suffixes of files that the libraries of the extra `files` read."""

_CONVERT = (".doc", ".epub", ".odt", ".rtf")


@dataclass(frozen=True, slots=True)
class Text:
    """One text to encode.

    Attributes:
        text: never blank.
        metadata: `source`, an absolute path; `title`; and `part` of `parts` if one file became several texts.
    """

    text: str
    metadata: dict[str, Any]


@dataclass(slots=True)
class Reading:
    """The result of reading some paths.

    Attributes:
        texts: the texts, in the order of their files.
        skipped: files and folders without a text, and lines that cannot be read, each with the reason.
        unreadable: the sources of non-empty files that were skipped, completely or in part.
        others: the number of files of other kinds in the folders, by suffix.
    """

    texts: list[Text] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)
    others: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several parts of a corpus, chosen by a hash of each file, or of each line of a .jsonl file.

    The parts depend on the bytes only, not on paths, so every machine computes the same parts from the same files. Two
    files with the same bytes are in the same part.

    Attributes:
        number: the number of this part, from 1 to `count`.
        count: the number of parts.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse a text such as `3/64`.

        Raises:
            InvalidInputError: the text has another form, or the number is not from 1 to the count.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        number, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= count:
            raise InvalidInputError(f"--shard {text}: give a number and a count, such as 3/64: from 1/64 to 64/64.")
        return cls(number, count)

    def has(self, content: bytes) -> bool:
        """Whether a file or a line with this content is in this part."""
        return self.count == 1 or int.from_bytes(sha256(content).digest()[:8], "big") % self.count == self.number - 1


def read_texts(paths: Iterable[str], *, may_be_empty: bool = False, shard: Shard | None = None) -> Reading:
    """Read files, folders and globs; each file once. Prints skipped files on stderr.

    Folders are read recursively, in sorted order, without hidden files.

    Args:
        paths: the files, folders and globs.
        may_be_empty: return an empty result if there are no texts, instead of raising.
        shard: read this part only.

    Raises:
        InvalidInputError: a path is missing; a named file is blank, is not text or must be converted first; or there
            is no text and `may_be_empty` is False.
    """
    reading, seen = Reading(), set[str]()
    shard = shard or Shard()
    for path in paths:
        for file, is_named in _files(path, reading):
            source = os.path.abspath(file)
            if source in seen:
                continue
            seen.add(source)
            try:
                reading.texts += _texts(file, source, shard, reading)
            except InvalidInputError as refused:
                if is_named:
                    raise
                reading.skipped.append((str(file), str(refused)))
                if not isinstance(refused, EmptyPromptError):
                    reading.unreadable.add(source)
    if not reading.texts and not may_be_empty and shard.count == 1:
        raise InvalidInputError("; ".join(reason for _, reason in reading.skipped))
    for _, reason in reading.skipped:
        common.say(f"skipped: {reason}")
    if reading.others:
        kinds = ", ".join(f"{count} {kind or 'without a suffix'}" for kind, count in sorted(reading.others.items()))
        advice = (
            ""
            if reading.others.keys().isdisjoint(_CONVERTED)
            else "; pip install 'kvcag[files]' reads PDF, HTML and DOCX"
        )
        common.say(f"skipped files of other kinds: {kinds}{advice}")
    return reading


def read_corpus(paths: Sequence[str] | None) -> list[Topic]:
    """Read the texts of `--corpus`; by default, topics of Python's manual. Raises the errors of `read_texts`."""
    if not paths:
        return python_topics()
    return [Topic(text.metadata["title"], text.text) for text in read_texts(paths).texts]


def fitting(texts: Sequence[str], question: str, count: int) -> list[int]:
    """The indices, ascending, of the `count` texts whose words fit a question best (BM25)."""
    from rank_bm25 import BM25Plus  # type: ignore[import-untyped]  # it has no stubs

    def words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    scores = BM25Plus([words(text) for text in texts]).get_scores(words(question))
    return sorted(sorted(range(len(texts)), key=lambda place: (-scores[place], place))[:count])


def split(text: Text, limit: int, count: Callable[[str], int]) -> list[Text]:
    """Cut a text into parts of at most `limit` tokens, between paragraphs if possible.

    Args:
        text: the text to cut.
        limit: the maximum number of tokens of a part.
        count: returns the number of tokens of a str.
    """
    parts, filled = [""], 0
    for piece in _cut(text.text, limit, count, _CUTS):
        tokens = count(piece)
        if parts[-1] and filled + tokens > limit:
            parts.append("")
            filled = 0
        parts[-1] += piece
        filled += tokens
    whole = [part.strip() for part in parts if part.strip()]
    if len(whole) < 2:
        return [text]
    return [Text(part, {**text.metadata, "part": i, "parts": len(whole)}) for i, part in enumerate(whole, start=1)]


def _cut(text: str, limit: int, count: Callable[[str], int], cuts: Sequence[str]) -> Iterator[str]:
    """Yield consecutive pieces of a text, cut after the first kind of separator that makes them short enough."""
    if not cuts or count(text) <= limit:
        yield text
        return
    for piece in re.findall(rf".+?(?:{cuts[0]}|\Z)", text, flags=re.DOTALL):
        yield from _cut(piece, limit, count, cuts[1:])


def _files(path: str, reading: Reading) -> Iterator[tuple[Path, bool]]:
    """Yield the files of a path, and whether the path is the file itself."""
    expanded = os.path.expanduser(path)
    if os.path.exists(expanded) and not os.path.isdir(expanded):
        yield Path(expanded), True
        return
    found = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
    if not found:
        why = "nothing matches this pattern" if glob.has_magic(expanded) else "no such file or folder"
        raise InvalidInputError(f"{path}: {why}.")
    for each in map(Path, found):
        yield from ((file, False) for file in (_below(each, reading) if each.is_dir() else [each]))


def _below(folder: Path, reading: Reading) -> Iterator[Path]:
    converts = all(map(find_spec, ("mammoth", "markdownify", "pypdf")))
    kinds, found = (*SUFFIXES, *_CONVERTED) if converts else SUFFIXES, False
    for file in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(folder).parts) or not file.is_file():
            continue
        if file.suffix.lower() in kinds:
            found = True
            yield file
        else:
            reading.others[file.suffix.lower()] += 1
    if not found:
        reading.skipped.append((str(folder), f"{folder}: no {', '.join(kinds)} file in this folder or below it."))


def _texts(file: Path, source: str, shard: Shard, reading: Reading) -> list[Text]:
    """The texts of a file. Unreadable lines of a .jsonl file are added to `reading.skipped`.

    Raises:
        InvalidInputError: no text in the file can be read.
    """
    if file.suffix.lower() in _CONVERT:
        raise InvalidInputError(f"{file}: {file.suffix} files are not read. Convert it to text or Markdown first.")
    if file.suffix.lower() == ".jsonl":
        return _lines(file, source, shard, reading)
    content = _content(file)
    if not shard.has(content):
        return []
    text = _converted(content, file) if file.suffix.lower() in _CONVERTED else _decoded(content, str(file))
    if not text.strip():
        what = "there is no text in it" if content.strip() else "the file is empty"
        raise EmptyPromptError(f"{file}: {what}. Fill it or leave it out.")
    return [Text(text.strip(), {"source": source, "title": file.name})]


def _lines(file: Path, source: str, shard: Shard, reading: Reading) -> list[Text]:
    """The texts of those lines of a .jsonl file that are in a shard. Unreadable lines are left out."""
    texts: list[Text] = []
    refused: list[InvalidInputError] = []
    empty = True
    try:
        with open(file, "rb") as lines:
            # Lines end at line feeds only: str.splitlines() also cuts inside strings, at U+2028 for example.
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf").strip()
                empty = empty and not line
                if not line or not shard.has(line):
                    continue
                try:
                    title, text = _parse_line(line, f"{file}, line {number}", default_title=f"{file}:{number}")
                    texts.append(Text(text, {"source": source, "title": title, "part": number}))
                except InvalidInputError as error:
                    refused.append(error)
    except OSError as error:
        raise InvalidInputError(f"{file}: cannot be read: {error.strerror}.") from error
    if empty:
        raise EmptyPromptError(f"{file}: the file is empty. Fill it or leave it out.")
    if refused and not texts:
        raise refused[0]
    if refused:
        reading.unreadable.add(source)  # so that `sync` does not delete the old items of this file
    reading.skipped += [(str(file), str(error)) for error in refused]
    return texts


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{file}: cannot be read: {error.strerror}.") from error


def _converted(content: bytes, file: Path) -> str:
    """The text of a PDF, or HTML or DOCX as Markdown. Leaves out pictures, scripts and the addresses of links.

    Raises:
        MissingExtraError: the libraries are not installed.
        InvalidInputError: the libraries cannot read the file.
    """
    kind = file.suffix.lower()
    try:
        if kind == ".pdf":
            from pypdf import PdfReader

            return "\n\n".join(page.extract_text() for page in PdfReader(BytesIO(content)).pages)
        import mammoth
        from markdownify import MarkdownConverter

        html = mammoth.convert_to_html(BytesIO(content)).value if kind == ".docx" else content
        from bs4 import BeautifulSoup

        page = BeautifulSoup(html, "html.parser")
        for hidden in page(["head", "script", "style", "template", "img", "svg"]):
            hidden.decompose()
        return re.sub(r"\n{3,}", "\n\n", MarkdownConverter(strip=["a"], heading_style="ATX").convert_soup(page))
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"{file} (a {kind} file)", "files") from missing
    except Exception as error:  # each library raises its own exceptions for damaged files
        raise InvalidInputError(f"{file}: cannot be read as {kind}: {type(error).__name__}: {error!s:.200}") from error


def _decoded(content: bytes, place: str) -> str:
    if b"\0" in content[:8192]:
        raise InvalidInputError(f"{place}: this is a binary file. Convert it to text first.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidInputError(
            f"{place}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. Save the file as UTF-8."
        ) from error


def _parse_line(line: bytes, place: str, default_title: str) -> tuple[str, str]:
    """Return the title and the text of a .jsonl line: an object with a str `text` and, optionally, a str `title`."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{place}: byte 0x{line[error.start]:02x} is not UTF-8.") from error
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{place}: not JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(record, dict):
        raise InvalidInputError(f'{place}: expected an object such as {{"text": "…"}}, found {_kind(record)}.')
    text, title = record.get("text"), record.get("title", default_title)
    if not isinstance(text, str) or not text.strip():
        raise InvalidInputError(f'{place}: "text" must be a string that is not blank.')
    if not isinstance(title, str):
        raise InvalidInputError(f'{place}: "title" must be a string, found {_kind(title)}.')
    return title, text.strip()


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
