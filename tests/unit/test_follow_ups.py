"""Conversations over merged documents: what follows is reused and marked, and never given to who asked for `exact`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcag import CacheWarning, Choices, Document, HFEngine, KVCacheMemory
from kvcag.cache.layers import concat, contiguous_copy, layers_of
from kvcag.cache.merge import Layout, recompute
from kvcag.cache.prefix_cache import _below
from kvcag.core import MergeSettings, Usage
from kvcag.stores.disk import DiskStore
from kvcag.testing import CHATML, byte_tokenizer, tiny_model
from tests.forwards import forward_lengths
from tests.waits import run_together, until

TEXTS = ["Alice has a red bicycle.\n\n", "Bob has a green car.\n\n", "Carol sails to Norway.\n\n"]
QUESTIONS = ["Who has a car?", "What does Alice have?", "Where does Carol sail?"]
ROLES = ("user", "assistant")
MODEL, TOKENIZER = tiny_model(), byte_tokenizer()


def messages(order: list[int], turns: list[tuple[str, str]], question: str) -> list[dict[str, Any]]:
    said = [{"role": role, "content": text} for turn in turns for role, text in zip(ROLES, turn, strict=True)]
    documents = [Document(TEXTS[index]) for index in order]
    return [
        {"role": "system", "content": ["Answer from these.\n\n", *documents]},
        *said,
        {"role": "user", "content": question},
    ]


def ask(memory: KVCacheMemory, conversation: list[dict[str, Any]], **options: Any) -> tuple[str, Usage]:
    answer = memory.ask(conversation, max_new_tokens=6, **options)
    return answer.text, answer.usage


@pytest.mark.parametrize("strategy", ["auto", "query", "rotate"])
def test_a_follow_up_prefills_only_its_own_tokens(strategy: Any) -> None:
    """After a merge nothing behind the documents was reused: each turn merged them again, and read the history."""
    memory = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
    turns: list[tuple[str, str]] = []
    for index, question in enumerate(QUESTIONS):
        text, usage = ask(memory, messages([0, 1, 2], turns, question), strategy=strategy)
        assert usage.context is not None
        assert usage.context.mode == "merged"
        if index:
            prefilled = usage.prompt_tokens - usage.cached_tokens
            assert prefilled < len(question) + 80  # the question and the template around it, a token a byte
            assert usage.context.recomputed_tokens == usage.context.encoded_tokens == 0
            assert usage.context.reason.startswith("merged for an earlier question")
        turns.append((question, text))


def test_who_asks_for_exact_never_gets_a_merged_context() -> None:
    memory = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
    first = messages([2, 0, 1], [], QUESTIONS[0])
    said, _ = ask(memory, first, strategy="rotate")
    follow_up = messages([2, 0, 1], [(QUESTIONS[0], said)], QUESTIONS[1])
    for conversation in (first, follow_up):
        text, usage = ask(memory, conversation, strategy="exact")
        assert usage.context is not None
        assert usage.context.is_exact
        assert text == ask(KVCacheMemory(HFEngine(MODEL, TOKENIZER)), conversation, strategy="exact")[0]


def test_another_namespace_reuses_nothing() -> None:
    engine = HFEngine(MODEL, TOKENIZER)
    mine, theirs = (KVCacheMemory(engine, namespace=name) for name in ("mine", "theirs"))
    conversation = messages([0, 1], [], QUESTIONS[0])
    ask(mine, conversation, strategy="query")
    _, usage = ask(theirs, conversation, strategy="query")
    assert usage.cached_tokens == 0


def test_a_forgotten_conversation_is_not_reused() -> None:
    memory = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
    said, _ = ask(memory, messages([0, 1], [], QUESTIONS[0]))
    memory.purge(TEXTS[1])
    _, usage = ask(memory, messages([0, 1], [(QUESTIONS[0], said)], QUESTIONS[1]), strategy="query")
    assert usage.context is not None
    assert usage.context.encoded_tokens >= len(TEXTS[1])


def test_a_context_that_is_asked_about_again_becomes_exact_when_the_model_is_idle() -> None:
    engine = HFEngine(MODEL, TOKENIZER)
    memory = KVCacheMemory(engine)
    for question in QUESTIONS[:2]:
        ask(memory, messages([1, 0, 2], [], question))
    context_ids = engine.template.prompt(messages([1, 0, 2], [], "?")).context_ids
    until(lambda: engine.known_prefix(context_ids) == len(context_ids))
    text, usage = ask(memory, messages([1, 0, 2], [], QUESTIONS[2]))
    assert usage.context is not None
    assert usage.context.is_exact
    fresh = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
    assert text == ask(fresh, messages([1, 0, 2], [], QUESTIONS[2]), strategy="exact")[0]


def test_a_context_that_cannot_be_encoded_in_the_background_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    engine = HFEngine(MODEL, TOKENIZER)
    memory = KVCacheMemory(engine)
    ask(memory, messages([0, 2], [], QUESTIONS[0]))

    def fail(token_ids: tuple[int, ...], namespace: str) -> None:
        raise RuntimeError("the device is lost")

    engine._encode_in_background = fail  # type: ignore[method-assign]
    ask(memory, messages([0, 2], [], QUESTIONS[1]))
    until(lambda: "could not be encoded in the background" in caplog.text)
    until(lambda: engine._idle._thread is None)


def agentic(groups: list[list[int]], question: str = QUESTIONS[0]) -> list[dict[str, Any]]:
    """A conversation in which a search found documents several times."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": "Search."}, {"role": "user", "content": question}]
    for group in groups:
        turns.append({"role": "assistant", "content": "search()"})
        turns.append({"role": "tool", "content": ["Found:\n", *(Document(TEXTS[index]) for index in group)]})
    return turns


