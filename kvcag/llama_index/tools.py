"""LlamaIndex's tools, for `kvcag.tools`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatResponse, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool

from kvcag.errors import InvalidInputError


def tool_specs(tools: Sequence[BaseTool]) -> list[dict[str, Any]]:
    """The tools' specifications, as JSON, so that events that carry them can be serialised."""
    return [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools]


def choice_of(tool_choice: str | Mapping[str, Any] | None, required: bool) -> str:
    """The choice as `tool_spec` takes it: `auto`, `any`, `none`, or a tool's name.

    Args:
        tool_choice: one of these, `required`, or OpenAI's `{"type": "function", "function": {"name": …}}`.
        required: a tool must be called, whichever it is.

    Raises:
        InvalidInputError: a mapping without a tool's name.
    """
    if isinstance(tool_choice, Mapping):
        chosen = tool_choice
        tool_choice = str(chosen.get("function", chosen).get("name", ""))
        if not tool_choice:
            raise InvalidInputError(
                f"tool_choice {dict(chosen)!r:.80} has no tool's name. Pass {{'function': {{'name': …}}}}, or the name."
            )
    if required and tool_choice in (None, "auto"):
        return "any"
    return tool_choice or "auto"


def selections(response: ChatResponse) -> list[ToolSelection]:
    """The calls in a response."""
    return [
        ToolSelection(tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=_arguments(block))
        for block in response.message.blocks
        if isinstance(block, ToolCallBlock)
    ]


def _arguments(call: ToolCallBlock) -> dict[str, Any]:
    return call.tool_kwargs if isinstance(call.tool_kwargs, dict) else dict(json.loads(call.tool_kwargs))
