"""What is said where a cache could not be used, or a server lacks something. The answer is right all the same."""

from __future__ import annotations

import threading
import warnings


class CacheWarning(UserWarning):
    """A cache could not be used, and its text was encoded again. The answer is right; it came later."""


class ServerWarning(CacheWarning):
    """A server lacks something, or forgot what it was given: what the answer then does without is said, once."""


class Notices:
    """Says each thing once, whoever asks and however often."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def once(self, message: str, category: type[Warning] = ServerWarning) -> None:
        """Warn, unless this was said before."""
        with self._lock:
            if message in self._said:
                return
            self._said.add(message)
        warnings.warn(message, category, stacklevel=4)
