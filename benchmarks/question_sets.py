"""Questions with the documents that a retriever finds for them: three sets of different kinds.

`musique`: questions over several passages of Wikipedia, from a JSON file. `reference`: questions about the functions in
Python's reference. `faq`: the FAQs of Debian packages on this machine. The last two are made from files on the
machine: a text splitter cuts the sources into chunks, and BM25 finds each question's chunks, best first.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from pydoc_data.topics import topics

from langchain_text_splitters import RecursiveCharacterTextSplitter
from rank_bm25 import BM25Plus


@dataclass(frozen=True)
class Question:
    """One question of a set.

    Attributes:
        prompt: what the model is asked.
        answers: the reference answers.
        documents: the texts of the documents, best first.
        before: what stands before each of them in its source; "" at the beginning.
    """

    prompt: str
    answers: list[str]
    documents: list[str]
    before: list[str]


def musique(data: Path, docs: int, words: int) -> list[Question]:
    """From a JSON list of {"question": …, "answers": […], "ctxs": [{"text": …}, …]}: the first passages of each.

    Where a question has fewer, those of the next questions follow. Before a passage stands the first passage of the
    next question, as some other passage of the collection.
    """
    rows = json.loads(data.read_text())
    passages = [[" ".join(ctx["text"].split()[:words]) for ctx in row["ctxs"]] for row in rows]
    return [
        Question(
            f"Summarize the passages, then answer: {row['question']}",
            row["answers"],
            list(islice(chain(*passages[number:], *passages), docs)),
            [passages[(number + 1) % len(rows)][0]] * docs,
        )
        for number, row in enumerate(rows)
    ]


def reference(docs: int, words: int) -> list[Question]:
    """What a function or method does, over Python's reference; the reference answer is the first sentence on it."""
    sources = [topics[name] for name in ("string-methods", "typesmapping", "typesseq", "specialnames", "debugger")]
    entry = re.compile(r"^([a-z]+\.\w+)\(.*\)\n(?:\S.*\n)*\n((?:   .*\n|\n)+)", re.M)
    asked = {name: first_sentence(text) for source in sources for name, text in entry.findall(source)}
    return over(sources, [(f"What does {name}() do?", answer) for name, answer in asked.items()], docs, words)


def faq(docs: int, words: int) -> list[Question]:
    """The questions of FAQs, over all of their answers; the reference answer is an answer's first sentence."""
    sources = [read(file) for file in sorted(Path("/usr/share/doc").glob("*/[Ff][Aa][Qq]*")) if file.is_file()]
    asked = [(question, first_sentence(answer)) for source in sources for question, answer in questions_of(source)]
    if not asked:
        raise SystemExit("there is no FAQ in /usr/share/doc: try `apt-get install xz-utils zlib1g-dev valgrind`")
    return over(sources, asked, docs, words)


def read(file: Path) -> str:
    content = file.read_bytes()
    return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8", "replace")


def questions_of(text: str) -> Iterator[tuple[str, str]]:
    """Questions that begin with "Q:", "Q." or a number and end with "?", and what stands between each and the next."""
    begin = r"^(?:Q[:.]|[ ]?\d+(?:\.\d+)*\.)[ ]+"
    pieces = re.split(begin, re.sub(r"^[-=~]{8,}$", "", text, flags=re.M), flags=re.M)
    for piece in pieces[1:]:
        question, mark, answer = piece.partition("?")
        answer = re.sub(r"^\s*A[:.]\s+", "", answer)
        if mark and "\n\n" not in question and len(answer.split()) >= 8:
            yield " ".join(question.split()) + mark, answer


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", " ".join(text.split()), maxsplit=1)[0]


def over(sources: Sequence[str], asked: Sequence[tuple[str, str]], docs: int, words: int) -> list[Question]:
    """The questions in a random order that is always the same, with the chunks of `sources` that fit them best."""
    splitter = RecursiveCharacterTextSplitter(chunk_size=6 * words, chunk_overlap=0)  # a word has five letters
    split = [splitter.split_text(source) for source in sources]
    chunks = [chunk for chunks in split for chunk in chunks]
    before = [earlier for chunks in split for earlier in ["", *chunks[:-1]]]
    index = BM25Plus([terms(chunk) for chunk in chunks])
    questions = []
    for question, answer in asked:
        scores = index.get_scores(terms(question))
        best = sorted(range(len(chunks)), key=lambda place: (-scores[place], place))[:docs]
        texts = [[of[place] for place in best] for of in (chunks, before)]
        questions.append(Question(question, [answer], *texts))
    random.Random(0).shuffle(questions)
    return questions


def terms(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
