from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from kvcag import concurrency as streams
from tests.waits import awaited, joined, ticks_during


class Source:
    """A blocking stream that says what happened to it."""

    def __init__(self, pieces: int, step: float = 0.01, fail_at: int | None = None) -> None:
        self.pieces, self.step, self.fail_at = pieces, step, fail_at
        self.given = 0
        self.closed = threading.Event()

    def open(self) -> Iterator[int]:
        try:
            for piece in range(self.pieces):
                time.sleep(self.step)
                if piece == self.fail_at:
                    raise RuntimeError("boom")
                self.given += 1
                yield piece
        finally:
            self.closed.set()


async def test_all_pieces_come_in_order() -> None:
    assert [piece async for piece in streams.iterate(Source(5).open)] == [0, 1, 2, 3, 4]


async def test_the_event_loop_ticks_while_the_stream_works() -> None:
    async def read() -> None:
        assert [piece async for piece in streams.iterate(Source(3, step=0.1).open)] == [0, 1, 2]

    assert await ticks_during(read()) > 10


async def test_an_error_reaches_the_consumer() -> None:
    stream = streams.iterate(Source(5, fail_at=2).open)
    assert [await anext(stream), await anext(stream)] == [0, 1]
    with pytest.raises(RuntimeError, match="boom"):
        await anext(stream)


async def test_an_error_while_opening_reaches_the_consumer() -> None:
    def fail() -> Iterator[int]:
        raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        await anext(streams.iterate(fail))


def ended() -> Iterator[int]:
    raise StopIteration("no more")


async def test_a_stop_iteration_reaches_the_caller_as_another_error() -> None:
    """Before Python 3.12 a future cannot hold it, and whoever awaits the future waits for ever."""
    with pytest.raises(RuntimeError, match="ended raised StopIteration"):
        await awaited(streams.in_thread(ended), 5)
    with pytest.raises(RuntimeError, match="ended raised StopIteration"):
        await awaited(anext(streams.iterate(ended)), 5)


async def test_a_call_in_a_thread_gets_its_arguments_and_gives_its_result() -> None:
    assert await streams.in_thread(sorted, [2, 1, 3], reverse=True) == [3, 2, 1]


async def test_closing_stops_the_stream() -> None:
    source = Source(1000)
    stream = streams.iterate(source.open)
    assert await anext(stream) == 0
    await stream.aclose()
    assert source.closed.is_set()
    assert source.given == 1


async def test_cancelling_stops_the_stream_after_the_running_step() -> None:
    source = Source(1000, step=0.1)

    async def consume() -> None:
        async for _ in streams.iterate(source.open):
            pass

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.25)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await awaited(task)
    await asyncio.wait_for(asyncio.to_thread(source.closed.wait), 1)
    given = source.given
    await asyncio.sleep(0.2)
    assert source.given == given <= 4


def test_contexts_that_wait_for_an_idle_model_are_limited() -> None:
    idle, encoded, may_go_on = streams.IdleWork(), list[int](), threading.Event()

    def encode(token_ids: tuple[int, ...], namespace: str) -> None:
        may_go_on.wait(10)
        encoded.append(token_ids[0])

    for token in range(1000):
        idle.encode((token,), "", encode)
    worker = idle._thread
    assert worker is not None
    may_go_on.set()
    joined([worker])
    assert encoded == [0, *range(936, 1000)]


def test_a_process_ends_in_peace_while_a_context_is_encoded_in_the_background() -> None:
    program = """
import threading, torch
from kvcag.concurrency import IdleWork, cancellation
began = threading.Event()
def encode(token_ids, namespace):
    layer = torch.randn(900, 900)
    while True:
        cancellation().check()
        began.set()
        layer @ layer
IdleWork().encode((1,), "", encode)
began.wait(10)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
