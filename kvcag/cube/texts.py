"""The texts of a cube: how documents become texts, and the places that hold and find texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from kvcag.core import TextualMemoryItem
from kvcag.documents import as_json, documents_of, text_and_metadata
from kvcag.errors import EmptyPromptError, InvalidInputError


class TextSide(Protocol):
    """A place outside the cube that holds texts, such as `kvcag.langchain.VectorStoreTexts`.

    The cube writes its changes to this place, and also has its own copy of the texts for answers, encoding and dumps.
    """

    def add(self, texts: Sequence[TextualMemoryItem]) -> None:
        """Add texts. A text replaces an earlier text with the same id."""

    def delete(self, ids: Sequence[str]) -> None:
        """Delete texts by id. Unknown ids are ignored."""


@runtime_checkable
class SearchableTexts(TextSide, Protocol):
    """A place that can search its texts."""

    def search(self, question: str, k: int | None) -> list[TextualMemoryItem]:
        """At most `k` texts for a question, best first. If `k` is None, the place decides how many."""


@runtime_checkable
class ListedTexts(TextSide, Protocol):
    """A place whose texts may also change without the cube. It lists its texts, and the cube follows the changes."""

    def listed(self) -> list[TextualMemoryItem]:
        """All texts of this place."""


Search: TypeAlias = Callable[[str, int | None], list[TextualMemoryItem]]
"""A function of a question and `k`, like `SearchableTexts.search`."""


class RetrieverTexts:
    """Texts that a retriever finds, and that the cube only reads. They are added and deleted outside the cube.

    `cube.delete` deletes the caches of such a text. If the retriever still finds the text, the text comes back: delete
    it from the retriever's own data first.

    Args:
        retriever: a retriever of LangChain or LlamaIndex, or a function that takes a question and returns documents.
    """

    def __init__(self, retriever: Any) -> None:
        self._search = search_of(retriever)

    def search(self, question: str, k: int | None) -> list[TextualMemoryItem]:
        """The first `k` texts that the retriever finds."""
        return self._search(question, k)

    def add(self, texts: Sequence[TextualMemoryItem]) -> None:
        """Refuse, because a retriever only reads.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(
            f"{len(texts)} texts cannot be added, because the retriever of this cube only reads. Add them to the "
            "retriever's own data, or make the cube with BuiltRetrieverTexts, VectorStoreTexts or IndexTexts."
        )

    def delete(self, ids: Sequence[str]) -> None:
        """Do nothing, because a retriever only reads."""


class BuiltTexts:
    """Holds texts in the cube, and builds a retriever from all of them.

    Args:
        build: builds a retriever, or a search function, from all texts. The first search after a change calls it.
    """

    def __init__(self, build: Callable[[list[TextualMemoryItem]], Any]) -> None:
        self._build = build
        self._texts: dict[str, TextualMemoryItem] = {}
        self._search: Search | None = None

    def search(self, question: str, k: int | None) -> list[TextualMemoryItem]:
        """The first `k` texts that the retriever finds."""
        if not self._texts:
            return []
        search = self._search
        if search is None:
            search = self._search = search_of(self._build(list(self._texts.values())))
        return search(question, k)

    def add(self, texts: Sequence[TextualMemoryItem]) -> None:
        """Add texts."""
        self._texts = {**self._texts, **{text.id: text for text in texts}}
        self._search = None

    def delete(self, ids: Sequence[str]) -> None:
        """Delete texts."""
        self._texts = {id: text for id, text in self._texts.items() if id not in ids}
        self._search = None


def search_of(retriever: Any) -> Search:
    """Make a `Search` from a LangChain or LlamaIndex retriever, or from a function of a question."""
    find = getattr(retriever, "invoke", None) or getattr(retriever, "retrieve", None) or retriever
    return lambda question, k: [read(document) for document in find(question)][:k]


def changed(texts: Iterable[TextualMemoryItem], stored: Iterable[object]) -> list[TextualMemoryItem]:
    """The texts that are not among the stored ones, or whose words or metadata differ from the stored ones."""
    there = {text.id: text for text in map(read, stored)}
    return [text for text in texts if there.get(text.id) != text]


def read(document: object) -> TextualMemoryItem:
    """Convert a document to a text: a str, a LangChain `Document`, a LlamaIndex node or a `TextualMemoryItem`.

    The text of a node is its content as the LLM reads it. A document without an id gets an id made from its text.
    Metadata are converted to JSON types; dates and paths become str.

    Raises:
        InvalidInputError: the document has no text.
    """
    text, metadata = text_and_metadata(document)
    id = getattr(document, "node_id", None) or getattr(document, "id", None) or _text_id(text)
    return TextualMemoryItem(id=str(id), memory=text, metadata=as_json(metadata))


def read_all(documents: object) -> list[TextualMemoryItem]:
    """Convert one document or several to texts. If several share an id, only the last one is returned.

    Raises:
        EmptyPromptError: a text is empty.
        InvalidInputError: a document has no text.
    """
    texts = [read(document) for document in documents_of(documents)]
    for number, text in enumerate(texts, start=1):
        if not text.memory.strip():
            raise EmptyPromptError(f"text {number} ({text.id!r}) is empty: leave it out")
    return list({text.id: text for text in texts}.values())


def distinct(texts: Iterable[TextualMemoryItem]) -> list[TextualMemoryItem]:
    """The texts in order, without duplicates. A text with the id of an earlier, different text gets a new id."""
    kept: dict[str, TextualMemoryItem] = {}
    for text in texts:
        if kept.get(text.id, text).memory != text.memory:
            text = text.model_copy(update={"id": _text_id(text.memory)})
        kept.setdefault(text.id, text)
    return list(kept.values())


def stripped(text: str) -> str:
    """A text without line breaks at its ends, since a prompt adds line breaks to the cube's texts."""
    return text.strip("\n")


def live_of(texts: Iterable[TextualMemoryItem]) -> set[str]:
    """The words of the texts, `stripped`."""
    return {stripped(text.memory) for text in texts}


def is_made_of(text: str, known: set[str]) -> bool:
    """Whether a text is one of the `known` texts (which are `stripped`), or several of them joined by blank lines."""
    if stripped(text) in known:
        return True
    parts = text.split("\n\n")
    longest = max((one.count("\n\n") + 1 for one in known), default=0)
    reachable = [True] + [False] * len(parts)
    for start in range(len(parts)):
        if not reachable[start]:
            continue
        if not stripped(parts[start]):
            reachable[start + 1] = True
        for end in range(start + 1, min(start + longest, len(parts)) + 1):
            reachable[end] = reachable[end] or stripped("\n\n".join(parts[start:end])) in known
    return reachable[-1]


def _text_id(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
