"""CAGMemoryBlock: an agent's documents, as a part of its memory that is encoded once."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock
from llama_index.core.memory import BaseMemoryBlock
from llama_index.core.schema import BaseNode, MetadataMode
from pydantic import Field, field_validator

from kvcag.llama_index.messages import document_blocks


class CAGMemoryBlock(BaseMemoryBlock[list[ChatMessage]]):
    """Puts documents before the conversation, as a system message in which each is a segment of its own.

    ```python
    memory = Memory.from_defaults(memory_blocks=[CAGMemoryBlock(documents=documents)])
    await agent.run("When was it built?", memory=memory)
    ```

    Its priority is 0, so `Memory` never cuts it, whatever `token_limit` says; messages that leave the short-term memory
    do not enter it.
    """

    name: str = Field(default="Documents", description="The name of the block.")
    accept_short_term_memory: bool = Field(default=False, description="Documents do not change with the conversation.")
    documents: list[str] = Field(description="The documents' texts; nodes are taken as the LLM would read them.")
    instruction: str = Field(
        default="Answer from the documents below.", description="Stands before the documents; may be empty."
    )

    @field_validator("documents", mode="before")
    @classmethod
    def _texts(cls, documents: Any) -> Any:
        return [
            document.get_content(metadata_mode=MetadataMode.LLM) if isinstance(document, BaseNode) else document
            for document in documents
        ]

    async def _aget(self, messages: list[ChatMessage] | None = None, **block_kwargs: Any) -> list[ChatMessage]:
        if not self.documents:
            return []
        opening = [TextBlock(text=f"{self.instruction}\n")] if self.instruction else []
        return [ChatMessage(role=MessageRole.SYSTEM, blocks=[*opening, *document_blocks(self.documents)])]

    async def _aput(self, messages: list[ChatMessage]) -> None:
        """Documents do not change with the conversation."""
