"""How to stream chat model responses: https://docs.langchain.com/oss/python/langchain/models#stream."""

import asyncio

from tests.programs.models import echo

llm = echo()

for chunk in llm.stream("Why do parrots talk?"):
    print(chunk.text, end="|", flush=True)
print()

full = None
for chunk in llm.stream("What color is the sky?"):
    full = chunk if full is None else full + chunk
print(full.content, full.response_metadata["finish_reason"])
print({name: full.usage_metadata[name] for name in ("input_tokens", "output_tokens")})


async def events() -> None:
    kinds: list[str] = []
    async for event in llm.astream_events("Hello", version="v2"):
        if not kinds or kinds[-1] != event["event"]:
            kinds.append(event["event"])
    print(kinds)


asyncio.run(events())
