"""CacheScheduler with a tiny model: storing, encoding, evicting and saving."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import layers_of, nbytes
from kvcag.chat_template import Document
from kvcag.core import TextualMemoryItem
from kvcag.errors import (
    CacheWarning,
    ContextLengthError,
    EmptyPromptError,
    InvalidInputError,
    StoreFullError,
    UnknownItemError,
    UnsupportedModelError,
)
from kvcag.scheduler import CacheScheduler, Policy, TextStats, gdsf
from kvcag.scheduler.store import logger
from kvcag.stores.disk import DiskStore
from kvcag.stores.memory import MemoryStore
from kvcag.testing import EchoEngine, byte_tokenizer, tiny_model
from tests.forwards import forward_lengths
from tests.stored import AskedStore
from tests.waits import run_together, until

PER_TOKEN = 384  # bytes: 2 × 3 layers × 2 heads × 8 × 4
TEXTS = [f"Document {number} says a little about {number}." for number in range(8)]


def scheduler_of(memory: KVCacheMemory, tokens: int = 1000, **settings: object) -> CacheScheduler:
    given = {"every_s": None, "quiet_s": 0.0, **settings}
    return CacheScheduler(memory, tokens * PER_TOKEN, **given)  # type: ignore[arg-type]


@pytest.fixture
def memory(tiny_engine: HFEngine) -> KVCacheMemory:
    assert tiny_engine.bytes_per_token == PER_TOKEN
    return KVCacheMemory(tiny_engine)


@pytest.fixture
def scheduler(memory: KVCacheMemory) -> Iterator[CacheScheduler]:
    with scheduler_of(memory) as made:
        yield made


def ask(memory: KVCacheMemory, *texts: str, head: str = "Use:\n\n", max_new_tokens: int = 4) -> str:
    system = [head, *(Document(f"{text}\n\n") for text in texts)]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "What?"}]
    return "".join(
        chunk.text for chunk in memory.stream(messages, sampling=memory.engine.sampling(max_new_tokens=max_new_tokens))
    )


def held_bytes(memory: KVCacheMemory) -> int:
    return sum(nbytes(layers_of(item.memory)) for item in memory.get_all())


def texts_of(memory: KVCacheMemory) -> set[str]:
    return {item.records.composed_text_memory.strip() for item in memory.get_all()}


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", logger=logger.name)
    return caplog


def actions(logged: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().split()[0] for record in logged.records if record.name == logger.name]


def lru(stats: TextStats, tokens: int, size: int, now: float) -> float:
    return stats.last


# --- promotion --------------------------------------------------------------------------------------------------


def test_a_text_retrieved_twice_is_encoded_before_a_question(memory: KVCacheMemory, scheduler: CacheScheduler) -> None:
    scheduler.observe(TEXTS[:3])
    scheduler.observe(TEXTS[1:4])
    assert len(scheduler.run_once().promoted) == 2
    assert texts_of(memory) == set(TEXTS[1:3])
    with forward_lengths(memory.engine.model) as lengths:
        ask(memory, *TEXTS[1:3], head="")
    assert max(lengths) < 60  # a fifth of the documents, and the question


def test_a_promoted_item_equals_the_item_that_an_answer_encodes(memory: KVCacheMemory) -> None:
    plain = KVCacheMemory(HFEngine(tiny_model(), byte_tokenizer()))
    expected = ask(plain, *TEXTS[:3])
    with scheduler_of(memory) as scheduler:
        ask(memory, TEXTS[7])  # shows where documents stand
        for _ in range(2):
            scheduler.observe(TEXTS[:3])
        promoted = scheduler.run_once().promoted
        assert set(promoted) <= set(plain.store.keys())
        for key in promoted:
            ours, theirs = memory.store.get(key), plain.store.get(key)
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours.token_ids, theirs.token_ids)
            assert (ours.prefix_digest, ours.base_position) == (theirs.prefix_digest, theirs.base_position)
            for a, b in zip(layers_of(ours.memory), layers_of(theirs.memory), strict=True):
                assert torch.allclose(a[0], b[0], atol=1e-5)
                assert torch.allclose(a[1], b[1], atol=1e-5)
        with forward_lengths(memory.engine.model) as lengths:
            assert ask(memory, *TEXTS[:3]) == expected
        assert max(lengths) < 60  # nothing but a fifth of the documents, and the question


def test_nothing_is_rebuilt_where_nothing_changed(
    memory: KVCacheMemory, scheduler: CacheScheduler, logged: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        scheduler.observe(TEXTS[:3])
    scheduler.run_once()
    with forward_lengths(memory.engine.model) as lengths:
        for _ in range(3):
            report = scheduler.run_once()
            assert report == ([], [], [])
    assert lengths == []
    assert actions(logged) == ["promoted"] * 3


def test_a_working_set_on_disk_is_found_again_and_not_rebuilt(tmp_path: Path, tiny_engine: HFEngine) -> None:
    state = tmp_path / "scheduler.sqlite"
    for start in range(2):
        memory = KVCacheMemory(tiny_engine, DiskStore(tmp_path / "kv"))
        with scheduler_of(memory, state=state) as scheduler, forward_lengths(tiny_engine.model) as lengths:
            scheduler.observe(TEXTS[:3])
            scheduler.observe(TEXTS[:3])
            scheduler.run_once()
            assert bool(lengths) == (start == 0)
            assert scheduler.metrics()["caches"] == 3


def test_after_a_restart_the_hot_ones_are_encoded_before_the_first_question(
    tmp_path: Path, tiny_engine: HFEngine
) -> None:
    """Counters, texts and the form of the prompt are loaded; a store in memory has lost its caches."""
    state = tmp_path / "scheduler.sqlite"
    memory = KVCacheMemory(tiny_engine, MemoryStore())
    with scheduler_of(memory, state=state):
        for _ in range(3):
            ask(memory, *TEXTS[:2])
        before = set(memory.store.keys())
    memory = KVCacheMemory(tiny_engine, MemoryStore())
    with scheduler_of(memory, state=state) as scheduler:
        assert set(scheduler.run_once().promoted) == before
        why = scheduler.why(TEXTS[0])
        assert (why.action, why.reason, why.count) == ("promoted", "hot and not cached", 3)


def test_another_model_encodes_the_hot_ones_again(tmp_path: Path, tiny_engine: HFEngine) -> None:
    state, store = tmp_path / "scheduler.sqlite", DiskStore(tmp_path / "kv")
    memory = KVCacheMemory(tiny_engine, store)
    with scheduler_of(memory, state=state):
        for _ in range(3):
            ask(memory, TEXTS[0])
    memory = KVCacheMemory(HFEngine(tiny_model(seed=1), byte_tokenizer()), store)
    with scheduler_of(memory, state=state) as scheduler:
        assert scheduler.metrics()["caches"] == 0  # the other model's stay as they are, and are not counted
        [key] = scheduler.run_once().promoted
        item = store.get(key)
        assert item is not None
        assert item.fingerprint == memory.engine.fingerprint
    assert len(list(store.keys())) == 2


def test_a_text_that_does_not_fit_the_models_context_is_tried_once(
    memory: KVCacheMemory, scheduler: CacheScheduler, logged: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        scheduler.observe(["x" * 600, "y" * 3000])
    with scheduler_of(KVCacheMemory(memory.engine), 9000) as larger:
        for _ in range(3):
            larger.observe(["x" * 600, "y" * 3000])
        assert len(larger.run_once().promoted) == 1
        assert larger.run_once().promoted == []
        assert actions(logged) == ["failed", "promoted"]
        assert larger.why("y" * 3000).action == "failed"
        assert "2048" in larger.why("y" * 3000).reason
        with pytest.raises(ContextLengthError, match="more than the model's context"):
            larger.promote("y" * 3000)


def test_in_the_background_it_promotes_without_being_told(memory: KVCacheMemory) -> None:
    with scheduler_of(memory, every_s=60.0, quiet_s=0.01) as scheduler:
        for _ in range(2):
            scheduler.observe(TEXTS[:2])
        until(lambda: scheduler.metrics()["promoted"] == 2)
    assert texts_of(memory) == set(TEXTS[:2])


def test_it_waits_for_the_answer_that_is_running(memory: KVCacheMemory) -> None:
    with scheduler_of(memory, every_s=60.0, quiet_s=0.2) as scheduler:
        for _ in range(2):
            scheduler.observe(TEXTS[:4])
        for _ in range(10):  # a question every so often
            ask(memory, TEXTS[7])
            time.sleep(0.02)
        assert scheduler.metrics()["promoted"] == 0
        until(lambda: scheduler.metrics()["promoted"] == 4)


# --- demotion ---------------------------------------------------------------------------------------------------


def test_a_text_whose_cache_was_deleted_is_known_and_can_come_back(
    memory: KVCacheMemory, scheduler: CacheScheduler, logged: pytest.LogCaptureFixture
) -> None:
    [key] = scheduler.promote(TEXTS[0])
    assert scheduler.demote(key) == [key]
    assert scheduler.demote([key, "unknown"]) == []
    assert memory.get(key) is None
    why = scheduler.why(key)
    assert (why.text, why.id, why.is_cached) == (f"{TEXTS[0]}\n\n", key, False)
    assert str(why).startswith("not cached: demoted at 20")
    assert str(why).endswith("; on demand; used 0 times")
    assert scheduler.promote(key) == [key]
    assert memory.get(key) is not None
    assert actions(logged) == ["promoted", "demoted", "promoted"]
    assert scheduler.demote(TEXTS[0]) == [key]  # by the text, too


def test_the_cold_make_room_for_the_hot_and_not_the_other_way_round(
    memory: KVCacheMemory, logged: pytest.LogCaptureFixture
) -> None:
    size = len(byte_tokenizer()(f"{TEXTS[0]}\n\n", add_special_tokens=False)["input_ids"])
    with scheduler_of(memory, 2 * size) as scheduler:
        for _ in range(3):
            ask(memory, TEXTS[0], TEXTS[1])
        ask(memory, TEXTS[2])  # once: it is answered, and displaces nothing
        assert texts_of(memory) == {TEXTS[0], TEXTS[1]}
        assert actions(logged)[-1] == "passed"
        assert scheduler.why(TEXTS[2]).action == "passed"
        for _ in range(8):
            ask(memory, TEXTS[3], TEXTS[1])
            memory.engine.forget()  # recent contexts would answer without the store
        assert texts_of(memory) == {TEXTS[1], TEXTS[3]}
        assert actions(logged).count("demoted") == 1
        assert scheduler.why(TEXTS[0]).action == "demoted"
        assert "made room for" in scheduler.why(TEXTS[0]).reason


def test_items_over_the_budget_are_demoted_at_the_start(tiny_engine: HFEngine) -> None:
    store = MemoryStore()
    plain = KVCacheMemory(tiny_engine, store)
    ask(plain, *TEXTS)
    with scheduler_of(KVCacheMemory(tiny_engine, store), 150) as scheduler:
        assert held_bytes(plain) == scheduler.metrics()["cached_bytes"] <= 150 * PER_TOKEN
        assert scheduler.metrics()["caches"] == 4
        ask(plain, *TEXTS)  # past the scheduler
        scheduler.run_once()
        assert held_bytes(plain) == scheduler.metrics()["cached_bytes"] <= 150 * PER_TOKEN


def test_items_with_the_callers_id_are_found_whatever_is_hot(memory: KVCacheMemory, scheduler: CacheScheduler) -> None:
    mine = memory.extract("x" * 698).model_copy(update={"id": "mine"})
    memory.add(mine)
    for _ in range(4):
        ask(memory, *TEXTS)
    assert memory.get(mine.id) is not None
    assert held_bytes(memory) <= 1000 * PER_TOKEN
    with pytest.raises(StoreFullError):
        memory.add(memory.extract("y" * 698).model_copy(update={"id": "another"}))
    assert scheduler.demote(mine.id) == [mine.id]  # on demand, everything goes


def test_a_context_with_a_handle_outlives_the_process_whatever_is_hot(memory: KVCacheMemory) -> None:
    """The context's id is in bound arguments and checkpoints, but its text is in the store only."""
    handle = memory.create_context(["The whole corpus. " * 20], "Use:")
    with scheduler_of(memory, 450):
        later = memory.create_context(["Another one."], "Use:")
        for _ in range(4):
            ask(memory, *TEXTS)
        assert memory.with_context(handle, [{"role": "user", "content": "What?"}])
        assert memory.with_context(later, [{"role": "user", "content": "What?"}])
        assert held_bytes(memory) <= 450 * PER_TOKEN


