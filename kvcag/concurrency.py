"""Threads around one model: cancellation, answers that take turns at the model, and work while the model is idle."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, ParamSpec, TypeAlias, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

_END = object()


async def in_thread(function: Callable[..., T], *given: Any, **named: Any) -> T:
    """Call a blocking function in a new thread, and wait for its result without blocking the event loop.

    Cancelling the caller cancels the function (`Cancellation`), also while the function waits for the model.
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
    """Return the asynchronous twin of a blocking method. It runs the method, or its override, in a worker thread."""

    @functools.wraps(method, updated=())  # not `__dict__`, which would make the twin of an abstract method abstract
    async def twin(*args: P.args, **kwargs: P.kwargs) -> T:
        owner, *rest = args
        result: T = await in_thread(getattr(owner, method.__name__), *rest, **kwargs)
        return result

    twin.__doc__ = f"`{method.__name__}`, in a worker thread."
    return twin


async def iterate(open_stream: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
    """Open a stream and read it in a new thread, which ends with the stream.

    Closing or cancelling stops the work between two layers of the model, or at once while the work waits for the model
    or for a server.
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
    """One thread, which ends after its work, with a `Cancellation` for that work.

    The event loop's default executor does not serve: with many clients, all of its few threads would wait for the
    model.
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
    """Call a function, and turn a `StopIteration` into a `RuntimeError`.

    Before Python 3.12, a future cannot hold a `StopIteration`, and its awaiter would wait for ever.
    """
    try:
        return function(*given, **named)
    except StopIteration as error:
        raise RuntimeError(f"{getattr(function, '__qualname__', function)} raised StopIteration") from error


def _close(step: asyncio.Future[Any], stream: Iterator[Any] | None) -> None:
    """Close a stream whose reader has left, and ignore the result or the error of its last step."""
    if not step.cancelled() and step.exception() is None and stream is None:
        stream = step.result()
    if isinstance(stream, Generator):
        stream.close()


class Cancelled(Exception):  # noqa: N818 - a signal; nothing went wrong
    """Raised in the thread that works on an answer after the answer's reader has left."""


class Cancellation:
    """Tells the thread that works on an answer that the answer's reader has left.

    A generator can be closed only between two steps, and a step may take long. So the reader's thread puts a
    `Cancellation` into the context in which the steps run.
    """

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self._wakers: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Cancel the work, and wake every thread that waits. Called by the reader's thread."""
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
        """Sleep for `seconds`, or until the reader leaves. Returns whether the reader has left."""
        return self._cancelled.wait(seconds)

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Within the block, `cancel` calls `wake` in the reader's thread. Calls it at once if the reader has left."""
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
"""The cancellation of the current step; None if the step runs in the reader's own thread."""


def cancellation() -> Cancellation:
    """Return the current step's cancellation, or one that never fires."""
    return CANCELLATION.get() or Cancellation()


@contextmanager
def holding(lock: threading.Lock) -> Iterator[None]:
    """Hold a lock. Unlike `with lock`, waiting for it stops when the reader leaves.

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


def at_once(calls: Sequence[Callable[[], T]], most: int) -> list[T]:
    """Make calls, at most `most` at a time, each in a thread with a copy of the caller's context; return their results.

    The first error is raised, and cancels the other calls (`Cancellation`). All are cancelled when the caller's reader
    leaves.
    """
    left = Cancellation()

    def run(context: contextvars.Context, call: Callable[[], T]) -> T:
        context.run(CANCELLATION.set, left)
        return context.run(call)

    with cancellation().waking(left.cancel), ThreadPoolExecutor(most, thread_name_prefix="kvcag") as threads:
        running = [threads.submit(run, contextvars.copy_context(), call) for call in calls]
        try:
            failed = [done for done in wait(running, return_when=FIRST_EXCEPTION).done if done.exception()]
            return [done.result() for done in failed or running]
        finally:
            left.cancel()
            threads.shutdown(cancel_futures=True)


_TURN_SECONDS = 0.05
"""How long an answer keeps the model before it lets others go first, so that short passes are not interrupted."""

_QUIET_SECONDS = 0.05
"""Background work waits until no answer used the model for this time, so that it does not run between two steps."""


class ModelLock:
    """Gives the model to one thread at a time, first come, first served.

    The thread that holds the model calls `pause` between two layers, and lets waiting threads go first there. So a long
    prefill delays another answer's step by about one layer, not by the whole prefill. Background work waits until no
    answer wants the model. A thread whose reader has left (`Cancellation`) stops waiting at once.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answers: deque[int] = deque()  # the threads that wait, in order
        self._background: deque[int] = deque()
        self._holder: int | None = None
        self._holds_in_background = False
        self._held_since = 0.0
        self._quiet_until = float("-inf")

    @contextmanager
    def acquire(self, *, background: bool = False) -> Iterator[None]:
        """Within the block, only this thread uses the model. A thread that holds the model may acquire it again.

        Args:
            background: wait until no answer wants the model, and give it up between two layers when an answer does.

        Raises:
            Cancelled: the reader left while this thread waited.
        """
        if self._holder == threading.get_ident():
            yield
            return
        self._enter(background)
        try:
            yield
        finally:
            self._leave()

    def announce(self, seconds: float) -> None:
        """Let background work pause between two layers for `seconds`, because a question is about to need the model."""
        with self._changed:
            self._quiet_until = max(self._quiet_until, time.monotonic() + seconds)

    def pause(self) -> None:
        """Let waiting threads go first. Called between two layers.

        Raises:
            Cancelled: the reader of this thread's answer left.
        """
        cancellation().check()
        waiting = self._answers or (self._holds_in_background and (self._background or self._quiet_for() > 0))
        long_enough = self._holds_in_background or time.monotonic() - self._held_since >= _TURN_SECONDS
        if waiting and long_enough and self._holder == threading.get_ident():
            background = self._holds_in_background
            self._leave()
            self._enter(background)

    def _enter(self, background: bool) -> None:
        me, queue = threading.get_ident(), self._background if background else self._answers
        left = cancellation()
        with self._changed, left.waking(self._wake):
            queue.append(me)
            try:
                while self._holder is not None or not self._is_next(me, background):
                    left.check()
                    self._changed.wait(max(self._quiet_for(), 0.001) if background and self._holder is None else None)
                left.check()
                self._holder, self._holds_in_background = me, background
                self._held_since = time.monotonic()
            finally:
                queue.remove(me)
                self._changed.notify_all()

    def _leave(self) -> None:
        with self._changed:
            if self._holder != threading.get_ident():
                return  # this thread was cancelled in `pause`, when it did not hold the model
            if not self._holds_in_background:
                self._quiet_until = max(self._quiet_until, time.monotonic() + _QUIET_SECONDS)
            self._holder = None
            self._changed.notify_all()

    def _is_next(self, me: int, background: bool) -> bool:
        if not background:
            return self._answers[0] == me
        return not self._answers and self._background[0] == me and self._quiet_for() <= 0

    def _quiet_for(self) -> float:
        """Return the seconds until background work may continue; negative if it may now."""
        return self._quiet_until - time.monotonic()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


_log = logging.getLogger(__name__)

Encode: TypeAlias = Callable[[tuple[int, ...], str], None]
"""Called as `encode(token_ids, namespace)`."""


_EXIT_SECONDS = 5.0
"""How long the exit of the process waits for the idle thread, which stops after the current layer."""

_MOST_WAITING = 64
"""The most contexts in the queue, so that the queue of a model that is never idle does not grow for ever."""


class IdleWork:
    """A queue of contexts, and the thread that encodes them. A full queue drops the context that waits longest.

    At exit the work stops between two layers, because a thread that computes while the interpreter shuts down aborts
    the process.
    """

    def __init__(self) -> None:
        self._queue: dict[tuple[str, tuple[int, ...]], Cancellation] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def encode(self, token_ids: tuple[int, ...], namespace: str, encode: Encode) -> None:
        """Add a context to the queue, unless it is there already. Returns at once."""
        with self._lock:
            self._queue.setdefault((namespace, token_ids), Cancellation())
            if len(self._queue) > _MOST_WAITING + 1:
                del self._queue[next(islice(self._queue, 1, None))]  # the first one is being encoded
            if self._thread is None:
                thread = threading.Thread(target=self._work, args=(encode,), name="kvcag-idle", daemon=True)
                thread.start()
                self._thread = thread
                atexit.register(self._stop)

    def cancel(self, namespace: str | None) -> None:
        """Drop the contexts of a namespace; None means all. The one that is being encoded stops between two layers."""
        with self._lock:
            dropped = [work for work in self._queue if namespace in (None, work[0])]
            cancelled = [self._queue.pop(work) for work in dropped]
        for one in cancelled:
            one.cancel()

    def _stop(self) -> None:
        thread = self._thread
        self.cancel(None)
        if thread is not None:
            thread.join(_EXIT_SECONDS)

    def _work(self, encode: Encode) -> None:
        while (work := self._next()) is not None:
            (namespace, token_ids), cancellation = work
            CANCELLATION.set(cancellation)
            try:
                encode(token_ids, namespace)
            except Cancelled:
                pass
            except Exception:  # the boundary: no caller waits for this work, so the error goes to the log
                _log.warning("a context could not be encoded in the background", exc_info=True)
            with self._lock:
                if self._queue.get((namespace, token_ids)) is cancellation:  # else it was cancelled and queued again
                    del self._queue[namespace, token_ids]

    def _next(self) -> tuple[tuple[str, tuple[int, ...]], Cancellation] | None:
        with self._lock:
            for work in self._queue.items():
                return work
            self._thread = None
            atexit.unregister(self._stop)
            return None
