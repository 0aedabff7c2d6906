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
llm = tiny(max_tokens=8)
chain = create_cag_documents_chain(llm, prompt)
app = FastAPI()


@app.get("/ask")
async def ask(question: str) -> StreamingResponse:
    async def pieces() -> AsyncIterator[str]:
        async for piece in chain.astream({"context": DOCUMENTS, "input": question}):
            yield piece

    return StreamingResponse(pieces(), media_type="text/plain")


async def main() -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        questions = [f"When does it open on day {number}?" for number in range(8)]
        answers = await asyncio.gather(*(client.get("/ask", params={"question": one}) for one in questions))
        print([answer.status_code for answer in answers])
        print(all(answer.text for answer in answers), len(llm.memory()))


asyncio.run(main())
