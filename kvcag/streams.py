"""Blocking streams for asynchronous callers, and how a reader that leaves stops the work."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

_END = object()


async def in_thread(function: Callable[..., T], *given: Any, **named: Any) -> T:
    """`asyncio.to_thread`, where every error reaches the caller.

    Python before 3.12 cannot put a `StopIteration` into a future: whoever awaits it would wait for ever. It arrives as
    a `RuntimeError`, as from a generator.
    """
    return await asyncio.to_thread(_called, function, *given, **named)


def async_twin(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The asynchronous twin of a blocking method: it runs in a worker thread."""

    @functools.wraps(method)
    async def twin(*args: P.args, **kwargs: P.kwargs) -> T:
        return await in_thread(method, *args, **kwargs)

    twin.__doc__ = f"`{method.__name__}`, in a worker thread."
    return twin


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
    """`in_thread`, in a context that tells the step when nobody waits for it any more."""
    context = contextvars.copy_context()
    context.run(CANCELLATION.set, going)
    return await asyncio.get_running_loop().run_in_executor(None, context.run, _called, function, *given)


def _called(function: Callable[..., T], *given: Any, **named: Any) -> T:
    """What a function returns, or its error as one that a future can hold."""
    try:
        return function(*given, **named)
    except StopIteration as error:
        raise RuntimeError(f"{getattr(function, '__qualname__', function)} raised StopIteration") from error


def _close(step: asyncio.Task[object], stream: Generator[T, None, None]) -> None:
    """Close a stream whose reader has gone, and drop what the step ended with."""
    if not step.cancelled():
        step.exception()  # taken, or asyncio complains that nobody looked at it
    stream.close()


class Cancellation:
    """Told by the reader, from its own thread; heard by what waits."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self._wakers: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Wake everything that waits, now and from now on."""
        with self._lock:
            self._cancelled.set()
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()

    @property
    def cancelled(self) -> bool:
        """Whether the reader has gone."""
        return self._cancelled.is_set()

    def sleep(self, seconds: float) -> bool:
        """Sleep, unless or until the reader goes. Whether it has gone."""
        return self._cancelled.wait(seconds)

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """While this is open, going calls `wake`, from the reader's thread."""
        with self._lock:
            gone = self._cancelled.is_set()
            if not gone:
                self._wakers.append(wake)
        if gone:
            wake()
        try:
            yield
        finally:
            with self._lock:
                if wake in self._wakers:
                    self._wakers.remove(wake)


CANCELLATION: ContextVar[Cancellation | None] = ContextVar("kvcag_cancellation", default=None)
"""The one of the step that runs now; None where the reader waits itself."""


def cancellation() -> Cancellation:
    """The one of the step that runs now; where nobody can go, one that nobody cancels."""
    return CANCELLATION.get() or Cancellation()
