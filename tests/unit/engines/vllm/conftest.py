from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvcag import HFEngine
from kvcag.engines.vllm.engine import VLLMEngine
from tests.wire_server import WireServer


@pytest.fixture
def server(tiny_engine: HFEngine) -> Iterator[WireServer]:
    """A server with vLLM's wire format over a tiny model."""
    with WireServer(tiny_engine) as running:
        yield running


@pytest.fixture
def engine(server: WireServer) -> Iterator[VLLMEngine]:
    """The engine over it, with the server's tokenizer."""
    with VLLMEngine(server.url) as made:
        yield made
