"""A corpus by a short name: encoded whole and in order, found again by an id that says what is in it.

The idea is the `cached_content` of hosted models. The id goes where a corpus could not: into bound arguments, traces
and checkpoints; it changes with the text, the instruction and the model, so what is keyed by it never mixes corpora.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvcag.chat_template import Document, Message
from kvcag.errors import CacheWarning, EmptyPromptError, InvalidInputError, StoreError
from kvcag.memory import KVCacheMemory
from kvcag.stores.base import MADE_OF

_INSTRUCTION = "instruction"


class ContextHandles:
    """The contexts of one memory. Their texts are kept with their caches in its store, so an id outlives the process.

    Args:
        memory: encodes and keeps them.
    """

    def __init__(self, memory: KVCacheMemory) -> None:
        self.memory = memory
        self._made: dict[str, tuple[str, str]] = {}

    def create(self, texts: Iterable[str], instruction: str = "", sources: Iterable[str] = ()) -> str:
        """Encode texts, one after another, and return the id, `kv:sha256:…`.

        Args:
            texts: joined by blank lines, in this order.
            instruction: stands before them, in the same system turn.
            sources: what else names the texts, paths or URLs; `KVCacheMemory.purge` finds the context by each of them,
                and by each of the texts.

        Raises:
            EmptyPromptError: there is nothing to encode.
            ContextLengthError: they do not fit into the model's context.
        """
        shown = [text for text in texts if text.strip()]
        if not shown:
            raise EmptyPromptError("the corpus is empty: there is nothing to encode")
        corpus = "".join(f"{text}\n\n" for text in shown)
        metadata = {_INSTRUCTION: instruction, MADE_OF: [*shown, *sources]}
        [id] = self.memory.keep(placed(instruction, [corpus], [_PLACEHOLDER]), [metadata])
        self._made[id] = instruction, corpus
        return id

    def place(self, id: str, messages: Sequence[Message]) -> list[Message]:
        """Messages behind a context. What a system message at their start says stands after it, in the same turn.

        Raises:
            InvalidInputError: no such context, here or in the store.
        """
        instruction, corpus = self._made.get(id) or self._stored(id)
        return placed(instruction, [corpus], messages)

    def _stored(self, id: str) -> tuple[str, str]:
        try:
            manifest = self.memory.store.manifest(id)
        except StoreError as damaged:
            raise InvalidInputError(f"context {id!r} cannot be read: {damaged}") from damaged
        if manifest is None or _INSTRUCTION not in manifest.metadata:
            raise InvalidInputError(
                f"there is no context {id!r}, here or in the store: it was never made, or it left the store. "
                "Make it with create_context(documents), which returns its id."
            )
        own = self.memory.engine.fingerprint
        if manifest.fingerprint is not None and not own.matches(manifest.fingerprint):
            differences = "; ".join(own.differences(manifest.fingerprint))
            warnings.warn(
                f"context {id!r} was made by another model ({differences}): its text is encoded again for this one. "
                "Make a context with each model.",
                CacheWarning,
                stacklevel=5,
            )
        self._made[id] = str(manifest.metadata[_INSTRUCTION]), manifest.records.composed_text_memory
        return self._made[id]


def is_context(metadata: Mapping[str, Any]) -> bool:
    """Whether an item with this metadata is a context, to which an id leads from bound arguments or checkpoints."""
    return _INSTRUCTION in metadata


def placed(instruction: str, documents: Sequence[str], messages: Sequence[Message]) -> list[Message]:
    """Messages behind documents, each of which ends with a blank line; see `ContextHandles.place`."""
    if not instruction and not documents:
        return list(messages)
    rest = list(messages)
    system: list[object] = [f"{instruction}\n\n"] if instruction else []
    system += map(Document, documents)
    while rest and rest[0]["role"] == "system":
        said = rest.pop(0)["content"]
        system += [said] if isinstance(said, str) else said or []
    return [{"role": "system", "content": system}, *rest]


_PLACEHOLDER: Message = {"role": "user", "content": "…"}
