"""A workflow: steps that pass events, two of them ask the LLM."""

import asyncio

from llama_index.core.workflow import Event, StartEvent, StopEvent, Workflow, step

from kvcag.llama_index import KVCacheLLM
from kvcag.testing import EchoEngine


class JokeEvent(Event):
    joke: str


class JokeFlow(Workflow):
    llm = KVCacheLLM(engine=EchoEngine())

    @step
    async def generate_joke(self, ev: StartEvent) -> JokeEvent:
        return JokeEvent(joke=str(await self.llm.acomplete(f"Write your best joke about {ev.topic}.")))

    @step
    async def critique_joke(self, ev: JokeEvent) -> StopEvent:
        return StopEvent(result=str(await self.llm.acomplete(f"Criticise this joke: {ev.joke}")))


async def main() -> None:
    print(await JokeFlow(timeout=60, verbose=False).run(topic="pirates"))


asyncio.run(main())
