"""The plaintext side of a cube: how a text is read, and where texts are found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from kvcag.core import TextualMemoryItem
from kvcag.documents import text_and_metadata
from kvcag.errors import EmptyPromptError


class TextSide(Protocol):
    """A place where texts live beside the cube, which keeps it in step.

    The cube keeps texts itself, too: what it answers from, dumps and encodes. For `kvcag.langchain` these are
    `VectorStoreTexts` and others, for `kvcag.llama_index` `IndexTexts` and others.
    """

    def add(self, texts: Sequence[TextualMemoryItem]) -> None:
        """Put texts. One that is there under the same id is replaced."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove texts. Missing ones are ignored."""

    def listed(self) -> list[TextualMemoryItem] | None:
        """All of them, where others may change them too and the place can tell: the cube follows it. Else None."""


@runtime_checkable
class SearchableTexts(TextSide, Protocol):
    """A place that finds the texts that matter for a question."""

    def search(self, question: str, k: int | None) -> list[TextualMemoryItem]:
        """At most `k` texts, best first; None is the place's own setting."""


def read(document: object) -> TextualMemoryItem:
    """A str, a LangChain `Document`, a LlamaIndex node (as the LLM would read it) or a textual memory, as the latter.

    What has no id of its own gets one from its text. Metadata are made JSON: dates and paths become str.

    Raises:
        InvalidInputError: it is none of these.
    """
    text, metadata = text_and_metadata(document)
    id = getattr(document, "node_id", None) or getattr(document, "id", None) or _text_id(text)
    return TextualMemoryItem(id=str(id), memory=text, metadata=json.loads(json.dumps(metadata, default=str)))


def read_all(documents: object) -> list[TextualMemoryItem]:
    """One document or several, read; the last of those that share an id.

    Raises:
        EmptyPromptError: one says nothing.
        InvalidInputError: one cannot be read.
    """
    if isinstance(documents, Iterable) and not isinstance(documents, str) and not hasattr(documents, "metadata"):
        texts = [read(document) for document in documents]
    else:
        texts = [read(documents)]
    for number, text in enumerate(texts, start=1):
        if not text.memory.strip():
            raise EmptyPromptError(f"text {number} ({text.id!r}) is empty: leave it out")
    return list({text.id: text for text in texts}.values())


def distinct(texts: Iterable[TextualMemoryItem]) -> list[TextualMemoryItem]:
    """Texts, each once, in order. Of those that share an id and say different things, all but the first get another."""
    kept: dict[str, TextualMemoryItem] = {}
    for text in texts:
        if kept.get(text.id, text).memory != text.memory:
            text = text.model_copy(update={"id": _text_id(text.memory)})
        kept.setdefault(text.id, text)
    return list(kept.values())


def said(text: str) -> str:
    """A text without the blank lines around it, in which what is put into a prompt differs from what was given."""
    return text.strip("\n")


def made_of(text: str, known: set[str]) -> bool:
    """Whether a text is one of `known` (as `said`), or several of them with blank lines between."""
    if said(text) in known:
        return True
    parts = text.split("\n\n")
    longest = max((one.count("\n\n") + 1 for one in known), default=0)
    reachable = [True] + [False] * len(parts)
    for start in range(len(parts)):
        if not reachable[start]:
            continue
        if not said(parts[start]):
            reachable[start + 1] = True
        for end in range(start + 1, min(start + longest, len(parts)) + 1):
            reachable[end] = reachable[end] or said("\n\n".join(parts[start:end])) in known
    return reachable[-1]


def _text_id(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
