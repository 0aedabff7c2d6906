"""Contexts that are encoded in the background, one after another, in a thread that ends when there are none left."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeAlias

from kvcag.streams import CANCELLATION, Cancellation, Cancelled

_log = logging.getLogger(__name__)

Encode: TypeAlias = Callable[[tuple[int, ...], str], None]
"""Called as `encode(token_ids, namespace)`."""


class IdleWork:
    """A queue of contexts and the thread that works on it."""

    def __init__(self) -> None:
        self._queue: dict[tuple[str, tuple[int, ...]], Cancellation] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def encode(self, token_ids: tuple[int, ...], namespace: str, encode: Encode) -> None:
        """Have a context encoded, unless it waits for that already. Returns at once."""
        with self._lock:
            self._queue.setdefault((namespace, token_ids), Cancellation())
            if self._thread is None:
                thread = threading.Thread(target=self._work, args=(encode,), name="kvcag-idle", daemon=True)
                thread.start()
                self._thread = thread

    def cancel(self, namespace: str) -> None:
        """Drop a namespace's contexts; the one that is being encoded stops between two layers."""
        with self._lock:
            dropped = [work for work in self._queue if work[0] == namespace]
            cancelled = [self._queue.pop(work) for work in dropped]
        for one in cancelled:
            one.cancel()

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
            return None
