"""An engine's chunks as LlamaIndex's responses."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole

from kvcag.engines.base import Chunk, Usage


def usage_of(usage: Usage) -> dict[str, Any]:
    """Usage as `raw["usage"]` has it. `cached_tokens` and `created_tokens` are parts of `prompt_tokens`.

    `context` says how the documents were put together: `exact` or `merged`, and what was reused and recomputed.
    """
    return {**asdict(usage), "total_tokens": usage.prompt_tokens + usage.completion_tokens}


class Answer:
    """An answer as it grows.

    Args:
        model: what `raw["model"]` says.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self.text = ""

    def chat(self, chunk: Chunk) -> ChatResponse:
        """The answer up to and with this chunk; `raw` holds the usage in the last one."""
        self.text += chunk.text
        message = ChatMessage(role=MessageRole.ASSISTANT, content=self.text)
        return ChatResponse(message=message, delta=chunk.text, raw=self._raw(chunk))

    def completion(self, chunk: Chunk) -> CompletionResponse:
        """As `chat`."""
        self.text += chunk.text
        return CompletionResponse(text=self.text, delta=chunk.text, raw=self._raw(chunk))

    def _raw(self, chunk: Chunk) -> dict[str, Any] | None:
        if chunk.usage is None:
            return None
        return {"model": self._model, "finish_reason": chunk.finish_reason, "usage": usage_of(chunk.usage)}
