"""CAGMemoryBlock: documents in an agent's memory, encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock
from llama_index.core.memory import BaseMemoryBlock
from pydantic import Field, SkipValidation, field_validator, model_validator
from typing_extensions import Self

from kvcag.adapters import checked_fields
from kvcag.cube.memory_cube import MemoryCube
from kvcag.documents import documents_of, text_and_metadata
from kvcag.errors import InvalidInputError
from kvcag.llama_index.messages import document_blocks


class CAGMemoryBlock(BaseMemoryBlock[list[ChatMessage]]):
    """Puts documents before the conversation, in a system message with a block for each document.

    ```python
    memory = Memory.from_defaults(memory_blocks=[CAGMemoryBlock(documents=documents)])
    await agent.run("When was it built?", memory=memory)
    ```

    With `documents`, every turn has the same documents. They are encoded together, in their order, and later turns
    reuse them exactly. With `memory`, a `MemoryCube` finds the documents for the last user message. They differ from
    turn to turn, so their caches are merged. A block is serialised without its cube: pass the cube again afterwards.

    The block's priority is 0, so `Memory` does not cut it to fit `token_limit`. Messages that leave the short-term
    memory do not enter the block.

    Raises:
        InvalidInputError: neither or both of `documents` and `memory` are given, or a document has no text.
    """

    name: str = Field(default="Documents", description="The name of the block.")
    accept_short_term_memory: bool = Field(default=False, description="Documents do not change with the conversation.")
    documents: list[str] | None = Field(
        default=None, description="The documents' texts, or nodes. A str is one document."
    )
    memory: SkipValidation[MemoryCube | None] = Field(
        default=None, exclude=True, description="The cube that finds the documents."
    )
    k: int | None = Field(default=None, description="The maximum number of documents from `memory`.")
    instruction: str = Field(
        default="Answer from the documents below.",
        description="Stands before the documents; may be empty. The default with `memory` is the cube's instruction.",
    )

    def __init__(self, **fields: Any) -> None:
        with checked_fields():
            super().__init__(**fields)

    @field_validator("documents", mode="before")
    @classmethod
    def _texts(cls, documents: Any) -> Any:
        return documents and [text_and_metadata(document)[0] for document in documents_of(documents)]

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.documents is None) == (self.memory is None):
            raise InvalidInputError("CAGMemoryBlock needs a source: pass either documents or memory, a MemoryCube")
        if self.memory is not None and self.memory.memory.instruction and "instruction" not in self.model_fields_set:
            self.instruction = self.memory.memory.instruction
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy with its own settings. The copy shares the cube."""
        return super().__deepcopy__({**(memo or {}), **({id(self.memory): self.memory} if self.memory else {})})

    def __reduce__(self) -> Any:
        if self.memory is not None:
            raise InvalidInputError("a CAGMemoryBlock with a cube cannot be pickled: make a new block from the cube")
        return super().__reduce__()

    async def _aget(self, messages: list[ChatMessage] | None = None, **block_kwargs: Any) -> list[ChatMessage]:
        texts = self.documents or []
        if self.memory is not None:
            texts = [text.memory for text in await self.memory.asearch(_asked(messages or []), self.k)]
        if not texts:
            return []
        opening = [TextBlock(text=f"{self.instruction}\n")] if self.instruction else []
        exact = self.memory is None or self.memory.strategy == "exact"
        return [ChatMessage(role=MessageRole.SYSTEM, blocks=[*opening, *document_blocks(texts, exact=exact)])]

    async def _aput(self, messages: list[ChatMessage]) -> None:
        """Does nothing: documents do not change with the conversation."""


def _asked(messages: Sequence[ChatMessage]) -> str:
    """The last user message."""
    return next((message.content or "" for message in reversed(messages) if message.role == MessageRole.USER), "")
