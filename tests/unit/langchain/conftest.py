from __future__ import annotations

import pytest

from kvcag import HFEngine
from kvcag.langchain import ChatKVCAG
from kvcag.testing import EchoEngine, whole_prompt


@pytest.fixture
def llm(tiny_engine: HFEngine) -> ChatKVCAG:
    return ChatKVCAG(engine=tiny_engine, max_tokens=8)


@pytest.fixture
def echo() -> ChatKVCAG:
    """Answers with the prompt."""
    return ChatKVCAG(engine=EchoEngine(whole_prompt), max_tokens=800)
