"""A blocking stream for asynchronous callers: the event loop keeps ticking while the model works."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import TypeVar

T = TypeVar("T")

_END = object()


async def iterate(open_stream: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
    """Open a stream and read it, each step in a worker thread.

    Closing or cancelling stops the stream after the step that is running; no thread outlives it.
    """
    stream = await asyncio.to_thread(open_stream)
    step: asyncio.Task[object] | None = None
    try:
        while True:
            step = asyncio.create_task(asyncio.to_thread(next, stream, _END))
            piece = await asyncio.shield(step)
            if piece is _END:
                return
            yield piece  # type: ignore[misc]
    finally:
        if isinstance(stream, Generator):
            if step is None or step.done():
                stream.close()
            else:  # cancelled while the model was working: close it once the step has ended
                step.add_done_callback(lambda done: _close(done, stream))


def _close(step: asyncio.Task[object], stream: Generator[T, None, None]) -> None:
    """Close a stream whose reader has gone, and drop what the step ended with."""
    if not step.cancelled():
        step.exception()  # taken, or asyncio complains that nobody looked at it
    stream.close()