@pytest.mark.parametrize("strategy", ["auto", "query", "rotate"])
def test_documents_of_tool_results_are_found_by_their_content(strategy: Any) -> None:
    """They were read with the conversation, each time, and reported as exact."""
    memory = KVCacheMemory(HFEngine(MODEL, TOKENIZER), instruction="Search.")
    memory.add(TEXTS)
    _, usage = ask(memory, agentic([[2, 0]]), strategy=strategy)
    assert usage.context is not None
    assert usage.context.mode == "merged"
    head = len(memory.engine.template.prompt(agentic([[2, 0]])).head_ids)
    assert usage.context.encoded_tokens <= head
    _, usage = ask(memory, agentic([[2, 0], [1]]), strategy=strategy)
    assert usage.context is not None
    assert usage.context.mode == "merged"
    assert usage.context.encoded_tokens < 40  # what stands between the two groups
    assert usage.context.recomputed_tokens <= len(TEXTS[1])  # the first group is as it was


@pytest.mark.parametrize("strategy", ["auto", "query"])
def test_documents_before_documents_that_were_merged_otherwise_are_not_reused_as_they_are(strategy: Any) -> None:
    memory = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
    ask(memory, agentic([[2, 0]]), strategy="rotate")
    _, usage = ask(memory, agentic([[2, 0], [1]]), strategy=strategy, ratio=1.0)
    assert usage.context is not None
    assert usage.context.recomputed_tokens >= len(TEXTS[0]) + len(TEXTS[1])


