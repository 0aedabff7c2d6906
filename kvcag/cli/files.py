"""Files, folders and globs as texts to encode: plain reading of UTF-8, nothing is converted."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcag.demo.corpus import parse_jsonl, read_text
from kvcag.errors import EmptyPromptError, InvalidInputError

SUFFIXES = (".jsonl", ".markdown", ".md", ".rst", ".text", ".txt")
"""What is read in folders. A file that is named is read whatever its suffix, if it is text."""

_CUTS = (r"\n[ \t]*\n\s*", r"\n", r"[.!?]\s+", r"\s+")
"""After what a text is cut: blank lines, lines, sentences, words."""

_CONVERT = (".htm", ".html", ".pdf", ".docx", ".odt", ".epub")


@dataclass(frozen=True, slots=True)
class Text:
    """One text to encode.

    Attributes:
        text: never blank.
        metadata: its `source`, an absolute path; a `title`; and `part` of `parts` where a file became several.
    """

    text: str
    metadata: dict[str, Any]


@dataclass(slots=True)
class Reading:
    """What was read.

    Attributes:
        texts: in the order of their files.
        skipped: files found in folders that hold nothing to encode, each with the reason.
        unreadable: the sources of those among them that hold something, but no text that can be read.
        others: how many files in folders have other suffixes.
    """

    texts: list[Text] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)
    others: int = 0


def read_paths(paths: Iterable[str]) -> Reading:
    """Read files, folders (recursively, sorted, hidden ones passed over) and globs; each file once.

    Raises:
        InvalidInputError: a path is missing, or a file that was named is blank, is not text, or is of a format that
            has to be converted first.
    """
    reading, seen = Reading(), set[str]()
    for path in paths:
        for file, named in _files(path, reading):
            source = os.path.abspath(file)
            if source in seen:
                continue
            seen.add(source)
            try:
                reading.texts += _texts(file, source)
            except InvalidInputError as refused:
                if named:
                    raise
                reading.skipped.append((str(file), str(refused)))
                if not isinstance(refused, EmptyPromptError):
                    reading.unreadable.add(source)
    return reading


def split(text: Text, limit: int, count: Callable[[str], int]) -> list[Text]:
    """A text as several of at most `limit` tokens, cut between paragraphs; within them only where one is longer.

    Args:
        text: what to cut.
        limit: tokens.
        count: how many tokens a text has.
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
    """Pieces that give the text again, cut after the first separator that makes them short enough."""
    if not cuts or count(text) <= limit:
        yield text
        return
    for piece in re.findall(rf".+?(?:{cuts[0]}|\Z)", text, flags=re.DOTALL):
        yield from _cut(piece, limit, count, cuts[1:])


def _files(path: str, reading: Reading) -> Iterator[tuple[Path, bool]]:
    """The files of a path, and whether the user named them one by one."""
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        yield from ((file, False) for file in _below(Path(expanded), reading))
    elif os.path.exists(expanded):
        yield Path(expanded), True
    elif glob.has_magic(expanded):
        found = sorted(glob.glob(expanded, recursive=True))
        if not found:
            raise InvalidInputError(f"{path}: nothing matches this pattern.")
        for each in found:
            yield from (
                (file, False) for file in (_below(Path(each), reading) if os.path.isdir(each) else [Path(each)])
            )
    else:
        raise InvalidInputError(f"{path}: no such file or folder.")


def _below(folder: Path, reading: Reading) -> Iterator[Path]:
    found = False
    for file in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(folder).parts) or not file.is_file():
            continue
        if file.suffix.lower() in SUFFIXES:
            found = True
            yield file
        else:
            reading.others += 1
    if not found:
        reading.skipped.append((str(folder), f"{folder}: no {', '.join(SUFFIXES)} file in this folder or below it."))


def _texts(file: Path, source: str) -> Iterator[Text]:
    if file.suffix.lower() in _CONVERT:
        raise InvalidInputError(f"{file}: {file.suffix} files are not read. Convert it to text or Markdown first.")
    with suppress(OSError), file.open("rb") as opened:
        if b"\0" in opened.read(8192):
            raise InvalidInputError(f"{file}: this is a binary file. Convert it to text first.")
    text = read_text(file)
    if not text.strip():
        raise EmptyPromptError(f"{file}: the file is empty. Fill it or leave it out.")
    if file.suffix.lower() != ".jsonl":
        yield Text(text.strip(), {"source": source, "title": file.name})
        return
    lines = list(parse_jsonl(text, str(file)))
    for number, line in enumerate(lines, start=1):
        place = {"part": number, "parts": len(lines)} if len(lines) > 1 else {}
        yield Text(line.text, {"source": source, "title": line.title, **place})
