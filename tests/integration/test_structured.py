"""Structured generation on the real model: answers are valid, equal with and without a cache, and a turn prefills only
its new tokens."""

from __future__ import annotations

from collections.abc import Iterator

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcag import Choices, HFEngine, KVCacheMemory, Regex, tool_spec
from kvcag.core import Answer
from kvcag.engines.constrain import ConstraintLike
from tests.forwards import forward_lengths
from tests.schemas import Schema, check_holds, schemas

FACTS = [
    "The harbour of Brindle has four piers, and the oldest of them is made of oak. It was built in 1874.",
    "The ferry Marlin leaves pier 3 at 07:40 every day but Sunday. A ticket costs 12 crowns.",
    "The lighthouse keeper is called Ines Falk. She keeps bees and sells honey at the red kiosk.",
]


@pytest.fixture
def forwards(smollm2_engine: HFEngine) -> Iterator[list[int]]:
    with forward_lengths(smollm2_engine.model) as lengths:
        yield lengths


@settings(
    max_examples=15, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(schema=schemas, budget=st.integers(3, 24))
def test_random_schemas_hold_within_their_budgets(smollm2_engine, schema: Schema, budget: int):
    check_holds(smollm2_engine, schema, budget)


@torch.no_grad()
def full_prefill(engine: HFEngine, token_ids: list[int], starts: list[int]) -> list[torch.Tensor]:
    """From one pass over a text, without any cache: the logits from the last token before each start to the end."""
    kept = torch.arange(starts[0] - 1, len(token_ids))
    logits = engine.model(input_ids=torch.tensor([token_ids]), use_cache=False, logits_to_keep=kept).logits[0]
    return [logits[start - starts[0] :] for start in starts]


def greedy(engine: HFEngine, logits: torch.Tensor, constraint: ConstraintLike | None, max_new_tokens: int) -> list[int]:
    """An answer's tokens, each the likeliest of its row of logits that the constraint allows.

    The rows come from a pass over an answer, and hold as far as this one agrees with it.
    """
    enforced = engine.constrain(constraint, max_new_tokens).start(max_new_tokens) if constraint is not None else None
    tokens: list[int] = []
    for row in logits[:max_new_tokens]:
        scores = row[None] if enforced is None else enforced(torch.tensor([tokens]), row[None])
        token = int(scores.argmax())
        token = token if enforced is None else enforced.take(token)
        if token in engine.eos_ids:
            break
        tokens.append(token)
        if enforced is not None and enforced.complete:
            break
    return tokens


QUESTIONS = [
    ("Who keeps the lighthouse?", Regex("[A-Z][a-z]{1,9} [A-Z][a-z]{1,6}")),
    ("When does the ferry leave?", Regex("[0-2][0-9]:[0-5][0-9]")),
    ("What does a ticket cost?", {"type": "integer", "minimum": 0, "maximum": 99}),
    ("Is the oldest pier made of oak?", Choices(["yes", "no"])),
    ("From which pier?", {"enum": ["pier 1", "pier 2", "pier 3", "pier 4"]}),
    ("When was it built?", {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 1}),
]


def test_constrained_answers_over_a_cache_equal_those_of_a_full_prefill(smollm2_engine):
    """Greedy, fp32, thirty prompts: each question over each of five contexts."""
    engine = smollm2_engine
    contexts = [FACTS[:1], FACTS[1:2], FACTS[:2], FACTS[1:], FACTS]
    answers = set[str]()
    for facts in contexts:
        context = engine.build_kv_cache(facts)
        for question, constraint in QUESTIONS:
            prompt = engine.build_prompt(question, context)
            chunks = list(engine.stream(prompt, engine.sampling(max_new_tokens=8), context, constraint=constraint))
            tokens = [token for chunk in chunks for token in chunk.token_ids]
            [logits] = full_prefill(engine, [*prompt.token_ids, *tokens], [len(prompt.token_ids)])
            assert tokens == greedy(engine, logits, constraint, 8), (facts, question)
            assert chunks[-1].usage.cached_tokens >= len(context.token_ids)
            answers.add("".join(chunk.text for chunk in chunks))
    assert len(answers) > 5, "the answers differ"


def test_ten_turns_over_two_thousand_tokens(smollm2_engine, forwards):
    """Each token is prefilled once, and every answer equals that of a full prefill."""
    engine = smollm2_engine
    filler = " ".join(f"Berth {number} is let to boat {number * 7 % 100}." for number in range(150))
    memory = KVCacheMemory(engine)
    id = memory.create_context([*FACTS, filler])
    questions = [("Who keeps bees?", None), ("Is that so?", Choices(["yes", "no", "maybe"]))] * 5
    messages: list[dict[str, str]] = []
    prompts, answers, said, read = [], [], [], []
    for question, constraint in questions:
        messages.append({"role": "user", "content": question})
        prompt = engine.template.prompt(memory.with_context(id, messages))
        forwards.clear()
        chunks = list(memory.stream(prompt, constraint=constraint, max_new_tokens=6))
        answer = Answer.of(chunks)
        messages.append({"role": "assistant", "content": answer.text})
        prompts.append(prompt.token_ids)
        answers.append(answer)
        said.append([token for chunk in chunks for token in chunk.token_ids])
        read.append(sum(forwards))
    assert 1800 < len(prompts[0]) < 2400
    for turn in range(1, len(questions)):
        new = len(prompts[turn]) - len(prompts[turn - 1]) - answers[turn - 1].usage.completion_tokens
        assert read[turn] <= new + 1 + answers[turn].usage.completion_tokens, (
            "an answer's last token runs with the next"
        )
    whole = [*prompts[-1], *said[-1]]
    for prompt_ids, tokens in zip(prompts, said, strict=True):
        assert whole[: len(prompt_ids) + len(tokens)] == [*prompt_ids, *tokens]
    rows = full_prefill(engine, whole, [len(prompt_ids) for prompt_ids in prompts])
    for (_, constraint), logits, tokens in zip(questions, rows, said, strict=True):
        assert tokens == greedy(engine, logits, constraint, 6)


def test_a_forced_call_and_a_structured_answer_over_merged_documents(smollm2_engine):
    engine = smollm2_engine
    memory = KVCacheMemory(engine, instruction="Answer from the documents.")
    items = [memory.extract(fact) for fact in FACTS]
    memory.add(items)
    ids = [item.id for item in items]
    tool = {
        "name": "buy_ticket",
        "description": "Buys a ticket for a ferry.",
        "parameters": {
            "type": "object",
            "properties": {"ferry": {"type": "string", "maxLength": 12}, "pier": {"type": "integer", "maximum": 4}},
            "required": ["ferry", "pier"],
        },
    }
    spec = tool_spec(engine.template, [tool], "any", parallel=False)
    messages = spec.messages([{"role": "user", "content": "Buy a ticket for the Marlin, please."}])
    merged = memory.merge(ids, messages, strategy="query")
    parsed = spec.parse(engine.generate(None, merged, constraint=spec.constraint, max_new_tokens=40))
    assert [call.name for call in parsed.calls] == ["buy_ticket"]
    jsonschema.validate(parsed.calls[0].arguments, tool["parameters"])
