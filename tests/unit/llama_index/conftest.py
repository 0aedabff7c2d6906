from __future__ import annotations

import pytest

from kvcag.llama_index import KVCacheLLM
from kvcag.testing import EchoEngine, whole_prompt


@pytest.fixture
def llm() -> KVCacheLLM:
    """Answers with the prompt."""
    return KVCacheLLM(engine=EchoEngine(whole_prompt))
