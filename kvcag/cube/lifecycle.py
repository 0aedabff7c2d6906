"""The life of a cube's texts: added, edited, deleted and found, with the caches always following."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvcag.core import TextualMemoryItem
from kvcag.cube.caches import Caches
from kvcag.cube.texts import SearchableTexts, TextSide, distinct, read_all, said
from kvcag.errors import InvalidInputError, UnknownItemError
from kvcag.memory import KVCacheMemory
from kvcag.streams import in_thread


class CubeTexts:
    """What `MemoryCube` is without asking and moving: texts, a place where they are found, and caches that follow.

    Args:
        memory: the activation side.
        texts: the plaintext side, where it has a place of its own.
    """

    def __init__(self, memory: KVCacheMemory, texts: TextSide | None) -> None:
        self.memory = memory
        self.texts = texts
        self._caches = Caches(memory)
        self._known: dict[str, TextualMemoryItem] = {}
        self._changes = 0
        self._lock = threading.RLock()

    def add(self, documents: object) -> list[str]:
        """Put texts into the cube, and return their ids, in order. Nothing is encoded yet: see `encode`.

        One that has the id of another takes its place, and the other's caches are deleted.

        Args:
            documents: one, or several: a str, a LangChain `Document`, a LlamaIndex node (its text as the LLM would
                read it), a `TextualMemoryItem`. What has no id of its own gets one from its text.

        Raises:
            EmptyPromptError: one says nothing. Nothing was added.
            InvalidInputError: one cannot be read, or `texts` cannot be written to.
        """
        texts = read_all(documents)
        with self._lock:
            self._look()
            new = [text for text in texts if self._known.get(text.id) != text]
            if self.texts is not None and new:
                self.texts.add(new)
            self._follow(new)
        return [text.id for text in texts]

    def edit(self, id: str, text: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Let a text say something else. Its caches are deleted; the others' stay.

        Args:
            id: which one.
            text: what it says from now on.
            metadata: its metadata from now on; None leaves them as they are.

        Raises:
            UnknownItemError: there is no such text.
        """
        with self._lock:
            known = self.get(id)
            if known is None:
                raise UnknownItemError([id], "Add it: cube.add(...).")
            now = known.metadata if metadata is None else dict(metadata)
            self.add(TextualMemoryItem(id=id, memory=text, metadata=now))

    def delete(self, ids: str | Sequence[str]) -> None:
        """Forget texts, here and where they are found, and every cache that was made from them, in every tier.

        Ids that are missing are ignored.
        """
        listed = [ids] if isinstance(ids, str) else list(ids)
        with self._lock:
            if self.texts is not None:
                self.texts.delete(listed)
            self._follow([], gone=listed)

    def sync(self, documents: object) -> None:
        """Make these the cube's texts: add what is new, edit what changed, delete what is gone. Errors as `add`.

        Every cache that was made from anything else leaves the store, also what an earlier process kept there.
        """
        texts = read_all(documents)
        with self._lock:
            self.add(texts)
            self.delete([id for id in self._known if id not in {text.id for text in texts}])
            self._caches.keep_only({said(text.memory) for text in texts})

    def purge(self, text: str) -> None:
        """Delete every cache that was made from a text which the cube does not hold, for a request to delete.

        `delete` does it for what the cube holds. An answer that was under way in a framework meanwhile may have kept
        such a cache once more.

        Raises:
            InvalidInputError: the cube holds it.
        """
        with self._lock:
            live = {said(known.memory) for known in self._known.values()}
            if said(text) in live:
                raise InvalidInputError("the cube holds this text: delete it by its id, and its caches go with it")
            self._caches.drop({text}, live)

    def get(self, id: str) -> TextualMemoryItem | None:
        """A text, or None."""
        self._look()
        return self._known.get(id)

    def get_all(self) -> list[TextualMemoryItem]:
        """Every text that the cube knows, in the order in which they came."""
        self._look()
        with self._lock:
            return list(self._known.values())

    def search(self, question: str, k: int | None = None) -> list[TextualMemoryItem]:
        """The texts to answer from: what `texts` finds for the question, best first; all, where it cannot search.

        What is found and was not known, or says something else than before, is the cube's text from then on.

        Raises:
            InvalidInputError: a `k`, and nothing that could choose.
        """
        if not isinstance(self.texts, SearchableTexts):
            if k is not None:
                raise InvalidInputError(
                    f"k={k}, and the cube has nothing to choose by: give it texts that can be searched (texts=…), or "
                    "leave k out and ask all of them"
                )
            return self.get_all()
        while True:
            changes = self._changes
            found = distinct(self.texts.search(question, k))
            with self._lock:
                if changes == self._changes:  # else what was found may have been deleted meanwhile
                    self._follow(found)
                    return found

    async def aadd(self, documents: object) -> list[str]:
        """`add`, in a thread."""
        return await in_thread(self.add, documents)

    async def aedit(self, id: str, text: str, metadata: Mapping[str, Any] | None = None) -> None:
        """`edit`, in a thread."""
        await in_thread(self.edit, id, text, metadata)

    async def adelete(self, ids: str | Sequence[str]) -> None:
        """`delete`, in a thread."""
        await in_thread(self.delete, ids)

    async def apurge(self, text: str) -> None:
        """`purge`, in a thread."""
        await in_thread(self.purge, text)

    async def asearch(self, question: str, k: int | None = None) -> list[TextualMemoryItem]:
        """`search`, in a thread."""
        return await in_thread(self.search, question, k)

    def _look(self) -> None:
        """Follow a place whose texts others may change, too."""
        with self._lock:
            listed = self.texts.listed() if self.texts is not None else None
            if listed is not None:
                ids = {text.id for text in listed}
                self._follow(listed, gone=[id for id in self._known if id not in ids])

    def _follow(self, texts: Iterable[TextualMemoryItem], gone: Iterable[str] = ()) -> None:
        """Take texts as they are now, forget others, and delete the caches of what no text says any more.

        The caches go first: where a store fails, the cube still knows what it has to delete, and can be asked again.
        """
        known = self._known | {text.id: text for text in texts}
        for id in gone:
            known.pop(id, None)
        live = {said(text.memory) for text in known.values()}
        if known.keys() == self._known.keys() and all(known[id].memory == self._known[id].memory for id in known):
            self._known = known
            return
        self._caches.drop({was.memory for was in self._known.values() if said(was.memory) not in live}, live)
        self._known = known
        self._changes += 1
