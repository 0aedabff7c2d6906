"""A RAG chain behind FastAPI, with streamed answers and eight clients at once."""

import asyncio
from collections.abc import AsyncIterator

import httpx
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate

from kvcag.langchain import create_cag_documents_chain
from tests.programs.models import tiny

DOCUMENTS = [Document("The library opens at nine."), Document("It is in Harbour Street.")]
prompt = ChatPromptTemplate.from_messages([("system", "Answer from:\n\n{context}"), ("human", "{input}")])
llm = tiny(max_tokens=12, merge_strategy="query", temperature=1.0)
app = FastAPI()


def pieces(question: str, seed: int) -> AsyncIterator[str]:
    chain = create_cag_documents_chain(llm.bind(seed=seed), prompt)
    return chain.astream({"context": DOCUMENTS, "input": question})


@app.get("/ask")
async def ask(question: str, seed: int) -> StreamingResponse:
    return StreamingResponse(pieces(question, seed), media_type="text/plain")


async def main() -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        asked = [{"question": f"When does it open on day {number}?", "seed": number} for number in range(8)]
        answers = await asyncio.gather(*(client.get("/ask", params=one) for one in asked))
        print([answer.status_code for answer in answers])
        alone = [(await client.get("/ask", params=one)).text for one in asked]
        print([answer.text for answer in answers] == alone, len(set(alone)), len(llm.memory()))


asyncio.run(main())
