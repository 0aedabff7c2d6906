"""A chat service on 127.0.0.1, as one writes it with FastAPI, and clients that stay or leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from kvcag import KVCacheMemory
from tests.waits import until


def app_of(memory: KVCacheMemory, **settings: object) -> FastAPI:
    """`/ask` streams an answer, `/health` answers at once."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, bool]:
        return {"ok": True}

    @app.get("/ask")
    async def ask(question: str) -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            async for chunk in memory.astream(question, **settings):  # type: ignore[arg-type]
                yield chunk.text

        return StreamingResponse(pieces(), media_type="text/plain")

    return app


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app's address while its server runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none"))

    def serve() -> None:
        # Not `server.run`, which calls asyncio.run: nest_asyncio, that older LlamaIndex applies, breaks it in threads.
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(server.serve())
        finally:
            loop.close()

    thread = threading.Thread(target=serve, name="service")
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        assert server.started
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def asked(address: str, question: str, leave_after: int | None = None) -> str:
    """The answer, or what there was of it when the client disconnected after so many pieces."""
    text = ""
    with httpx.stream("GET", f"{address}/ask", params={"question": question}, timeout=120) as response:
        if leave_after == 0:
            return text
        for count, piece in enumerate(response.iter_text(), 1):
            text += piece
            if count == leave_after:
                break
    return text
