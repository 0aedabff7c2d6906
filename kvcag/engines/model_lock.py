"""The model for one thread at a time: answers in turn, and background work only while no answer needs it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from kvcag.streams import cancellation

_TURN_SECONDS = 0.05
"""How long an answer keeps the model before it lets others go first: a short pass is not cut into as many turns as a
long one has layers."""

_QUIET_SECONDS = 0.05
"""Background work goes on once no answer has used the model for so long, so that it does not come between two steps."""


class ModelLock:
    """Hands the model to one thread at a time, in the order in which they ask.

    Whoever holds the model calls `pause` between two layers, where it lets the others go first. So a long prefill
    delays another answer's step by one layer, and not by the whole prefill. Background work waits until no answer wants
    the model. A thread whose reader has left (`kvcag.streams.Cancellation`) stops waiting at once.
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

    @property
    def is_idle(self) -> bool:
        """Whether background work would get the model now."""
        with self._changed:
            return self._holder is None and not self._answers and self._quiet_for() <= 0

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
