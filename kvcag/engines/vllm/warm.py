"""What a server was sent ahead of the questions, and sending it again when the server has forgotten."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvcag.engines.vllm.client import HTTPClient
from kvcag.errors import KVCAGError, WarnOnce
from kvcag.streams import CANCELLATION, Cancellation

_REMEMBERED = 1024
"""Contexts that are sent again; the least recently used are not."""

_SHORTFALL = 512
"""Tokens of a context that may be missing from a hit before a restart is suspected: a server caches whole blocks."""


_CLOSING_SECONDS = 5.0
"""How long closing waits for the thread. A connection that is being made, or an answer that has not begun, cannot be
woken: it ends by the client's own time limit, and a client may have none."""


class Preloads:
    """Remembers contexts that were sent ahead, and sends them again after the server was started anew.

    A restart is seen by the server's start time (`/metrics`), looked at when the server was out of reach for a while or
    knows less of a context than it did. The contexts are sent by a thread that lives only that long, one at a time.

    Args:
        wire: the server.
        send: sends a context, one token of answer.
        restarted: called when the server was started anew.
        notices: where it is said that a context could not be sent.
    """

    def __init__(
        self,
        wire: HTTPClient,
        send: Callable[[Sequence[int], str], object],
        restarted: Callable[[], None],
        notices: WarnOnce,
    ) -> None:
        self._wire, self._send, self._restarted, self._notices = wire, send, restarted, notices
        self._sent: OrderedDict[tuple[str, bytes], None] = OrderedDict()  # the least recently used first
        self._starts: set[float] = set()  # of every server process seen: there may be several behind one address
        self._interruptions = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = Cancellation()

    def add(self, token_ids: Sequence[int], namespace: str) -> None:
        """Remember a context that was sent."""
        if not self._starts and (started := self._wire.started_at()):
            self._starts.add(started)
        with self._lock:
            self._sent[namespace, _packed(token_ids)] = None
            self._sent.move_to_end((namespace, _packed(token_ids)))
            if len(self._sent) > _REMEMBERED:
                self._sent.popitem(last=False)

    def forget(self, namespace: str) -> None:
        """Send nothing of a namespace's again."""
        with self._lock:
            for key in [key for key in self._sent if key[0] == namespace]:
                del self._sent[key]

    def longest(self, token_ids: Sequence[int], namespace: str) -> int:
        """How many tokens, at the beginning of a prompt, were sent ahead."""
        packed = _packed(token_ids)
        with self._lock:
            found = [key for key in self._sent if key[0] == namespace and packed.startswith(key[1])]
            for key in found:
                self._sent.move_to_end(key)
        return max((len(known) for _, known in found), default=0) // array("I").itemsize

    def answered(self, token_ids: Sequence[int], namespace: str, cached_tokens: int | None) -> None:
        """Look at an answer: if the server seems to have been restarted, find out and send everything again.

        Args:
            token_ids: the prompt.
            namespace: whose.
            cached_tokens: how many of them the server had; None if it does not say.
        """
        interrupted = self._wire.interruptions != self._interruptions
        self._interruptions = self._wire.interruptions
        short = cached_tokens is not None and self.longest(token_ids, namespace) - cached_tokens > _SHORTFALL
        if interrupted or short:
            self._look(interrupted)

    def close(self) -> None:
        """Stop sending, the request under way included, and wait a few seconds for the thread."""
        self._closing.cancel()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(_CLOSING_SECONDS)

    def _look(self, interrupted: bool) -> None:
        with self._lock:
            if self._closing.cancelled or not self._sent or self._thread is not None:
                return
            thread = threading.Thread(target=self._again, args=(interrupted,), name="kvcag-warm-again", daemon=True)
            thread.start()  # if it cannot be started, the next answer tries again
            self._thread = thread

    def _again(self, interrupted: bool) -> None:
        CANCELLATION.set(self._closing)  # of this thread alone
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
                with suppress(Warning):  # where warnings are errors, there is nobody here to catch one
                    self._notices.once(f"a context could not be sent again after a restart: {failed}")
        finally:
            with self._lock:
                self._thread = None

    def _was_restarted(self, interrupted: bool) -> bool:
        started = self._wire.started_at()
        if started is None:
            return interrupted
        known = started in self._starts
        self._starts.add(started)
        return not known


def _packed(token_ids: Sequence[int]) -> bytes:
    return array("I", token_ids).tobytes()
