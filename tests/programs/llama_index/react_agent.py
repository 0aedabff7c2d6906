"""ReActAgent: a model that writes its steps as text."""

import asyncio

from llama_index.core.agent.workflow import ReActAgent

from kvcag.llama_index import KVCacheLLM
from kvcag.testing import EchoEngine


def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


steps = iter(
    [
        'Thought: I need a tool.\nAction: multiply\nAction Input: {"a": 20, "b": 4}\n',
        "Thought: I can answer without using any more tools.\nAnswer: 80\n",
    ]
)


async def main() -> None:
    llm = KVCacheLLM(engine=EchoEngine(lambda prompt: next(steps)))
    print(await ReActAgent(tools=[multiply], llm=llm).run("What is 20 * 4?"))
    print("the second step read", "Observation: 80" in str(llm.engine.tokenizer.decode(llm.engine.prompts[-1][1])))


asyncio.run(main())
