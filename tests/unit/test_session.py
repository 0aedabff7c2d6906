"""Sessions: each token is prefilled once, answers are those of a full prefill, forks and rollbacks disturb nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcag import KVCacheMemory
from kvcag.cache.layers import layers_of
from kvcag.chat_template import Prompt
from kvcag.engines.constrain import Choices
from kvcag.engines.hf import HFEngine
from kvcag.engines.session import Session
from kvcag.errors import ConstraintError, ContextLengthError, EmptyPromptError, InvalidInputError, TokenMismatchError
from kvcag.testing import CHATML, byte_tokenizer, tiny_model
from tests.forwards import forward_lengths

STRIPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMS = CHATML.replace("message['content'] }}", "message['content'] | trim }}")
THINKS = Choices(["<think>why</think>so", "<think>not</think>no"])


@pytest.fixture(scope="module")
def engine() -> HFEngine:
    return HFEngine(tiny_model(), byte_tokenizer(), defaults={"max_new_tokens": 6})


@pytest.fixture(scope="module")
def fresh() -> HFEngine:
    """The same model, which remembers nothing."""
    return HFEngine(tiny_model(), byte_tokenizer(), prefix_cache_bytes=0, defaults={"max_new_tokens": 6})


@pytest.fixture
def forwards(engine: HFEngine) -> Iterator[list[int]]:
    """The length of each forward pass."""
    with forward_lengths(engine.model) as lengths:
        yield lengths


def contexts(engine: HFEngine) -> dict[str, object]:
    memory = KVCacheMemory(engine, instruction="Read.")
    items = [memory.extract(text) for text in ("The sky is green.", "Grass is blue.")]
    memory.add(items)
    return {
        "none": None,
        "system": engine.build_kv_cache("You know all."),
        "messages": engine.build_kv_cache([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        "get_cache": memory.get_cache([item.id for item in items]),
        "merged": memory.merge([item.id for item in items], "?", strategy="query"),
        "exact": memory.merge([item.id for item in items], "?", strategy="exact"),
    }


@pytest.mark.parametrize("name", ["none", "system", "messages", "get_cache", "merged", "exact"])
def test_each_token_is_run_once_over_any_context(engine, forwards, name):
    context = contexts(engine)[name]
    held = 0 if context is None else len(context.token_ids)
    forwards.clear()
    with Session(engine, context) as session:
        for turn in range(4):
            session.generate(f"Question {turn}?", constraint=Choices(["yes", "no"]) if turn % 2 else None)
        assert sum(forwards) == len(session.token_ids) - 1 - held, "all but the last token of the last answer"
        assert session.prefilled_tokens == sum(turn.prefilled_tokens for turn in session.turns)
        answers = sum(turn.completion_tokens for turn in session.turns)
        assert session.prefilled_tokens + answers - 4 == sum(forwards)


@pytest.mark.parametrize("name", ["none", "system", "messages"])
def test_answers_equal_those_of_full_prefills(engine, fresh, name):
    session = Session(engine, contexts(engine)[name])
    for turn in range(3):
        before = session.token_ids
        answer = session.generate(f"And {turn}?")
        said = len(session.token_ids) - session.turns[-1].completion_tokens
        prompt = Prompt((), (), session.token_ids[:said])
        assert session.token_ids[: len(before)] == before
        full = fresh.stream(prompt, fresh.sampling())
        assert "".join(chunk.text for chunk in full) == answer


def test_a_merged_context_is_read_and_never_written(engine):
    context = contexts(engine)["merged"]
    before = [keys.clone() for keys, _ in layers_of(context.cache)]
    Session(engine, context).generate("What is green?")
    assert all(torch.equal(a, b) for a, (b, _) in zip(before, layers_of(context.cache), strict=True))


def test_the_first_turn_says_what_generate_says(engine, fresh):
    for name, context in contexts(engine).items():
        assert Session(engine, context).generate("Why?") == engine.generate("Why?", context), name


def test_a_template_that_rewrites_history_costs_only_what_differs(forwards):
    engine = HFEngine(tiny_model(), byte_tokenizer(STRIPS_THINKING))
    session = Session(engine)
    session.generate("a long question that is not prefilled again", constraint=THINKS)
    first = len(session.token_ids) - session.turns[0].completion_tokens
    session.generate("and now?", constraint=THINKS)
    text = engine.tokenizer.decode(list(session.token_ids))
    assert "<think>" not in text[: text.index("and now?")]
    assert session.turns[1].prefilled_tokens == len(session.token_ids) - session.turns[1].completion_tokens - first


@pytest.mark.parametrize("template", [CHATML, TRIMS, STRIPS_THINKING, None])
def test_ids_agree_with_the_rendered_template(template):
    engine = HFEngine(tiny_model(), byte_tokenizer(template))
    session = Session(engine)
    for turn in range(3):
        session.generate([{"role": "user", "content": f" q{turn} "}], max_new_tokens=5, temperature=1.0, seed=turn)
    said = session.token_ids[: len(session.token_ids) - session.turns[-1].completion_tokens]
    rendered = engine.template.render(session.messages[:-1])
    assert engine.tokenizer.decode(list(said)).removeprefix("<|im_start|>" if template is None else "") == rendered


def test_a_fork_shares_until_it_writes(engine):
    session = Session(engine, engine.build_kv_cache("You know all."))
    session.generate("one?")
    fork = session.fork()
    assert fork._held is session._held
    left, right = session.generate("two?"), fork.generate("three?")
    assert fork._held is not session._held
    assert len(fork.turns) == len(session.turns) == 2
    for question, answer in (("two?", left), ("three?", right)):
        alone = Session(engine, engine.build_kv_cache("You know all."))
        alone.generate("one?")
        assert alone.generate(question) == answer


def test_closing_one_leaves_the_other(engine):
    session = Session(engine)
    session.generate("one?")
    fork = session.fork()
    session.close()
    assert fork._held.readers == 1
    assert fork.generate("two?")
    session.close()
    for use in (lambda: session.generate("x"), session.fork, session.rollback, lambda: session.stream("x")):
        with pytest.raises(InvalidInputError, match="closed"):
            use()


def test_rollback_goes_back(engine, forwards):
    session = Session(engine)
    session.generate("one?")
    ids, turns = session.token_ids, session.turns
    answer = session.generate("two?")
    session.generate("three?")
    session.rollback(2)
    assert (session.token_ids, session.turns) == (ids, turns)
    forwards.clear()
    assert session.generate("two?") == answer
    assert forwards[0] == 1, "what was said before is still there"
    session.rollback()
    assert session.generate("other?") == replay(engine, ["one?", "other?"])
    session.rollback(2)
    assert session.token_ids == ()
    for wrong in (1, -1):
        with pytest.raises(InvalidInputError, match="turns"):
            session.rollback(wrong)


def replay(engine: HFEngine, questions: list[str]) -> str:
    session = Session(engine)
    return [session.generate(question) for question in questions][-1]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["say", "say", "back", "fork", "abandon"]), max_size=8))
def test_whatever_happened_before_the_next_answer_is_that_of_a_replay(engine, steps):
    session, said = Session(engine), list[str]()
    for number, step in enumerate(steps):
        if step == "say":
            session.generate(f"q{number}", max_new_tokens=3)
            said.append(f"q{number}")
        elif step == "back" and said:
            session.rollback()
            said.pop()
        elif step == "fork":
            old, session = session, session.fork()
            old.generate("elsewhere", max_new_tokens=2)
        elif step == "abandon":
            stream = session.stream("never mind")
            next(stream)
            stream.close()
    fresh = Session(engine)
    for question in said:
        fresh.generate(question, max_new_tokens=3)
    assert session.generate("last?") == fresh.generate("last?")
    assert session.token_ids == fresh.token_ids


def test_an_abandoned_or_failed_turn_is_taken_back(engine):
    session = Session(engine)
    session.generate("one?")
    ids = session.token_ids
    stream = session.stream("two?")
    next(stream)
    with pytest.raises(InvalidInputError, match="a turn is running"):
        next(session.stream("three?"))
    with pytest.raises(InvalidInputError, match="a turn is running"):
        session.fork()
    stream.close()
    assert session.token_ids == ids

    def fail(module, args):
        raise RuntimeError("out of memory")

    hook = engine.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.generate("two?")
    hook.remove()
    assert session.token_ids == ids
    assert session.generate("two?") == replay(engine, ["one?", "two?"])


def test_a_stale_stream_is_refused(engine):
    session = Session(engine)
    early = session.stream("one?")
    session.generate("two?")
    with pytest.raises(InvalidInputError, match="another turn"):
        next(early)


def test_bad_turns_are_refused_before_any_prefill(engine, forwards):
    session = Session(engine)
    with pytest.raises(EmptyPromptError):
        session.stream([])
    with pytest.raises(ConstraintError):
        session.stream("x", constraint=Choices([]))
    with pytest.raises(ContextLengthError):
        session.stream("x", max_new_tokens=5000)
    with pytest.raises(InvalidInputError):
        session.stream([{"role": "user", "content": [{"type": "image_url"}]}])
    assert forwards == []
    assert session.generate([{"role": "user", "content": [{"type": "text", "text": "x"}]}])


def test_a_merged_context_cannot_be_rewritten():
    engine = HFEngine(tiny_model(), byte_tokenizer(STRIPS_THINKING))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>c"}]
    cache = engine.build_kv_cache(messages)
    assert Session(engine, cache).generate("d", max_new_tokens=2), "the model computes what differs again"
    cache.is_exact = False
    with pytest.raises(TokenMismatchError, match="cannot be computed again"):
        Session(engine, cache).stream("d")


def test_stop_strings_and_messages(engine):
    session = Session(engine)
    assert session.generate("x", constraint=Choices(["abSTOPcd"]), stop="STOP", max_new_tokens=20) == "ab"
    assert session.messages[-1] == {"role": "assistant", "content": "ab"}
    session.generate("y")
    assert "STOP" not in engine.tokenizer.decode(list(session.token_ids))
    assert isinstance(session, Session)
