"""How whoever waits for a stream in a worker thread learns that its reader has gone.

A generator can be closed only between two steps, and a step over a network may wait for long. So the reader leaves a
`Cancellation` in the context in which the steps run, and what waits says how it can be woken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


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
