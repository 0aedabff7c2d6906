"""What the demonstration reads: topics of Python's own reference, or a user's files."""

import json
import pydoc_data.topics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcag.errors import InvalidInputError

SUFFIXES = (".jsonl", ".md", ".txt")

DEFAULT_TOPICS = (
    "break",
    "pass",
    "continue",
    "while",
    "return",
    "yield",
    "lists",
    "imaginary",
    "numbers",
    "del",
    "nonlocal",
    "power",
)
"""A dozen topics that every CPython since 3.10 carries, some 2,100 tokens; what is asked about stands near the end,
where a small model still finds it."""

DEFAULT_QUESTIONS = (
    "What happens when 0.0 is raised to a negative power?",
    "What exception is raised if the name is unbound?",
    "What does an imaginary literal yield?",
    'What is the "while" statement used for?',
)
"""Questions that the default topics answer, and that a model of 135M parameters answers from them."""

GENERAL_QUESTIONS = (
    "What is this text about? Answer in one sentence.",
    "What is the most important thing to know?",
    "Which names are mentioned?",
)
"""What to ask about a corpus that nobody has written questions for."""


@dataclass(frozen=True, slots=True)
class CorpusDocument:
    """One text to encode.

    Attributes:
        title: What to call it when it is shown: the topic's name, the file, or the JSON object's own title.
        text: Never blank.
    """

    title: str
    text: str


def python_topics(names: Iterable[str] = DEFAULT_TOPICS) -> list[CorpusDocument]:
    """Return topics of the running Python's language reference (``pydoc_data.topics``), in the order given.

    Raises:
        InvalidInputError: This Python has no topic of that name.
    """
    topics: dict[str, str] = pydoc_data.topics.topics
    names = list(names)
    if unknown := [name for name in names if name not in topics]:
        raise InvalidInputError(
            f"this Python's reference has no topic {', '.join(map(repr, unknown))}. `help('topics')` lists them."
        )
    return [CorpusDocument(name, topics[name].strip()) for name in names]


def load_corpus(paths: Iterable[str | Path]) -> list[CorpusDocument]:
    """Read files and folders into documents, in the order given; folders recursively, sorted by path.

    A ``.md`` or ``.txt`` file is one document, each line of a ``.jsonl`` file is one: an object with a string ``text``
    and, optionally, a string ``title``. Files must be UTF-8, with or without a byte order mark. Hidden files and
    folders, and files with other suffixes inside a folder, are passed over.

    Raises:
        InvalidInputError: Something is missing, blank, not UTF-8 or not what its suffix says. The message names the
            file and, in a ``.jsonl`` file, the line. Nothing is returned in part.
    """
    documents = [document for path in paths for file in _files(Path(path)) for document in _read(file)]
    if not documents:
        raise InvalidInputError(f"no path to read: name folders or files ({', '.join(SUFFIXES)}).")
    return documents


def _files(path: Path) -> list[Path]:
    """Return ``path`` itself, or the files below it that can be read as documents; at least one."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise InvalidInputError(f"{path}: only {', '.join(SUFFIXES)} files can be read. Convert it to text first.")
        return [path]
    if not path.is_dir():
        raise InvalidInputError(f"{path}: no such file or folder.")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise InvalidInputError(f"{path}: no {', '.join(SUFFIXES)} file in this folder or below it.")
    return files


def _read(file: Path) -> Iterator[CorpusDocument]:
    text = read_text(file)
    if not text.strip():
        raise InvalidInputError(f"{file}: the file is empty. Fill it or leave it out.")
    if file.suffix.lower() == ".jsonl":
        yield from parse_jsonl(text, str(file))
    else:
        yield CorpusDocument(str(file), text.strip())


def read_text(file: Path) -> str:
    """The whole of a file.

    Raises:
        InvalidInputError: it cannot be read, or is not UTF-8; the message names the file and the line.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{file}: cannot be read: {error.strerror}.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidInputError(
            f"{file}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. Save the file as UTF-8."
        ) from error


def parse_jsonl(content: str, name: str) -> Iterator[CorpusDocument]:
    """Yield one document for each line that is not blank; `name` is what errors and default titles call the file.

    Raises:
        InvalidInputError: A line is not an object with a string ``text`` and, optionally, a string ``title``.
    """
    # Split at line feeds only: str.splitlines() would also cut inside strings, at U+2028 and the like.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield _parse_line(line, f"{name}, line {number}", default_title=f"{name}:{number}")


def _parse_line(line: str, place: str, default_title: str) -> CorpusDocument:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{place}: not JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(record, dict):
        raise InvalidInputError(f'{place}: expected an object such as {{"text": "…"}}, found {_kind(record)}.')
    text, title = record.get("text"), record.get("title", default_title)
    if not isinstance(text, str) or not text.strip():
        raise InvalidInputError(f'{place}: "text" must be a string that is not blank.')
    if not isinstance(title, str):
        raise InvalidInputError(f'{place}: "title" must be a string, found {_kind(title)}.')
    return CorpusDocument(title, text.strip())


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
