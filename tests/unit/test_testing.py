"""EchoEngine: a real engine in everything but its weights."""

import pytest

from kvcag.chat_template import Document, Prompt
from kvcag.engines.constrain import Regex
from kvcag.errors import ContextLengthError, EmptyPromptError, InvalidInputError, UnsupportedModelError
from kvcag.memory import KVCacheMemory
from kvcag.testing import EchoEngine, last_user_message, whole_prompt

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wörld?"}]


def said(engine: EchoEngine, messages: object = CHAT, **sampling: object) -> str:
    chunks = KVCacheMemory(engine).stream(messages, sampling=engine.sampling(**sampling))
    return "".join(chunk.text for chunk in chunks)


def test_it_answers_with_what_the_user_said_last() -> None:
    assert said(EchoEngine()) == "Wörld?"
    assert (
        said(EchoEngine(), [*CHAT, {"role": "assistant", "content": "!"}, {"role": "user", "content": "More"}])
        == "More"
    )


def test_it_answers_as_it_is_told() -> None:
    assert said(EchoEngine(whole_prompt)) == "system: Be brief.\nuser: Wörld?"
    assert said(EchoEngine(lambda prompt: f"{prompt.count('<|im_start|>')} turns")) == "3 turns"


def test_a_text_without_turns_is_taken_whole() -> None:
    assert last_user_message("Once upon") == whole_prompt("Once upon") == "Once upon"


def test_the_budget_and_stop_strings_end_an_answer() -> None:
    engine = EchoEngine()
    assert said(engine, max_new_tokens=3) == "Wö"
    assert said(engine, stop=["ld"]) == "Wör"


def test_usage_counts_bytes_and_what_an_earlier_prompt_began_with() -> None:
    memory = KVCacheMemory(EchoEngine())
    (*_, first), (*_, second) = memory.stream(CHAT), memory.stream(CHAT)
    assert first.usage
    assert second.usage
    assert first.usage.prompt_tokens == second.usage.prompt_tokens == len(memory.engine.template.prompt(CHAT).token_ids)
    assert first.usage.completion_tokens == len("Wörld?".encode())
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, second.usage.prompt_tokens - 1)
    assert first.finish_reason == "stop"


def test_tenants_do_not_see_each_others_prompts() -> None:
    engine = EchoEngine()
    list(KVCacheMemory(engine, namespace="a").stream(CHAT))
    *_, other = KVCacheMemory(engine, namespace="b").stream(CHAT)
    assert other.usage
    assert other.usage.cached_tokens == 0


def test_documents_are_read_and_not_cached() -> None:
    memory = KVCacheMemory(EchoEngine(whole_prompt))
    messages = [{"role": "user", "content": [Document("one. "), Document("two. "), "Which?"]}]
    assert said(memory.engine, messages) == "user: one. two. Which?"
    with pytest.raises(UnsupportedModelError, match="HFEngine"):
        memory.extract("one")


def test_what_cannot_work_is_refused_before_anything_is_said(tiny_engine) -> None:
    engine = EchoEngine(context_length=64)
    with pytest.raises(ContextLengthError):
        said(engine, max_new_tokens=60)
    with pytest.raises(InvalidInputError, match="tempo"):
        engine.sampling(tempo=1)
    with pytest.raises(EmptyPromptError):
        engine.stream(Prompt((), (), ()), engine.sampling())
    with pytest.raises(UnsupportedModelError, match="whole prompt"):
        engine.stream(engine.template.prompt(CHAT), engine.sampling(), tiny_engine.build_kv_cache("x"))


def test_under_a_constraint_it_says_its_answer_if_that_fits_and_else_the_shortest_text_that_does() -> None:
    pytest.importorskip("llguidance")
    memory = KVCacheMemory(EchoEngine())
    for question, pattern, expected in (("12", "[0-9]+", "12"), ("twelve", "[0-9]{3}", 3)):
        *_, last = chunks = list(memory.stream(question, constraint=Regex(pattern)))
        text = "".join(chunk.text for chunk in chunks)
        assert text == expected or (len(text) == expected and text.isdigit())
        assert last.finish_reason == "stop"
