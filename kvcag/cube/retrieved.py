"""Texts that a retriever finds: someone else's, or one that is built from the cube's texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from kvcag.core import TextualMemoryItem
from kvcag.cube.texts import read
from kvcag.errors import InvalidInputError

Find: TypeAlias = Callable[[str], Iterable[object]]
"""Gets a question, and gives what `read` can read, best first."""


class FoundTexts:
    """Texts that others keep. The cube cannot write to them, and takes each as it is found.

    Deleting from the cube deletes caches alone: what is found again comes back, so delete it there first.

    Args:
        find: finds texts for a question.
    """

    def __init__(self, find: Find) -> None:
        self._find = find

    def search(self, question: str, k: int | None) -> list[TextualMemoryItem]:
        """What is found; the first `k` of it."""
        return [read(document) for document in self._find(question)][:k]

    def add(self, texts: Sequence[TextualMemoryItem]) -> None:
        """Refused."""
        raise InvalidInputError(
            f"{len(texts)} texts cannot be added: the cube's texts are found by a retriever, which only reads. Add "
            "them where it reads and the cube follows, or give the cube texts that can be written "
            "(BuiltRetrieverTexts, VectorStoreTexts, IndexTexts)."
        )

    def delete(self, ids: Sequence[str]) -> None:
        """Nothing: see the class."""

    def listed(self) -> None:
        """Nobody can tell."""


class BuiltTexts:
    """Texts that the cube keeps, found by something that is built from all of them.

    Args:
        build: makes what finds them. Called again, at the next search, when the texts changed.
    """

    def __init__(self, build: Callable[[list[TextualMemoryItem]], Find]) -> None:
        self._build = build
        self._texts: dict[str, TextualMemoryItem] = {}
        self._built: Find | None = None

    def search(self, question: str, k: int | None) -> list[TextualMemoryItem]:
        """What is found; the first `k` of it."""
        if not self._texts:
            return []
        find = self._built
        if find is None:
            find = self._built = self._build(list(self._texts.values()))
        return [read(document) for document in find(question)][:k]

    def add(self, texts: Sequence[TextualMemoryItem]) -> None:
        """Put texts, to be built in."""
        self._texts = {**self._texts, **{text.id: text for text in texts}}
        self._built = None

    def delete(self, ids: Sequence[str]) -> None:
        """Remove texts."""
        self._texts = {id: text for id, text in self._texts.items() if id not in ids}
        self._built = None

    def listed(self) -> None:
        """The cube lists what it added."""
