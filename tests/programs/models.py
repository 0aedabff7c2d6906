"""The models of the programs: they stand where a page of documentation has a provider's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvcag import HFEngine
from kvcag.langchain import ChatKVCAG
from kvcag.testing import EchoEngine, byte_tokenizer, last_user_message, tiny_model


def tiny(**settings: Any) -> ChatKVCAG:
    """Random weights, so programs print what the caches did and what grammar guarantees, and not what it says."""
    return ChatKVCAG(engine=HFEngine(tiny_model(), byte_tokenizer()), **{"max_tokens": 16, **settings})


def echo(answer: Callable[[str], str] = last_user_message, **settings: Any) -> ChatKVCAG:
    """Answers with what was asked, or with what `answer` makes of the prompt."""
    return ChatKVCAG(engine=EchoEngine(answer), **{"max_tokens": 500, **settings})