def test_several_groups_recomputed_as_a_whole_are_a_full_prefill() -> None:
    memory = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
    prompt = memory.engine.template.prompt(agentic([[1, 2], [0], [2, 1]]))
    context = memory.context_for(prompt, MergeSettings("full"))
    assert tuple(context.token_ids.tolist()) == prompt.context_ids
    right, _ = HFEngine(MODEL, TOKENIZER).prefill(prompt.context_ids)
    for ours, theirs in zip(layers_of(context.cache), right, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_several_groups_are_exact_for_who_asks_for_exact() -> None:
    memory = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
    for groups in ([[1]], [[1], [2]], [[1], [2, 0]]):
        ask(memory, agentic(groups), strategy="auto")
        text, usage = ask(memory, agentic(groups), strategy="exact")
        assert usage.context is not None
        assert usage.context.is_exact
        assert text == ask(KVCacheMemory(HFEngine(MODEL, TOKENIZER)), agentic(groups), strategy="exact")[0]


asked = st.tuples(
    st.permutations([0, 1, 2]),
    st.sampled_from(QUESTIONS),
    st.sampled_from(["exact", "auto", "query", "rotate"]),
    st.sampled_from(["", "other"]),
    st.booleans(),  # whether the conversation goes on
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(asked, min_size=2, max_size=6))
def test_whatever_was_asked_before_exact_is_a_full_prefill_and_no_figure_lies(asks: list[Any]) -> None:
    engine = HFEngine(MODEL, TOKENIZER)
    memories = {name: KVCacheMemory(engine, namespace=name) for name in ("", "other")}
    turns: dict[tuple[str, tuple[int, ...]], list[tuple[str, str]]] = {}
    for order, question, strategy, namespace, goes_on in asks:
        history = turns.setdefault((namespace, tuple(order)), []) if goes_on else []
        conversation = messages(list(order), history, question)
        text, usage = ask(memories[namespace], conversation, strategy=strategy)
        report = usage.context
        assert report is not None
        assert report.reused_tokens + report.recomputed_tokens + report.encoded_tokens == report.context_tokens
        assert usage.cached_tokens + usage.created_tokens <= usage.prompt_tokens
        if report.is_exact:
            fresh = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
            assert text == ask(fresh, conversation, strategy="exact")[0]
        else:
            assert strategy != "exact"
        if goes_on:
            history.append((question, text))


def test_a_token_that_is_recomputed_alone_sees_nothing_behind_it() -> None:
    """It attended to all keys, the later ones too."""
    engine = HFEngine(MODEL, TOKENIZER)
    ids = torch.randint(0, 250, (20,), generator=torch.Generator().manual_seed(3))
    wanted, _ = engine.prefill(ids.tolist())
    layers = contiguous_copy(wanted)
    layout = Layout(ids, torch.zeros(20, dtype=torch.long), torch.ones(20, dtype=torch.bool))
    with engine.exclusive() as model:
        recompute(model, layers, layout, torch.tensor([5]), correct=False)
    for (keys, values), (right_keys, right_values) in zip(layers, wanted, strict=True):
        torch.testing.assert_close(keys, right_keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, right_values, atol=1e-4, rtol=1e-4)


def test_who_asks_with_other_settings_gets_another_context() -> None:
    memory = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
    conversation = messages([0, 1, 2], [], QUESTIONS[0])
    ask(memory, conversation, strategy="rotate")
    _, usage = ask(memory, conversation, ratio=1.0)
    assert usage.context is not None
    assert usage.context.recomputed_tokens > 0
    matched, pieces = memory.engine.prefixes.match(  # type: ignore[attr-defined]
        memory.engine.template.prompt(conversation).context_ids, merged=True
    )
    exact, _ = HFEngine(MODEL, TOKENIZER).prefill(memory.engine.template.prompt(conversation).context_ids)
    kept = concat(pieces)
    assert matched == kept[0][0].shape[-2]
    for (keys, _), (right, _) in zip(kept, exact, strict=True):  # the better merge took the place of the worse one
        torch.testing.assert_close(keys, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("read", [0, 1])
def test_what_is_purged_before_or_in_the_middle_of_an_answer_does_not_come_back(read: int) -> None:
    engine = HFEngine(MODEL, TOKENIZER)
    memory = KVCacheMemory(engine)
    stream = memory.stream(messages([0, 1], [], QUESTIONS[0]), strategy="query", max_new_tokens=8)
    for _ in range(read):
        next(stream)
    memory.purge(TEXTS[0])
    list(stream)
    ids = engine.template.prompt(messages([0, 1], [], QUESTIONS[0])).context_ids
    assert engine.known_prefix(ids, merged=True) == 0


def test_many_merges_at_once_over_a_model_whose_drift_is_not_known_end() -> None:
    """One held the model and waited for the drift, another learned the drift and waited for the model."""
    engine = HFEngine(tiny_model(seed=11), TOKENIZER)
    memory = KVCacheMemory(engine)
    ids = memory.add(TEXTS)
    threads = [threading.Thread(target=memory.get_cache, args=(ids[turn:],), daemon=True) for turn in (0, 0, 1)]
    run_together(threads, seconds=30)


def test_a_refined_context_takes_its_bytes_once() -> None:
    engine = HFEngine(MODEL, TOKENIZER)
    memory = KVCacheMemory(engine)
    for question in QUESTIONS[:2]:
        ask(memory, messages([2, 1, 0], [], question))
    until(lambda: engine._idle._thread is None)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for root in engine.prefixes._roots.values()
        for node in _below(root)
        for layer in node.layers
        for tensor in layer
    }
    assert sum(storages.values()) <= 1.01 * engine.prefixes.nbytes


ASCII = Choices(["yes", "no"])  # text that stands for its tokens


@pytest.mark.parametrize("strategy", ["auto", "exact", "query", "rotate"])
@pytest.mark.parametrize("documents", [0, 1, 3])
def test_each_token_of_a_conversation_is_run_once(strategy: Any, documents: int) -> None:
    """Over a merged context too, and when a turn is taken back or the conversation goes on in two directions."""
    engine = HFEngine(MODEL, TOKENIZER)
    memory = KVCacheMemory(engine)
    turns: list[tuple[str, str]] = []

    def say(question: str, turns: list[tuple[str, str]]) -> int:
        """Tokens that ran, but for those of the answer."""
        conversation = messages(list(range(documents)), turns, question)
        with forward_lengths(MODEL) as lengths:
            answer = memory.ask(conversation, ids=[], strategy=strategy, constraint=ASCII)
        turns.append((question, answer.text))
        return sum(lengths) - (answer.usage.completion_tokens - 1)

    def new(question: str) -> int:
        return 1 + len(
            TOKENIZER(f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
        )

    say(QUESTIONS[0], turns)
    assert say(QUESTIONS[1], turns) == new(QUESTIONS[1])
    other = turns[:1]  # the last turn is taken back
    assert say(QUESTIONS[2], other) <= new(QUESTIONS[2])
    assert say("Is that so?", turns) == new("Is that so?")
    assert say("Is it?", other) == new("Is it?")


def test_a_template_that_rewrites_history_costs_only_what_differs() -> None:
    strips = CHATML.replace(
        "message['content'] }}",
        "message['content'].split('</think>')[-1] if message.role == 'assistant' else message['content'] }}",
    )
    engine = HFEngine(MODEL, byte_tokenizer(strips))
    asked = [{"role": "user", "content": "a long question that is not prefilled again"}]
    thinks = engine.generate(asked, constraint=Choices(["<think>why</think>so"]))
    again = [*asked, {"role": "assistant", "content": thinks}, {"role": "user", "content": "and now?"}]
    usage = KVCacheMemory(engine).ask(again, ids=[], max_new_tokens=2).usage
    first = len(engine.template.prompt(asked).token_ids)
    assert usage.cached_tokens == first
    assert usage.prompt_tokens == len(engine.template.prompt(again).token_ids)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(["say", "say", "back", "abandon", "fail"]), max_size=8))
