from __future__ import annotations

import pytest

from kvcag import HFEngine, MemoryCube
from kvcag.testing import EchoEngine, whole_prompt
from tests.cube_sides import BRIDGE, TOWER


@pytest.fixture
def cube(tiny_engine: HFEngine) -> MemoryCube:
    """Has no instruction, so that its caches are found after any instruction."""
    made = MemoryCube(tiny_engine, namespace="mine")
    made.add([TOWER, BRIDGE])
    made.encode()
    return made


@pytest.fixture
def echo() -> MemoryCube:
    """Answers with the prompt."""
    made = MemoryCube(EchoEngine(whole_prompt))
    made.add([TOWER, BRIDGE])
    return made
