"""Ways in which LangChain wraps a chat model."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import ConfigurableField

FOREIGN = FakeListChatModel(responses=["from the fallback"])

WRAPPED: list[Any] = [
    pytest.param(lambda llm: llm.bind(stop=["zzz"]), id="bind"),
    pytest.param(lambda llm: llm.with_config(tags=["a"]), id="with_config"),
    pytest.param(lambda llm: llm.with_retry(), id="with_retry"),
    pytest.param(lambda llm: llm.with_fallbacks([FOREIGN]), id="with_fallbacks"),
    pytest.param(
        lambda llm: llm.configurable_fields(max_tokens=ConfigurableField(id="length")), id="configurable_fields"
    ),
    pytest.param(
        lambda llm: llm.configurable_alternatives(ConfigurableField(id="which"), other=FOREIGN),
        id="configurable_alternatives",
    ),
    pytest.param(lambda llm: llm.bind(stop=["zzz"]).with_fallbacks([FOREIGN]).with_config(tags=["a"]), id="all"),
]