def test_whatever_happened_before_the_next_answer_is_that_of_a_replay(steps: list[str]) -> None:
    memory, said = KVCacheMemory(HFEngine(MODEL, TOKENIZER)), list[tuple[str, str]]()
    for number, step in enumerate(steps):
        conversation = messages([0, 1], said, f"q{number}")
        if step == "say":
            said.append((f"q{number}", memory.ask(conversation, strategy="exact", max_new_tokens=3).text))
        elif step == "back":
            del said[-1:]
        elif step == "abandon":
            stream = memory.stream(conversation, strategy="exact", max_new_tokens=3)
            next(stream)
            stream.close()
        else:
            hook = MODEL.model.layers[1].register_forward_pre_hook(fails)
            with hook, pytest.raises(RuntimeError, match="the device is lost"):
                memory.ask(conversation, strategy="exact", max_new_tokens=3)
    last = messages([0, 1], said, "last?")
    fresh = KVCacheMemory(HFEngine(MODEL, TOKENIZER))
    assert ask(memory, last, strategy="exact")[0] == ask(fresh, last, strategy="exact")[0]


def fails(module: Any, args: Any) -> None:
    raise RuntimeError("the device is lost")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_exact_takes_a_context_from_the_store(architecture: str, tmp_path: Path) -> None:
    """It was read again, though the store had it, by a model whose caches cannot be merged under `auto` too."""
    model = MODEL if architecture == "llama" else tiny_model("gpt2", n_embd=32, n_head=4, n_layer=2, n_positions=2048)
    store = DiskStore(tmp_path)
    id = KVCacheMemory(HFEngine(model, TOKENIZER), store).create_context(TEXTS, "Answer from these.")
    question = [{"role": "user", "content": QUESTIONS[0]}]
    wanted = None
    for strategy in ("exact", "auto"):
        memory = KVCacheMemory(HFEngine(model, TOKENIZER), store)
        with forward_lengths(model) as lengths:
            answer = memory.ask(memory.with_context(id, question), strategy=strategy, max_new_tokens=4)
        report = answer.report
        assert report is not None
        assert report.is_exact
        head = len(memory.engine.template.instruction_ids(None))
        assert (report.encoded_tokens, report.reused_tokens) == (head, report.context_tokens - head)
        assert sum(lengths) == answer.usage.prompt_tokens - report.reused_tokens + 3
        bare = HFEngine(model, TOKENIZER)
        prompt = bare.template.prompt(memory.with_context(id, question))
        wanted = wanted or "".join(chunk.text for chunk in bare.stream(prompt, bare.sampling(max_new_tokens=4)))
        assert answer.text == wanted


def test_exact_reads_again_what_the_store_cannot_give(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    memory = KVCacheMemory(HFEngine(MODEL, TOKENIZER), store)
    id = memory.create_context(TEXTS)
    conversation = memory.with_context(id, [{"role": "user", "content": QUESTIONS[0]}])
    store.file(id).write_bytes(b"")
    later = KVCacheMemory(HFEngine(MODEL, TOKENIZER), store)
    with pytest.warns(CacheWarning, match="again"):
        text, usage = ask(later, conversation, strategy="exact")
    assert usage.context is not None
    assert usage.context.is_exact
    assert text == ask(KVCacheMemory(HFEngine(MODEL, TOKENIZER)), conversation, strategy="exact")[0]
