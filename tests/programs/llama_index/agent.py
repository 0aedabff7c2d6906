"""An agent with a tool: FunctionAgent calls it, and the model reads the result."""

import asyncio
import json

from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult

from kvcag.llama_index import KVCacheLLM
from kvcag.testing import EchoEngine, last_user_message


def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


def answer(prompt: str) -> str:
    """Stands in for a model that calls a tool, and then says what the tool said."""
    if "result" in prompt:
        return f"It is {json.loads(last_user_message(prompt))['result']}."
    return '{"name": "multiply", "arguments": {"a":1234,"b":4567}}'


async def main() -> None:
    agent = FunctionAgent(
        tools=[multiply],
        llm=KVCacheLLM(engine=EchoEngine(answer)),
        system_prompt="You are a helpful assistant that can multiply two numbers.",
    )
    handler = agent.run("What is 1234 * 4567?")
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            print(event.tool_name, event.tool_kwargs, event.tool_output)
    print(await handler)


asyncio.run(main())
