"""Input that cannot work is refused by an error of ours, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.documents import Document

from kvcag import HFEngine, KVCacheMemory, MemoryCube
from kvcag.errors import InvalidInputError, PromptError
from kvcag.langchain import ChatKVCAG
from kvcag.llama_index import KVCacheLLM

HALF = "half of a pair: \ud83d"
LOOP: dict[str, Any] = {}
LOOP["itself"] = LOOP

WRONG: dict[str, Callable[[KVCacheMemory], object]] = {
    "half a surrogate pair in a question": lambda memory: memory.ask(HALF),
    "half a surrogate pair in a document": lambda memory: memory.add(HALF),
    "half a surrogate pair in a context": lambda memory: memory.create_context([HALF]),
    "a number for the instruction of a context": lambda memory: memory.create_context(["text"], instruction=7),
    "a number for the text of a context": lambda memory: memory.create_context([7]),
    "half a surrogate pair in a stop string": lambda memory: memory.ask("What?", stop=HALF),
    "half a surrogate pair in a text of a cube": lambda memory: MemoryCube(memory.engine).add(HALF),
    "half a surrogate pair for a chat model": lambda memory: ChatKVCAG(memory=memory).invoke(HALF),
    "half a surrogate pair for an LLM": lambda memory: KVCacheLLM(memory=memory).complete(HALF),
    "metadata that contain themselves": lambda memory: ChatKVCAG(memory=memory).precompute(
        [Document("text", metadata=LOOP)], progress=False
    ),
    "a temperature that makes logits infinite": lambda memory: memory.ask("What?", temperature=1e-40),
    "a fraction of a token": lambda memory: memory.ask("What?", max_new_tokens=2.5),
    "a fraction of a candidate": lambda memory: memory.ask("What?", temperature=1, top_k=2.5),
    "a seed of 70 bits": lambda memory: memory.ask("What?", temperature=1, seed=2**70),
    "a seed that is text": lambda memory: memory.ask("What?", temperature=1, seed="7"),
    "a stop that is no text": lambda memory: memory.ask("What?", stop=7),
    "a ratio that is not a number": lambda memory: memory.ask("What?", ratio=float("nan")),
    "a ratio that is text": lambda memory: memory.ask("What?", ratio="all"),
    "an error that is not a number": lambda memory: memory.ask("What?", max_kl=float("nan")),
    "a number for messages": lambda memory: memory.ask(7),  # type: ignore[arg-type]
    "a number for a message": lambda memory: memory.ask([7]),  # type: ignore[list-item]
    "a number for a content": lambda memory: memory.ask([{"role": "user", "content": 7}]),
    "a part without a text": lambda memory: memory.ask([{"role": "user", "content": [{"type": "text"}]}]),
    "a number for a role": lambda memory: memory.ask([{"role": 7, "content": "What?"}]),
    "a number for ids": lambda memory: memory.ask("What?", ids=7),  # type: ignore[arg-type]
    "a number for an id": lambda memory: memory.get_by_ids([7]),  # type: ignore[list-item]
    "nothing to merge": lambda memory: memory.merge(None, "What?"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_refused_by_an_error_of_ours(wrong: str, tiny_engine: HFEngine) -> None:
    with pytest.raises((InvalidInputError, PromptError)):
        WRONG[wrong](KVCacheMemory(tiny_engine))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e-40"])
@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
def test_a_setting_that_makes_logits_infinite_is_refused(name: str, value: str, tiny_engine: HFEngine) -> None:
    with pytest.raises(InvalidInputError, match=name):
        tiny_engine.sampling(**{name: float(value)})


def test_a_namespace_may_be_any_text(tiny_engine: HFEngine, tmp_path: Any) -> None:
    memory = KVCacheMemory(tiny_engine, tmp_path, namespace=HALF)
    assert memory.get(memory.add("A text.")[0]) is not None
