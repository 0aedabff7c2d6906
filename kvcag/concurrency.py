"""Threads around one model: readers that leave, answers that take turns, work while no question is answered."""

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
    """Call a function, and raise its error as one that a future can hold.

    Python before 3.12 cannot put a `StopIteration` into a future: its awaiter would wait for ever.
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
    """Tells the thread that works for a reader that the reader has left.

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


def at_once(calls: Sequence[Callable[[], T]], most: int) -> list[T]:
    """Make calls, `most` at a time, each in a thread with a copy of the caller's context, and return their results.

    The first error is raised, and cancels the other calls (`Cancellation`). They are also cancelled when the caller's
    reader leaves.
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
"""How long an answer keeps the model before it lets others go first: a short pass is not cut into as many turns as a
long one has layers."""

_QUIET_SECONDS = 0.05
"""Background work goes on once no answer has used the model for so long, so that it does not come between two steps."""


class ModelLock:
    """Hands the model to one thread at a time, in the order in which they ask.

    The holder of the model calls `pause` between two layers, where it lets the others go first. So a long prefill
    delays another answer's step by one layer, and not by the whole prefill. Background work waits until no answer wants
    the model. A thread whose reader has left (`Cancellation`) stops waiting at once.
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
        """The model for this thread alone. A thread that has it may acquire it again.

        Args:
            background: wait until no answer wants the model, and give it up between two layers when one does.

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
        """A question is on its way: background work pauses between two layers, for so long."""
        with self._changed:
            self._quiet_until = max(self._quiet_until, time.monotonic() + seconds)

    def pause(self) -> None:
        """Called between two layers: lets the threads that wait go first.

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
                return  # cancelled while it had paused
            if not self._holds_in_background:
                self._quiet_until = max(self._quiet_until, time.monotonic() + _QUIET_SECONDS)
            self._holder = None
            self._changed.notify_all()

    def _is_next(self, me: int, background: bool) -> bool:
        if not background:
            return self._answers[0] == me
        return not self._answers and self._background[0] == me and self._quiet_for() <= 0

    def _quiet_for(self) -> float:
        """Seconds until background work may go on."""
        return self._quiet_until - time.monotonic()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


_log = logging.getLogger(__name__)

Encode: TypeAlias = Callable[[tuple[int, ...], str], None]
"""Called as `encode(token_ids, namespace)`."""


_EXIT_SECONDS = 5.0
"""How long the process's end waits for one layer of the model."""

_MOST_WAITING = 64
"""Contexts that wait to be encoded. A model that is never idle must not collect them for ever."""


class IdleWork:
    """A queue of contexts and the thread that works on it. Of too many, the one that waits for longest is dropped.

    At exit the work stops between two layers: a thread that still computes while the interpreter goes aborts the
    process.
    """

    def __init__(self) -> None:
        self._queue: dict[tuple[str, tuple[int, ...]], Cancellation] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def encode(self, token_ids: tuple[int, ...], namespace: str, encode: Encode) -> None:
        """Have a context encoded, unless it waits for that already. Returns at once."""
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
        """Drop a namespace's contexts; the one that is being encoded stops between two layers."""
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
                if self._queue.get((namespace, token_ids)) is cancellation:  # else it was cancelled and asked for again
                    del self._queue[namespace, token_ids]

    def _next(self) -> tuple[tuple[str, tuple[int, ...]], Cancellation] | None:
        with self._lock:
            for work in self._queue.items():
                return work
            self._thread = None
            atexit.unregister(self._stop)
            return None
