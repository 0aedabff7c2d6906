"""Blocking streams for asynchronous callers, and how a reader that leaves stops the work."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

_END = object()


async def in_thread(function: Callable[..., T], *given: Any, **named: Any) -> T:
    """Call a blocking function in a thread of its own, and wait for it without blocking the event loop.

    Cancelling the caller cancels the work (`Cancellation`), also while it waits for the model.
    """
    worker = _Worker()
    try:
        return await worker.run(function, *given, **named)  # type: ignore[no-any-return]
    except asyncio.CancelledError:
        worker.left.cancel()
        raise
    finally:
        worker.close()


def async_twin(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The asynchronous twin of a blocking method. It runs the method (or its override) in a worker thread."""

    @functools.wraps(method, updated=())  # without `__dict__`: an abstract method's twin is not abstract
    async def twin(*args: P.args, **kwargs: P.kwargs) -> T:
        owner, *rest = args
        result: T = await in_thread(getattr(owner, method.__name__), *rest, **kwargs)
        return result

    twin.__doc__ = f"`{method.__name__}`, in a worker thread."
    return twin


async def iterate(open_stream: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
    """Open a stream and read it in a thread of its own.

    Closing or cancelling stops the work: between two layers of the model, or at once while it waits for the model or
    for a server. No thread outlives it.
    """
    worker = _Worker()
    step: asyncio.Future[Any] | None = None
    stream: Iterator[T] | None = None
    try:
        step = worker.run(open_stream)
        stream = await asyncio.shield(step)
        while True:
            step = worker.run(next, stream, _END)
            piece = await asyncio.shield(step)
            if piece is _END:
                return
            yield piece
    finally:
        if step is not None and not step.done():  # the reader left while the model worked
            worker.left.cancel()
            step.add_done_callback(lambda done: _close(done, stream))
        elif isinstance(stream, Generator):
            stream.close()
        worker.close()


class _Worker:
    """One thread, which ends when its work is done, and the way to cancel that work.

    Not the event loop's own executor: its few threads would all wait for the model where many clients ask at once.
    """

    def __init__(self) -> None:
        self.left = Cancellation()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kvcag")

    def run(self, function: Callable[..., Any], *given: Any, **named: Any) -> asyncio.Future[Any]:
        """Call a function in the thread, in a copy of the caller's context that carries the cancellation."""
        context = contextvars.copy_context()
        context.run(CANCELLATION.set, self.left)
        call = functools.partial(context.run, _called, function, *given, **named)
        return asyncio.get_running_loop().run_in_executor(self._executor, call)

    def close(self) -> None:
        self._executor.shutdown(wait=False)


def _called(function: Callable[..., T], *given: Any, **named: Any) -> T:
    """What a function returns, or its error as one that a future can hold.

    Python before 3.12 cannot put a `StopIteration` into a future: whoever awaits it would wait for ever.
    """
    try:
        return function(*given, **named)
    except StopIteration as error:
        raise RuntimeError(f"{getattr(function, '__qualname__', function)} raised StopIteration") from error


def _close(step: asyncio.Future[Any], stream: Iterator[Any] | None) -> None:
    """Close a stream whose reader has left, and drop what its last step ended with."""
    if not step.cancelled() and step.exception() is None and stream is None:
        stream = step.result()
    if isinstance(stream, Generator):
        stream.close()


class Cancelled(Exception):  # noqa: N818 - a signal; nothing went wrong
    """The reader of an answer left: the work for it stops."""


class Cancellation:
    """How the thread that works for a reader learns that the reader has left.

    A generator can be closed only between two steps, and a step may take long. So the reader's thread leaves a
    `Cancellation` in the context in which the steps run.
    """

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self._wakers: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Called by the reader: wakes everything that waits, now and from now on."""
        with self._lock:
            self._cancelled.set()
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()

    @property
    def cancelled(self) -> bool:
        """Whether the reader has left."""
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raise `Cancelled` if the reader has left."""
        if self._cancelled.is_set():
            raise Cancelled

    def sleep(self, seconds: float) -> bool:
        """Sleep until the time is over or the reader leaves. Returns whether the reader has left."""
        return self._cancelled.wait(seconds)

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """While this is open, `cancel` calls `wake`, from the reader's thread."""
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
"""The current step's; None where the reader itself waits."""


def cancellation() -> Cancellation:
    """The current step's cancellation, or one that never fires."""
    return CANCELLATION.get() or Cancellation()


@contextmanager
def holding(lock: threading.Lock) -> Iterator[None]:
    """Hold a lock that another answer may hold for long.

    Raises:
        Cancelled: the reader left while this thread waited.
    """
    left = cancellation()
    while not lock.acquire(timeout=_POLL_SECONDS):
        left.check()
    try:
        yield
    finally:
        lock.release()


_POLL_SECONDS = 0.02
