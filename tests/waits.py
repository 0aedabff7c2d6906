"""Waits that end: what does not come in time fails its test, and does not hang the suite."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

SECONDS = 60.0
"""How long to wait for what takes a moment, on a machine that is busy."""


def joined(threads: Iterable[threading.Thread], seconds: float = SECONDS) -> None:
    """Wait for threads to end."""
    end = time.monotonic() + seconds
    listed = list(threads)
    for thread in listed:
        thread.join(max(0.0, end - time.monotonic()))
    alive = [thread.name for thread in listed if thread.is_alive()]
    assert not alive, f"still running after {seconds} s: {alive}"


def run_together(threads: Iterable[threading.Thread], seconds: float = SECONDS) -> None:
    """Start threads and wait for them. One that never ends does not keep the process alive."""
    listed = list(threads)
    for thread in listed:
        thread.daemon = True
        thread.start()
    joined(listed, seconds)


async def awaited(what: Awaitable[T], seconds: float = SECONDS) -> T:
    """What it gives; `TimeoutError` if it does not come."""
    return await asyncio.wait_for(what, seconds)


def until(reached: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"it did not happen within {seconds} s"
        time.sleep(0.005)


async def auntil(reached: Callable[[], object], seconds: float = SECONDS) -> None:
    """`until`, leaving the event loop free."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"it did not happen within {seconds} s"
        await asyncio.sleep(0.005)


async def set_by(task: asyncio.Task[object], event: asyncio.Event, seconds: float = SECONDS) -> None:
    """Wait for an event that a task sets. Raises the task's error if it fails before that."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait([waiting, task], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    assert event.is_set(), f"it did not happen within {seconds} s"


async def ticks_during(what: Awaitable[object]) -> int:
    """How often the event loop came round while it waited for something."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    await what
    ticking.cancel()
    return ticks
