"""Whose turn it is at the model: one caller at a time, and answers before whatever works ahead of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_POLL_SECONDS = 0.1
_SHORTEST_POLL_SECONDS = 0.005


class Interrupted(Exception):  # noqa: N818 - a signal, and nothing went wrong
    """Somebody wants the model: work that can wait steps aside."""


class ModelLock:
    """Hands the model to one thread at a time.

    Answers take it with `acquire`, in the order in which they come. Work that can wait takes it with `idle`: only once
    nobody has wanted it for a while, and it gives it back between two layers when somebody does.
    """

    def __init__(self) -> None:
        self._model = threading.RLock()
        self._counting = threading.Lock()
        self._wanted = 0
        self._last_wanted = float("-inf")
        self._idle_owner: int | None = None
        self._idle_since = float("-inf")
        self._stop: threading.Event | None = None

    @contextmanager
    def acquire(self) -> Iterator[None]:
        """The model for this thread alone. It may be taken again within."""
        if self._idle_owner == threading.get_ident():
            yield
            return
        with self._counting:
            self._wanted += 1
        try:
            with self._model:
                yield
        finally:
            with self._counting:
                self._wanted -= 1
                self._last_wanted = time.monotonic()

    def announce(self) -> None:
        """A question is on its way: what can wait shall step aside now, before the question reaches the model."""
        with self._counting:
            self._last_wanted = time.monotonic()

    @contextmanager
    def idle(
        self, quiet_s: float, stop: threading.Event, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """The model for work that can wait, once nobody has wanted it for `quiet_s` seconds.

        The work calls `step_aside` as often as it can. `meanwhile` is called now and then while it waits.

        Raises:
            Interrupted: `stop` is set.
        """
        self._await_quiet(quiet_s, stop, meanwhile)
        self._idle_owner, self._stop = threading.get_ident(), stop
        try:
            yield
        finally:
            self._idle_owner = self._stop = None
            self._model.release()

    def step_aside(self) -> None:
        """Called by whoever has the model to spare; elsewhere it does nothing.

        Raises:
            Interrupted: somebody wants the model, or the work shall stop.
        """
        if self._idle_owner != threading.get_ident():
            return
        if self._wanted or self._last_wanted > self._idle_since or (self._stop is not None and self._stop.is_set()):
            raise Interrupted

    def _await_quiet(self, quiet_s: float, stop: threading.Event, meanwhile: Callable[[], None] | None) -> None:
        """Return holding the model."""
        while not stop.is_set():
            with self._counting:
                now = time.monotonic()
                left = self._last_wanted + quiet_s - now
                if not self._wanted and left <= 0 and self._model.acquire(blocking=False):
                    self._idle_since = now
                    return
            stop.wait(min(max(left, _SHORTEST_POLL_SECONDS), _POLL_SECONDS))
            if meanwhile is not None:
                meanwhile()
        raise Interrupted
