"""All ways in which LangChain wraps a chat model."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import ConfigurableField


class Foreign(FakeListChatModel):
    """A model of another provider, which says that it can call tools."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


FOREIGN = Foreign(responses=["from the fallback"])

WRAPPED: list[Any] = [
    pytest.param(lambda llm: llm, id="not wrapped"),
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
    pytest.param(lambda llm: llm.with_listeners(on_end=lambda run: None), id="with_listeners"),
    pytest.param(lambda llm: llm.with_types(input_type=str), id="with_types"),
    pytest.param(lambda llm: llm.bind(stop=["zzz"]).with_fallbacks([FOREIGN]).with_config(tags=["a"]), id="all"),
    pytest.param(
        lambda llm: (
            llm.with_listeners(on_start=lambda run: None)
            .configurable_alternatives(ConfigurableField(id="which"), other=lambda: FOREIGN)
            .with_fallbacks([FOREIGN])
        ),
        id="all again",
    ),
]
