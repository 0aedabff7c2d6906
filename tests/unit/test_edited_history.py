"""Histories that are edited: the messages that stay are moved and reused, and marked as merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcag import Document, HFEngine, KVCacheMemory
from kvcag.cache.layers import layers_of
from kvcag.contexts import with_kept_history
from kvcag.core import MergeSettings, Usage
from kvcag.testing import byte_tokenizer, tiny_model

MODEL, TOKENIZER = tiny_model(), byte_tokenizer()
SYSTEM = {"role": "system", "content": "You help a librarian. Be brief."}
SAID = [
    ("user", "Which reader has not brought back the atlas of Norway that was lent in May, and how late is it?"),
    ("assistant", "Carol has it. She is at sea, and the atlas is eleven weeks late. A letter was sent to her in June."),
    ("user", "And the book on bicycles, which was lent twice in the same week? Somebody must have made a mistake."),
    ("assistant", "Alice lent it to Bob. She says that he gave it back, and he says that he never had it at home."),
    ("user", "Write down that it is lost, and order another copy from the shop in Harbour Street, if they have one."),
    ("assistant", "I have written it down. The shop has one copy, at nine pounds, and keeps it until Saturday noon."),
]
HISTORY = [{"role": role, "content": text} for role, text in SAID]
QUESTION = {"role": "user", "content": "Who is late?"}


NOTES = ["The library opens at nine.\n\n", "Fines are two pence a day.\n\n", "Atlases are lent for a month.\n\n"]


def asked(*messages: dict[str, Any], notes: list[int] | tuple[int, ...] = ()) -> list[dict[str, Any]]:
    documents = [Document(NOTES[note]) for note in notes]
    return [{"role": "system", "content": [SYSTEM["content"], *documents]}, *messages, QUESTION]


def ask(memory: KVCacheMemory, conversation: list[dict[str, Any]], **options: Any) -> tuple[str, Usage]:
    answer = memory.ask(conversation, [], max_new_tokens=4, **options)
    return answer.text, answer.usage


def memory_of(history: list[dict[str, Any]]) -> KVCacheMemory:
    """A memory that was asked after this history."""
    memory = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
    ask(memory, asked(*history))
    return memory


CLEARED = [HISTORY[0], {"role": "assistant", "content": "[cleared]"}, *HISTORY[2:]]
SUMMARY = [{"role": "user", "content": "Summary: Carol has the atlas of Norway."}, *HISTORY[2:]]
TRIMMED = HISTORY[2:]
EDITS = {"cleared": CLEARED, "summarised": SUMMARY, "trimmed": TRIMMED}


@pytest.mark.parametrize("edit", EDITS)
def test_what_stays_of_an_edited_history_is_moved_and_not_read_again(edit: str) -> None:
    memory = memory_of(HISTORY)
    _, usage = ask(memory, asked(*EDITS[edit]))
    assert usage.context is not None
    assert usage.context.mode == "merged"
    assert usage.context.recomputed_tokens == 0
    assert "of the conversation were moved" in usage.context.reason
    kept = sum(len(message["content"]) for message in EDITS[edit] if message in HISTORY)
    assert usage.prompt_tokens - usage.cached_tokens <= usage.prompt_tokens - kept
    assert usage.cached_tokens + usage.created_tokens == usage.prompt_tokens


def test_without_a_system_message_too() -> None:
    memory = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
    ask(memory, [*HISTORY, QUESTION])
    _, usage = ask(memory, [*HISTORY[2:], QUESTION])
    assert usage.context is not None
    assert usage.context.reused_tokens > sum(len(message["content"]) for message in HISTORY[2:])


def test_the_next_turn_reads_its_own_tokens_only() -> None:
    memory = memory_of(HISTORY)
    said, _ = ask(memory, asked(*CLEARED))
    goes_on = [*asked(*CLEARED), {"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
    _, usage = ask(memory, goes_on)
    assert usage.context is not None
    assert usage.context.mode == "merged"
    assert usage.context.encoded_tokens == 0
    assert usage.prompt_tokens - usage.cached_tokens < 80


def test_a_history_that_is_edited_twice_is_moved_twice() -> None:
    memory = memory_of(HISTORY)
    ask(memory, asked(*CLEARED))
    _, usage = ask(memory, asked(*CLEARED[:2], *CLEARED[3:]))
    assert usage.context is not None
    assert usage.context.mode == "merged"
    assert usage.prompt_tokens - usage.cached_tokens < 100


@pytest.mark.parametrize("strategy", ["auto", "query", "rotate"])
def test_a_history_behind_documents_is_moved_too(strategy: Any) -> None:
    memory = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
    for notes in ([2, 0], [1, 2]):  # the second time behind other documents
        ask(memory, asked(*HISTORY, notes=notes), strategy=strategy)
        said, usage = ask(memory, asked(*CLEARED, notes=notes), strategy=strategy)
        assert usage.context is not None
        assert usage.context.mode == "merged"
        assert usage.context.context_tokens > sum(len(message["content"]) for message in CLEARED)
        assert usage.prompt_tokens - usage.cached_tokens < 200 + usage.context.recomputed_tokens
        goes_on = [*CLEARED, QUESTION, {"role": "assistant", "content": said}]
        _, usage = ask(memory, asked(*goes_on, notes=notes), strategy=strategy)
        assert usage.context is not None
        assert usage.context.mode == "merged"
        assert usage.context.recomputed_tokens == 0
        assert usage.prompt_tokens - usage.cached_tokens < 80


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("settings", [{"strategy": "full"}, {"strategy": "query", "ratio": 1.0}])
def test_recomputed_as_a_whole_it_is_a_full_prefill(edit: str, settings: dict[str, Any]) -> None:
    memory = memory_of(HISTORY)
    prompt = memory.engine.template.prompt(asked(*EDITS[edit]))
    context = with_kept_history(memory.documents, prompt, None, MergeSettings(**settings))
    assert context is not None
    right, _ = HFEngine(MODEL, TOKENIZER).prefill(context.token_ids.tolist())
    for ours, theirs in zip(layers_of(context.cache), right, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_what_is_new_between_moved_messages_is_computed_where_it_stands() -> None:
    """In the first layer no token sees another: what is moved and what is new is right there."""
    memory = memory_of(HISTORY)
    prompt = memory.engine.template.prompt(asked(*SUMMARY))
    context = with_kept_history(memory.documents, prompt, None, MergeSettings())
    assert context is not None
    right, _ = HFEngine(MODEL, TOKENIZER).prefill(context.token_ids.tolist())
    for one, other in zip(layers_of(context.cache)[0], right[0], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_who_asks_for_exact_gets_a_full_prefill() -> None:
    memory = memory_of(HISTORY)
    ask(memory, asked(*CLEARED))
    text, usage = ask(memory, asked(*CLEARED), strategy="exact")
    assert usage.context is None
    assert text == ask(KVCacheMemory(HFEngine(MODEL, TOKENIZER)), asked(*CLEARED), strategy="exact")[0]


def test_another_namespace_finds_nothing() -> None:
    engine = HFEngine(MODEL, TOKENIZER)
    ask(KVCacheMemory(engine, namespace="mine"), asked(*HISTORY))
    _, usage = ask(KVCacheMemory(engine, namespace="theirs"), asked(*CLEARED))
    assert (usage.context, usage.cached_tokens) == (None, 0)


def test_a_history_that_was_forgotten_is_not_found() -> None:
    memory = memory_of(HISTORY)
    memory.purge(SAID[0][1])
    _, usage = ask(memory, asked(*CLEARED))
    assert (usage.context, usage.cached_tokens) == (None, 0)


def test_where_little_stays_the_prompt_is_read_and_exact() -> None:
    memory = memory_of(HISTORY)
    _, usage = ask(memory, asked(HISTORY[2], HISTORY[3]))
    assert usage.context is None  # 250 tokens are read sooner than they are worth being an approximation
    new = {"role": "user", "content": " ".join(text for _, text in SAID).upper()}
    _, usage = ask(memory, asked(new, *HISTORY[2:]))
    assert usage.context is None  # most of it is new


def test_a_model_that_cannot_be_merged_reads_the_history() -> None:
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    memory = KVCacheMemory(HFEngine(model, TOKENIZER))
    ask(memory, asked(*HISTORY))
    _, usage = ask(memory, asked(*CLEARED))
    assert usage.context is None


def test_a_model_whose_keys_cannot_be_moved_reads_an_edited_history() -> None:
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    memory = KVCacheMemory(HFEngine(model, TOKENIZER))
    ask(memory, asked(*HISTORY), strategy="query")
    _, usage = ask(memory, asked(*TRIMMED), strategy="query")
    assert usage.context is None


steps = st.tuples(
    st.sampled_from(["say", "clear", "drop", "summarise"]),
    st.integers(0, 5),
    st.sampled_from(["auto", "exact", "query", "rotate"]),
    st.sampled_from(["", "other"]),
    st.sampled_from([(), (0,), (2, 1), (1, 2, 0)]),  # documents
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, min_size=3, max_size=7))
def test_whatever_is_edited_exact_is_a_full_prefill_and_no_figure_lies(taken: list[Any]) -> None:
    engine = HFEngine(MODEL, TOKENIZER)
    memories = {name: KVCacheMemory(engine, namespace=name) for name in ("", "other")}
    history = list(HISTORY)
    for step, at, strategy, namespace, notes in taken:
        if step == "say":
            history += [QUESTION, {"role": "assistant", "content": f"Carol is, by {at} weeks."}]
        elif step == "clear":
            history[at % len(history)] = {**history[at % len(history)], "content": "[cleared]"}
        elif step == "drop" and len(history) > 3:
            del history[at % len(history)]
        elif step == "summarise":
            history[:2] = [{"role": "user", "content": f"Summary {at}: Carol has the atlas."}]
        conversation = asked(*history, notes=notes)
        text, usage = ask(memories[namespace], conversation, strategy=strategy)
        assert usage.cached_tokens + usage.created_tokens <= usage.prompt_tokens
        report = usage.context
        if report is not None:
            assert report.reused_tokens + report.recomputed_tokens + report.encoded_tokens == report.context_tokens
        if report is None or report.is_exact:
            fresh = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
            assert text == ask(fresh, conversation, strategy="exact")[0]
        else:
            assert strategy != "exact"
