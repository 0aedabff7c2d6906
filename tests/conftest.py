from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytest_timeout
import torch

from kvcag import HFEngine
from kvcag.demo.model import embedded_model
from kvcag.testing import byte_tokenizer, tiny_model

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core, so a thread a worker
    torch.set_num_threads(1)

# A shell starts jobs in the background with Ctrl-C ignored, and the processes that tests start inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Limits the teardown of a test that failed too: at a failure pytest-timeout and pytest stop their clocks."""
    item.ihook.pytest_timeout_set_timer(item=item, settings=pytest_timeout._get_item_settings(item))
    try:
        return (yield)
    finally:
        item.ihook.pytest_timeout_cancel_timer(item=item)


@pytest.fixture(autouse=True, scope="session")
def _no_stray_event_loop() -> None:
    """LlamaIndex asks for the current event loop, which makes one that nobody closes, unless there is none set."""
    asyncio.set_event_loop(None)


@pytest.fixture
def tiny_engine() -> HFEngine:
    """A random three-layer Llama over bytes, with nothing remembered."""
    return HFEngine(tiny_model(), byte_tokenizer())


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The embedded model's folder."""
    return embedded_model()


@pytest.fixture(scope="session")
def _smollm2(smollm2_path: Path) -> HFEngine:
    return HFEngine.from_pretrained(smollm2_path, dtype="float32", device="cpu")


@pytest.fixture
def smollm2_engine(_smollm2: HFEngine) -> Iterator[HFEngine]:
    """SmolLM2-135M-Instruct in fp32, loaded once, with nothing remembered from the test before."""
    _smollm2.prefixes.clear()
    yield _smollm2
    _smollm2.prefixes.clear()
