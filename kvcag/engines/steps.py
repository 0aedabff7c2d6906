"""Steps of answers that are generated at the same time, taken together.

A step reads all weights for one token. So an answer asks for its next step and goes on with what it has; when it needs
the step, the thread that reads it waits for the other answers, and takes the step for all that asked. It waits while
others keep coming, and while the device is still busy with the step before, which costs nothing: a slow or
absent reader delays the others by milliseconds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, TypeAlias
from weakref import WeakSet

from transformers.cache_utils import Cache

from kvcag.concurrency import CANCELLATION, Cancellation, cancellation
from kvcag.engines.decode import Forward, Pending, Prediction

_log = logging.getLogger(__name__)

_PATIENCE = 0.003
"""Seconds without another answer's request, after which the step is taken."""

Together: TypeAlias = Callable[[list[Any], list[Cache]], "Sequence[Prediction]"]
"""Takes one token, as in `Forward`, over each cache. What it raises is dropped: each step is then taken alone."""


class Alone:
    """A step that is taken for one answer alone.

    Args:
        forward: the model.
        token: as in `Forward`.
        cache: the answer's.
        now: take it now, and not when it is needed.
    """

    def __init__(self, forward: Forward, token: Any, cache: Cache, *, now: bool) -> None:
        self._forward, self._token, self._cache = forward, token, cache
        self._prediction = forward(token, cache) if now else None

    def get(self) -> Prediction:
        """Take it, unless it is taken."""
        return self._prediction or self._forward(self._token, self._cache)

    def leave(self) -> None:
        """Nothing waits for it."""


class _Step:
    def __init__(self, steps: Steps, token: Any, cache: Cache) -> None:
        self.steps, self.token, self.cache = steps, token, cache
        self.prediction: Prediction | None = None
        self.alone = False
        self._woken = threading.Lock()  # lighter than an Event: there are many threads, and one interpreter lock
        self._woken.acquire()

    def get(self) -> Prediction:
        return self.prediction or self.steps.take(self)

    def leave(self) -> None:
        self.steps.leave(self)

    def wake(self) -> None:
        """End `wait`, or the next one."""
        with suppress(RuntimeError):  # it is awake
            self._woken.release()

    def wait(self, seconds: float = -1) -> None:
        """Wait until `wake` is called, or the time is over."""
        self._woken.acquire(timeout=seconds)


class Steps:
    """Takes one step for several answers. Each may be read in a thread of its own, or several in one, by turns.

    Args:
        exclusive: the model for one thread.
        alone: a step of one answer.
        together: a step of at least two.
        most: answers of a step.
    """

    def __init__(
        self, exclusive: Callable[[], AbstractContextManager[Any]], alone: Forward, together: Together, most: int
    ) -> None:
        self._exclusive, self._alone, self._together, self._most = exclusive, alone, together, most
        self._lock = threading.Lock()
        self._waiting: list[_Step] = []
        self._missing: WeakSet[Cache] = WeakSet()  # of answers that are generated now, and did not ask for a step
        self._leader: _Step | None = None  # whose thread takes the next step
        self._last: Prediction | None = None

    def ask(self, token: Any, cache: Cache, *, now: bool) -> Pending:
        """Ask for a step of one answer.

        Args:
            token: as in `Forward`.
            cache: the answer's.
            now: take the step now if all that are generated have asked. Else it is taken when one of them needs it.
        """
        mine = _Step(self, token, cache)
        with self._lock:
            self._waiting.append(mine)
            self._missing.discard(cache)
            here = self._all_are_here()
            if here and self._leader is not None:
                self._leader.wake()
            elif here and now:
                self._leader = mine
        if self._leader is mine:
            try:
                self._lead(mine)
            except BaseException:
                self.leave(mine)
                raise
        return mine

    def take(self, mine: _Step) -> Prediction:
        """The step, taken by this thread or by another."""
        left = cancellation()
        with left.waking(mine.wake):
            while True:
                with self._lock:
                    if mine not in self._waiting and (mine.alone or mine.prediction is not None):
                        break
                    if mine in self._waiting:
                        left.check()
                        if self._leader is None:
                            self._leader = mine
                if self._leader is mine:
                    self._gather(mine, left)
                    self._lead(mine)
                else:
                    mine.wait()
        return self._alone(mine.token, mine.cache) if mine.prediction is None else mine.prediction

    def leave(self, mine: _Step) -> None:
        """An answer has ended, or its reader has left."""
        with self._lock:
            self._missing.discard(mine.cache)
            if mine in self._waiting:
                self._waiting.remove(mine)
            if self._leader is not None and self._all_are_here():
                self._leader.wake()

    def _all_are_here(self) -> bool:
        return not self._missing or len(self._waiting) >= self._most

    def _gather(self, mine: _Step, left: Cancellation) -> None:
        """Wait for the other answers that are generated now."""
        came = 0
        try:
            while True:
                with self._lock:
                    if self._all_are_here():
                        return
                    busy = self._last is not None and not self._last.is_there
                    if len(self._waiting) == came and not busy:
                        self._missing.clear()
                        return
                    came = len(self._waiting)
                mine.wait(_PATIENCE)
                left.check()
        except BaseException:
            self._hand_over(mine)
            raise

    def _lead(self, mine: _Step) -> None:
        """Take the step for all that wait."""
        try:
            with self._exclusive():
                with self._lock:
                    others = [step for step in self._waiting if step is not mine][: self._most - 1]
                    steps = [mine, *others]
                    self._waiting = [step for step in self._waiting if step not in steps]
                    self._missing.update(step.cache for step in steps)
                if others:
                    self._take_together(steps)
                else:
                    mine.alone = True
                    mine.prediction = self._last = self._alone(mine.token, mine.cache)
        finally:
            self._hand_over(mine)

    def _take_together(self, steps: list[_Step]) -> None:
        token = CANCELLATION.set(Cancellation())  # a reader who leaves does not stop the others' step
        try:
            taken = self._together([step.token for step in steps], [step.cache for step in steps])
            for step, prediction in zip(steps, taken, strict=True):
                step.prediction = self._last = prediction
        except Exception:  # the boundary: taken alone, each step gives its own answer the error, or none
            _log.warning("a step of %d answers failed; each is taken alone", len(steps), exc_info=True)
        finally:
            CANCELLATION.reset(token)
            for step in steps:
                step.alone = step.prediction is None
                step.wake()

    def _hand_over(self, mine: _Step) -> None:
        """Let another thread lead: those that need their step are asleep, and ask who leads when they wake."""
        with self._lock:
            self._leader = None
            for step in self._waiting:
                step.wake()
