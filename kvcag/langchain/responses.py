"""What an engine gives back, as LangChain's chunks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk

from kvcag.engines.base import Chunk, Usage


def generation_chunk(chunk: Chunk, model_name: str) -> ChatGenerationChunk:
    """A piece of an answer. The last one alone says why it ended, what it took and which model it was."""
    if chunk.usage is None:
        return ChatGenerationChunk(message=AIMessageChunk(content=chunk.text))
    message = AIMessageChunk(
        content=chunk.text,
        usage_metadata=_usage_metadata(chunk.usage),
        response_metadata={
            "model_name": model_name,
            "model_provider": "kvcag",
            "finish_reason": chunk.finish_reason,
            "kvcag": _report(chunk.usage),
        },
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message)


def _usage_metadata(usage: Usage) -> UsageMetadata:
    """`input_tokens` is the whole logical prompt, warm or cold."""
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens, cache_creation=usage.created_tokens),
    )


def _report(usage: Usage) -> dict[str, Any]:
    """How the answer was made: counts, names and seconds, nothing that a trace should not carry."""
    made = asdict(usage.context) if usage.context else {"mode": "exact" if usage.cached_tokens else "encoded"}
    return {**made, "ttft_s": usage.ttft_s, "total_s": usage.total_s}
