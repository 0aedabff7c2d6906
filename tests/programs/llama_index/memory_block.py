"""An agent's memory with a block of documents before the conversation."""

import asyncio

from llama_index.core import Document
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.memory import Memory

from kvcag.llama_index import CAGMemoryBlock, KVCacheLLM
from kvcag.testing import EchoEngine, whole_prompt

documents = [
    Document(text="The library is in Harbour Street, next to the post office.", doc_id="place"),
    Document(text="The library opens at nine on weekdays and at ten on Saturdays.", doc_id="hours"),
]


async def main() -> None:
    memory = Memory.from_defaults(session_id="one", token_limit=60, memory_blocks=[CAGMemoryBlock(documents=documents)])
    agent = FunctionAgent(llm=KVCacheLLM(engine=EchoEngine(whole_prompt)), system_prompt="You know the library.")
    response = await agent.run("When does it open?", memory=memory)
    print(response)
    print([message.role.value for message in await memory.aget()])


asyncio.run(main())
