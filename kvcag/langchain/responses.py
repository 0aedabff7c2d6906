"""What an engine gives back, as LangChain's chunks."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import ToolCallChunk, tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from kvcag.core import Chunk, Usage
from kvcag.tools import Parsed, ToolSpec


def generation_chunks(
    chunks: Generator[Chunk, None, None], model_name: str, plan: ToolSpec | None = None, *, json_answer: bool = False
) -> Generator[ChatGenerationChunk, None, None]:
    """An answer in pieces. The last one alone says why it ended, what it took, which model it was and what it calls.

    Args:
        chunks: the engine's; closed with this generator.
        model_name: for the metadata.
        plan: the tools that the answer may call.
        json_answer: where no tool is called, the answer is JSON and no broken call.
    """
    parser = plan.parser() if plan else None
    written = shown = ""
    with closing(chunks):
        for chunk in chunks:
            text = parser.push(chunk.text) if parser else chunk.text
            written, shown = written + chunk.text, shown + text
            if chunk.usage is None:
                # Also where the text is held back: between two steps, whoever reads can stop the model.
                yield ChatGenerationChunk(message=AIMessageChunk(content=text))
                continue
            calls: list[ToolCallChunk] = []
            if parser:
                parsed = parser.close()
                if json_answer and not parsed.calls:
                    text += written[len(shown) :]
                else:
                    text += parser.rest
                    calls = _call_chunks(parsed, first=int(bool(shown + text)))
            yield ChatGenerationChunk(message=_last(chunk, chunk.usage, text, calls, model_name))


def _last(chunk: Chunk, usage: Usage, text: str, calls: list[ToolCallChunk], model_name: str) -> AIMessageChunk:
    return AIMessageChunk(
        content=text,
        tool_call_chunks=calls,
        usage_metadata=_usage_metadata(usage),
        response_metadata={
            "model_name": model_name,
            "model_provider": "kvcag",
            "finish_reason": "tool_calls" if calls and chunk.finish_reason == "stop" else chunk.finish_reason,
            "kvcag": _report(usage),
        },
        chunk_position="last",
    )


def _call_chunks(parsed: Parsed, first: int) -> list[ToolCallChunk]:
    """Calls, and broken ones. LangChain completes JSON that was cut, so what says why it is broken stands before it."""
    written = [(call.name, json.dumps(call.arguments, ensure_ascii=False), call.id) for call in parsed.calls]
    written += [(call.name or "", f"{call.error}: {call.text}", call.id) for call in parsed.invalid_calls]
    return [
        tool_call_chunk(name=name, args=args, id=id, index=index)
        for index, (name, args, id) in enumerate(written, start=first)
    ]


def _usage_metadata(usage: Usage) -> UsageMetadata:
    """`input_tokens` is the whole logical prompt, warm or cold."""
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "input_token_details": {"cache_read": usage.cached_tokens, "cache_creation": usage.created_tokens},
    }


def _report(usage: Usage) -> dict[str, Any]:
    """How the answer was made: counts, names and seconds, nothing that a trace should not carry."""
    made = asdict(usage.context) if usage.context else {"mode": "prefix" if usage.cached_tokens else "encoded"}
    return {**made, "ttft_s": usage.ttft_s, "total_s": usage.total_s}
