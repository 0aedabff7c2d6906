"""Sends preloaded contexts again after the server restarted."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvcag.concurrency import CANCELLATION, Cancellation
from kvcag.engines.vllm.client import HTTPClient
from kvcag.errors import KVCAGError, WarnOnce


class Preloads:
    """Remembers preloaded contexts, and sends them again after the server restarted.

    A restart is detected by the server's start time, which is read after the server was unreachable, or had fewer
    cached tokens of a context than expected. A temporary thread then sends the contexts one by one.

    Args:
        http: the server.
        send: sends a context of a namespace.
        restarted: called when the server was restarted.
        warnings: used if a context cannot be sent again.
    """

    MOST = 1024
    """The most contexts that are remembered; the least recently used are dropped first."""
    SHORTFALL = 512
    """More missing tokens than this are a sign of a restart. Fewer are normal, since a server caches whole blocks."""
    CLOSING_SECONDS = 5.0
    """How long `close` waits for the thread. Connecting, and waiting for response headers, cannot be interrupted."""

    def __init__(
        self,
        http: HTTPClient,
        send: Callable[[Sequence[int], str], object],
        restarted: Callable[[], None],
        warnings: WarnOnce,
    ) -> None:
        self._http, self._send, self._restarted, self._warnings = http, send, restarted, warnings
        self._sent: OrderedDict[tuple[str, bytes], None] = OrderedDict()  # the least recently used first
        self._start_times: set[float] = set()  # of every process seen, since one address may have several
        self._interruptions = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = Cancellation()

    def add(self, token_ids: Sequence[int], namespace: str) -> None:
        """Remember a context that was sent to the server."""
        if not self._start_times and (started := self._http.start_time()):
            self._start_times.add(started)
        with self._lock:
            key = (namespace, _packed(token_ids))
            self._sent[key] = None
            self._sent.move_to_end(key)
            if len(self._sent) > self.MOST:
                self._sent.popitem(last=False)

    def forget(self, namespace: str) -> None:
        """Drop the contexts of a namespace, so that they are not sent again."""
        with self._lock:
            for key in [key for key in self._sent if key[0] == namespace]:
                del self._sent[key]

    def longest(self, token_ids: Sequence[int], namespace: str) -> int:
        """Return the length of the longest remembered context that a prompt begins with."""
        packed = _packed(token_ids)
        with self._lock:
            found = [key for key in self._sent if key[0] == namespace and packed.startswith(key[1])]
            for key in found:
                self._sent.move_to_end(key)
        return max((len(context) for _, context in found), default=0) // array("I").itemsize

    def check(self, token_ids: Sequence[int], namespace: str, cached: int | None) -> None:
        """After an answer, look for signs of a restart; send all contexts again if there was one.

        Args:
            token_ids: the prompt.
            namespace: the prompt's namespace.
            cached: how many of its tokens the server had cached; None if the server does not report it.
        """
        interrupted = self._http.interruptions != self._interruptions
        self._interruptions = self._http.interruptions
        short = cached is not None and self.longest(token_ids, namespace) - cached > self.SHORTFALL
        with self._lock:
            if not (interrupted or short) or self._closing.cancelled or not self._sent or self._thread is not None:
                return
            thread = threading.Thread(target=self._resend, args=(interrupted,), name="kvcag-preloads", daemon=True)
            thread.start()  # before `_thread` is set: if it cannot start, the next answer tries again
            self._thread = thread

    def close(self) -> None:
        """Stop sending, and wait a few seconds for the thread."""
        self._closing.cancel()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(self.CLOSING_SECONDS)

    def _resend(self, interrupted: bool) -> None:
        CANCELLATION.set(self._closing)  # in this thread only
        try:
            if not self._was_restarted(interrupted):
                return
            self._restarted()
            with self._lock:
                contexts = list(reversed(self._sent))
            for namespace, packed in contexts:
                if self._closing.cancelled:
                    return
                self._send(array("I", packed).tolist(), namespace)
        except KVCAGError as failed:
            if not self._closing.cancelled:
                with suppress(Warning):  # if warnings are errors, no caller could catch one
                    self._warnings.once(f"a context could not be sent again after a restart: {failed}")
        finally:
            with self._lock:
                self._thread = None

    def _was_restarted(self, interrupted: bool) -> bool:
        """Whether the server was restarted. Without a start time, every interruption counts as a restart."""
        started = self._http.start_time()
        if started is None:
            return interrupted
        known = started in self._start_times
        self._start_times.add(started)
        return not known


def _packed(token_ids: Sequence[int]) -> bytes:
    return array("I", token_ids).tobytes()
