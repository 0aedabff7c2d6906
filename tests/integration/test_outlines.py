"""Outlines over kvcag's caches: the recipe of docs/structured.md gives the same output with and without a cache."""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterator

import outlines
import pytest
import torch._dynamo
from outlines.inputs import Chat

from kvcag import Choices, HFEngine, Regex
from kvcag.cache.layers import cache_argument
from tests.forwards import forward_lengths

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's, when it loads its compiler

SYSTEM = {
    "role": "system",
    "content": "You answer questions about the harbour. The ferry to Brindle leaves at 07:40 from pier 3. "
    "The ferry to Oake leaves at 16:05 from pier 1. Tickets are sold at the red kiosk. " * 4,
}


class Pier(enum.Enum):
    one = "pier 1"
    three = "pier 3"


@pytest.fixture(autouse=True)
def _no_compiler() -> Iterator[None]:
    """Outlines masks logits in a kernel that torch compiles at the first call, which needs a C++ compiler."""
    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.fixture
def forwards(smollm2_engine: HFEngine) -> Iterator[list[int]]:
    with forward_lengths(smollm2_engine.model) as lengths:
        yield lengths


@pytest.mark.parametrize(
    ("question", "output_type", "constraint"),
    [
        ("From which pier does the ferry to Oake leave?", Pier, Choices([pier.value for pier in Pier])),
        ("When does the ferry to Brindle leave?", outlines.regex("[0-9]{2}:[0-9]{2}"), Regex("[0-9]{2}:[0-9]{2}")),
    ],
)
def test_an_outlines_generator_runs_over_a_cache(smollm2_engine, forwards, question, output_type, constraint):
    engine = smollm2_engine
    messages = [SYSTEM, {"role": "user", "content": question}]
    generator = outlines.Generator(outlines.from_transformers(engine.model, engine.tokenizer), output_type)
    without = generator(Chat(messages), max_new_tokens=8, do_sample=False)

    context = engine.build_kv_cache([SYSTEM])
    prompt_ids = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_ids[: len(context.token_ids)] == context.token_ids.tolist()
    forwards.clear()
    cache = cache_argument(engine.model, copy.deepcopy(context))
    over = generator(Chat(messages), max_new_tokens=8, do_sample=False, **cache)

    assert over == without
    assert forwards[0] == len(prompt_ids) - len(context.token_ids), "the context is not prefilled again"
    assert engine.generate(messages, context, constraint=constraint, max_new_tokens=8) == without
    assert context.get_seq_length() == len(context.token_ids), "generate() writes into the copy"


def test_a_plain_string_is_wrapped_again_and_does_not_match(smollm2_engine):
    """Outlines makes a user message of a plain string, so rendered text is rendered twice."""
    engine = smollm2_engine
    context = engine.build_kv_cache([SYSTEM])
    rendered = engine.template.render([SYSTEM, {"role": "user", "content": "When?"}])
    model = outlines.from_transformers(engine.model, engine.tokenizer)
    read = engine.tokenizer(model.type_adapter.format_input(rendered))["input_ids"]
    assert read[: len(context.token_ids)] != context.token_ids.tolist()
    as_chat = model.type_adapter.format_input(Chat([SYSTEM, {"role": "user", "content": "When?"}]))
    assert engine.tokenizer(as_chat)["input_ids"][: len(context.token_ids)] == context.token_ids.tolist()