def test_a_stored_instruction_counts_towards_the_budget_and_is_never_evicted(tiny_engine: HFEngine) -> None:
    store, said = MemoryStore(), "Answer from the documents. " * 12
    memory = KVCacheMemory(tiny_engine, store, said)
    head = len(tiny_engine.template.instruction_ids(said))
    assert head >= 256

    def stored_bytes() -> int:
        return sum(nbytes(layers_of(store.get(key).memory)) for key in iter(store.keys()))

    with scheduler_of(memory, head + 100) as scheduler:
        memory.add(TEXTS[:2])
        assert stored_bytes() == scheduler.metrics()["cached_bytes"] == held_bytes(memory) + head * PER_TOKEN
        assert scheduler.metrics()["caches"] == 2
        memory.engine.forget()
        memory.add(TEXTS[2:])
        assert stored_bytes() == scheduler.metrics()["cached_bytes"] <= (head + 100) * PER_TOKEN
        assert scheduler.metrics()["documents"] == 8
    with scheduler_of(memory, head + 50) as scheduler:  # found in the store at the start
        assert stored_bytes() == scheduler.metrics()["cached_bytes"] <= (head + 50) * PER_TOKEN
        assert scheduler.metrics()["cached_bytes"] >= head * PER_TOKEN


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 7), st.sampled_from(["ask", "observe", "promote", "run", "demote"])), max_size=12
    ),
    budget=st.integers(40, 200),
    policy=st.sampled_from([gdsf, lru]),
)
def test_the_store_never_holds_more_than_the_budget(
    memory: KVCacheMemory, steps: list[tuple[int, str]], budget: int, policy: Policy
) -> None:
    memory.store = MemoryStore()
    watched = memory.store
    most = 0
    put = watched.put

    def watch(item: object) -> None:
        nonlocal most
        put(item)  # type: ignore[arg-type]
        most = max(most, watched.stats().bytes)

    watched.put = watch  # type: ignore[method-assign]
    with scheduler_of(memory, budget, policy=policy) as scheduler:
        for number, what in steps:
            if what == "ask":
                ask(memory, TEXTS[number], TEXTS[number - 1], max_new_tokens=1)
            elif what == "observe":
                scheduler.observe(TEXTS[number:])
            elif what == "promote":
                try:
                    scheduler.promote(TEXTS[number])
                except StoreFullError:
                    assert budget < 45
            elif what == "demote":
                scheduler.demote(TEXTS[number])
            else:
                scheduler.run_once()
            assert watched.stats().bytes == scheduler.metrics()["cached_bytes"]
    assert most <= budget * PER_TOKEN


