"""Blocking calls and streams for asynchronous callers: the event loop keeps ticking while the model works."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Any, TypeVar

from kvcag.engines.waiting import CANCELLATION, Cancellation

T = TypeVar("T")

_END = object()


async def in_thread(function: Callable[..., T], *given: Any, **named: Any) -> T:
    """`asyncio.to_thread`, where every error reaches the caller.

    Python before 3.12 cannot put a `StopIteration` into a future: whoever awaits it would wait for ever. It arrives as
    a `RuntimeError`, as from a generator.
    """
    return await asyncio.to_thread(_called, function, *given, **named)


async def iterate(open_stream: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
    """Open a stream and read it, each step in a worker thread.

    Closing or cancelling stops the stream after the step that is running, and a step that waits for a server stops
    waiting; no thread outlives it.
    """
    going = Cancellation()
    try:
        stream = await _step(going, open_stream)
    except asyncio.CancelledError:
        going.cancel()
        raise
    step: asyncio.Task[object] | None = None
    try:
        while True:
            step = asyncio.create_task(_step(going, next, stream, _END))
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
                going.cancel()


async def _step(going: Cancellation, function: Callable[..., Any], *given: Any) -> Any:
    """`in_thread`, in a context that says how it learns that nobody waits for it any more."""
    context = contextvars.copy_context()
    context.run(CANCELLATION.set, going)
    return await asyncio.get_running_loop().run_in_executor(None, context.run, _called, function, *given)


def _called(function: Callable[..., T], *given: Any, **named: Any) -> T:
    """What a function gives, or its error as one that a future can hold."""
    try:
        return function(*given, **named)
    except StopIteration as error:
        raise RuntimeError(f"{getattr(function, '__qualname__', function)} raised StopIteration") from error


def _close(step: asyncio.Task[object], stream: Generator[T, None, None]) -> None:
    """Close a stream whose reader has gone, and drop what the step ended with."""
    if not step.cancelled():
        step.exception()  # taken, or asyncio complains that nobody looked at it
    stream.close()
