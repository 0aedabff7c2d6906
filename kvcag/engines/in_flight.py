"""Prompts that are prefilled now, so that what two of them begin with alike is computed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from kvcag.streams import holding

_WORTH_WAITING = 32
"""Tokens that another prompt's prefill has to save this one, at least, and half of what that prefill computes."""


@dataclass(eq=False)
class _Prefill:
    token_ids: np.ndarray
    namespace: str
    running: threading.Lock = field(default_factory=threading.Lock)

    def shares(self, token_ids: np.ndarray) -> int:
        length = min(len(self.token_ids), len(token_ids))
        differs = np.flatnonzero(self.token_ids[:length] != token_ids[:length])
        return int(differs[0]) if len(differs) else length


class InFlight:
    """The prefills of one engine that are under way."""

    def __init__(self) -> None:
        self._prefills: list[_Prefill] = []
        self._lock = threading.Lock()

    @contextmanager
    def prefill(
        self,
        token_ids: Sequence[int],
        namespace: str,
        known: Callable[[Sequence[int], str], int],
        *,
        background: bool = False,
    ) -> Iterator[None]:
        """Register a prefill, after waiting for each earlier one that computes more of these tokens than are known.

        Args:
            token_ids: the prompt's.
            namespace: whose prompts may share.
            known: how many tokens at the beginning are cached.
            background: others do not wait for this prefill, which waits for them.

        Raises:
            Cancelled: the reader left while this thread waited.
        """
        mine = _Prefill(np.asarray(token_ids, dtype=np.int64), namespace)
        mine.running.acquire()
        while (other := self._worth_waiting_for(mine, known(token_ids, namespace), not background)) is not None:
            with holding(other.running):
                pass
        try:
            yield
        finally:
            with self._lock:
                if mine in self._prefills:
                    self._prefills.remove(mine)
            mine.running.release()

    def _worth_waiting_for(self, mine: _Prefill, known: int, register: bool) -> _Prefill | None:
        """An earlier prefill to wait for. Without one, `mine` is registered for others to wait for."""
        with self._lock:
            for other in self._prefills:
                saved = other.shares(mine.token_ids) - known if other.namespace == mine.namespace else 0
                if saved >= max(_WORTH_WAITING, (len(other.token_ids) - known) // 2):
                    return other
            if register:
                self._prefills.append(mine)
            return None