# --- changes ----------------------------------------------------------------------------------------------------


def test_a_text_that_changed_drops_its_cache(
    memory: KVCacheMemory, scheduler: CacheScheduler, logged: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        scheduler.observe([TextualMemoryItem(id="a", memory=TEXTS[0]), TextualMemoryItem(id="b", memory=TEXTS[1])])
    scheduler.run_once()
    for _ in range(2):
        scheduler.observe(TextualMemoryItem(id="a", memory="The first one was edited."))
    report = scheduler.run_once()
    assert len(report.dropped) == len(report.promoted) == 1
    assert texts_of(memory) == {"The first one was edited.", TEXTS[1]}
    assert "its text changed" in logged.text
    assert scheduler.run_once().promoted == []  # what it said before is not encoded again


def test_the_caller_chooses_the_identity_of_a_text(memory: KVCacheMemory) -> None:
    with scheduler_of(memory, identity=lambda document: document.metadata["source"]) as scheduler:
        for text in ("It was so.", "It is so."):
            for _ in range(2):
                scheduler.observe([TextualMemoryItem(memory=text, metadata={"source": "notes.md"})])
            scheduler.run_once()
        assert texts_of(memory) == {"It is so."}


def test_a_purge_leaves_no_trace_of_the_text(tmp_path: Path, memory: KVCacheMemory) -> None:
    state = tmp_path / "scheduler.sqlite"
    secret = "The safe opens at seven."
    with scheduler_of(memory, state=state) as scheduler:
        scheduler.observe([TextualMemoryItem(memory=secret, metadata={"source": "diary"})])
        ask(memory, secret)
        [key] = memory.store.keys()
        scheduler.demote(key)
        scheduler.observe([secret, TEXTS[0]])
        memory.engine.prefixes.clear()
        ask(memory, secret)
        assert memory.purge("diary").ids == [key]
        assert list(memory.store.keys()) == []
        for forgotten in (key, secret):
            with pytest.raises(UnknownItemError):
                scheduler.why(forgotten)
        assert scheduler.run_once().promoted == []
        scheduler.promote(TEXTS[0])
    assert not [file for file in tmp_path.rglob("*") if secret.encode() in file.read_bytes()]


def test_a_deletion_by_the_caller_is_logged(
    memory: KVCacheMemory, scheduler: CacheScheduler, logged: pytest.LogCaptureFixture
) -> None:
    [key] = scheduler.promote(TEXTS[0])
    memory.delete(key)
    assert scheduler.metrics()["caches"] == 0
    assert actions(logged) == ["promoted", "dropped"]
    scheduler.promote(TEXTS[0])
    scheduler._store.inner.delete([key])  # past the scheduler
    assert memory.get(key) is None
    scheduler.run_once()
    assert scheduler.metrics()["caches"] == 0
    assert actions(logged)[-1] == "gone"


def test_several_documents_are_looked_for_at_once(tiny_engine: HFEngine) -> None:
    """A remote store answers many requests at once."""
    store = AskedStore()
    memory = KVCacheMemory(tiny_engine, store)
    with scheduler_of(memory):
        assert memory.store.containing(["a", "b"]) == set()
    assert store.asked == [2]


def test_a_damaged_file_is_listed(tmp_path: Path, tiny_engine: HFEngine) -> None:
    memory = KVCacheMemory(tiny_engine, DiskStore(tmp_path))
    with scheduler_of(memory) as scheduler:
        scheduler.promote(TEXTS[0])
        [file] = tmp_path.rglob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.warns(CacheWarning, match="is damaged"):
            assert str(file) in memory.sync([TEXTS[1]]).failed


# --- figures, errors, ending ------------------------------------------------------------------------------------


def test_the_figures(memory: KVCacheMemory, scheduler: CacheScheduler) -> None:
    for _ in range(2):
        ask(memory, *TEXTS[:2])
        memory.engine.prefixes.clear()
    metrics = scheduler.metrics()
    tokens = sum(len(memory.engine.template.encode(f"{text}\n\n")) for text in TEXTS[:2])
    assert (metrics["encoded_tokens"], metrics["reused_tokens"]) == (tokens, tokens)
    assert metrics["hit_rate"] == 0.5
    assert (metrics["asked"], metrics["kept"], metrics["cached_bytes"]) == (4, 2, tokens * PER_TOKEN)
    assert json.loads(json.dumps(metrics)) == metrics


def test_refusals(memory: KVCacheMemory, scheduler: CacheScheduler) -> None:
    with pytest.raises(InvalidInputError, match="already has a scheduler"):
        scheduler_of(memory)
    with pytest.raises(InvalidInputError, match="more than 0"):
        scheduler_of(KVCacheMemory(memory.engine), 0)
    with pytest.raises(UnsupportedModelError, match="Use an HFEngine"):
        CacheScheduler(KVCacheMemory(EchoEngine()), 1000)
    with pytest.raises(UnknownItemError):
        scheduler.promote("kv:sha256:unknown")
    with pytest.raises(EmptyPromptError):
        scheduler.promote("  ")
    with pytest.raises(StoreFullError):
        scheduler.promote("x" * 1001)
    with pytest.raises(InvalidInputError, match="cannot read a text"):
        scheduler.observe([3])
    assert scheduler.metrics()["documents"] == 0


def test_closing_stops_at_once_and_gives_the_memory_its_store_back(memory: KVCacheMemory) -> None:
    store = memory.store
    scheduler = scheduler_of(memory, 9000, every_s=60.0)
    for _ in range(2):
        scheduler.observe("x" * 2000)
    until(lambda: memory.engine.lock._holds_in_background)
    began = time.monotonic()
    scheduler.close()
    scheduler.close()
    assert time.monotonic() - began < 0.5
    assert memory.store is store
    assert memory.watchers == []
    assert not [thread for thread in threading.enumerate() if thread.name == "kvcag-scheduler"]
    for call in (scheduler.run_once, lambda: scheduler.promote("x"), lambda: scheduler.demote("x")):
        with pytest.raises(InvalidInputError, match="closed"):
            call()


def test_it_counts_no_more_texts_than_it_shall_remember(memory: KVCacheMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcag.scheduler.scheduler._REMEMBERED", 5)
    with scheduler_of(memory) as scheduler:
        scheduler.promote("A cache stays known.")
        scheduler.observe(TEXTS)
        scheduler.run_once()
        assert scheduler.metrics()["documents"] == 5
        assert scheduler.metrics()["caches"] == 1
        scheduler.observe(TEXTS[7])
        assert len(scheduler.run_once().promoted) == 1  # the latest are among them


def test_many_threads_ask_observe_and_demote_at_once(memory: KVCacheMemory) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(6):
                ask(memory, TEXTS[(number + step) % 8], TEXTS[step], max_new_tokens=1)
                scheduler.observe(TEXTS[step:])
                scheduler.demote(TEXTS[(number * step) % 8])
        except BaseException as error:
            failed.append(error)

    with scheduler_of(memory, 150, every_s=0.01, quiet_s=0.001) as scheduler:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        run_together(threads)
        assert failed == []
        assert held_bytes(memory) == scheduler.metrics()["cached_bytes"] <= 150 * PER_TOKEN
        assert scheduler.metrics()["failed"] == 0
