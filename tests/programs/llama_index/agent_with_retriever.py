"""An agent with tools and a retriever: what a tool retrieves is a block for each document, encoded once."""

import asyncio

from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.tools import FunctionTool

from kvcag.llama_index import CAGRetrieverTool, KVCacheLLM
from kvcag.testing import EchoEngine

documents = [
    Document(text="The library is in Harbour Street, next to the post office.", doc_id="place"),
    Document(text="The library opens at nine on weekdays and at ten on Saturdays.", doc_id="hours"),
]


def minutes(hours: int) -> int:
    """How many minutes some hours have."""
    return hours * 60


def answer(prompt: str) -> str:
    """Stands in for a model that calls one tool, then the other, and then says what they found."""
    if "540" in prompt:
        return "It opens 540 minutes after midnight."
    if "opens at nine" in prompt:
        return '{"name": "minutes", "arguments": {"hours":9}}'
    return '{"name": "library", "arguments": {"input":"When does it open?"}}'


async def main() -> None:
    index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(embed_dim=8))
    retriever = index.as_retriever(similarity_top_k=2)
    library = CAGRetrieverTool.from_defaults(retriever, name="library", description="Finds notes about the library.")
    llm = KVCacheLLM(engine=EchoEngine(answer))
    agent = FunctionAgent(tools=[library, FunctionTool.from_defaults(minutes)], llm=llm, system_prompt="Use the tools.")
    handler = agent.run("How many minutes after midnight does the library open?")
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            found = sorted(each.strip() for each in event.tool_output.content.split("\n\n"))
            print(event.tool_name, event.tool_kwargs, found)
    print(await handler)


asyncio.run(main())
