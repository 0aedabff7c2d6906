"""MemoryCube: caches follow texts, and answers report whether they were encoded or cached."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcag import CacheScheduler, CacheWarning, Document, HFEngine, MemoryCube
from kvcag.cache.layers import layers_of
from kvcag.core import TextualMemoryItem
from kvcag.errors import (
    ContextLengthError,
    CorpusLengthError,
    EmptyPromptError,
    InvalidInputError,
    StoreUnavailableError,
    UnknownItemError,
    UnsupportedModelError,
)
from kvcag.memory import insert_documents
from kvcag.stores import DiskStore, MemoryStore, TieredStore
from kvcag.testing import EchoEngine, byte_tokenizer, tiny_model, whole_prompt
from tests.waits import run_together, ticks_during, until

HEAD = "Answer from the notes."
ALICE = TextualMemoryItem(id="alice", memory="Alice has a red bicycle.", metadata={"page": 1})
BOB = TextualMemoryItem(id="bob", memory="Bob has a green car.")
CAROL = TextualMemoryItem(id="carol", memory="Carol walks.")


@pytest.fixture
def cube(tiny_engine: HFEngine) -> MemoryCube:
    made = MemoryCube(tiny_engine, instruction=HEAD)
    made.add([ALICE, BOB])
    return made


def kept_texts(cube: MemoryCube) -> list[str]:
    """The text of every stored cache."""
    store = cube.memory.store
    manifests = list(map(store.manifest, store.keys()))
    return sorted(manifest.records.composed_text_memory.strip("\n") for manifest in manifests if manifest)


def bits(cube: MemoryCube) -> dict[str, list[torch.Tensor]]:
    items = cube.memory.get_all()
    return {item.id: [t.clone() for layer in layers_of(item.memory) for t in layer] for item in items}


# --- texts -----------------------------------------------------------------------------------------------------------


def test_texts_are_kept_as_they_were_given(cube: MemoryCube) -> None:
    assert cube.get_all() == [ALICE, BOB]
    assert cube.get("alice") == ALICE
    assert cube.get("nobody") is None


def test_a_text_without_an_id_gets_one_from_its_words(tiny_engine: HFEngine) -> None:
    cube = MemoryCube(tiny_engine)
    first, second = cube.add(["One.", "Two."]), cube.add("One.")
    assert second == first[:1]
    assert [text.memory for text in cube.get_all()] == ["One.", "Two."]


def test_metadata_become_json(tiny_engine: HFEngine) -> None:
    cube = MemoryCube(tiny_engine)
    cube.add(TextualMemoryItem(id="a", memory="A.", metadata={"path": Path("x"), "at": (1, 2)}))
    assert cube.get("a").metadata == {"path": "x", "at": [1, 2]}


@pytest.mark.parametrize("bad", [["Fine.", " \n"], [ALICE, 7]])
def test_unreadable_documents_add_nothing(cube: MemoryCube, bad: list[Any]) -> None:
    with pytest.raises(InvalidInputError):
        cube.add(["New.", *bad])
    assert cube.get_all() == [ALICE, BOB]


def test_an_empty_text_is_named(cube: MemoryCube) -> None:
    with pytest.raises(EmptyPromptError, match=r"text 2 \('x'\)"):
        cube.add(["New.", TextualMemoryItem(id="x", memory="\n")])


def test_an_edit_of_nothing_is_refused(cube: MemoryCube) -> None:
    with pytest.raises(UnknownItemError, match=r"'nobody'.*cube\.add"):
        cube.edit("nobody", "New.")


# --- caches follow ---------------------------------------------------------------------------------------------------


def test_nothing_is_encoded_before_it_is_asked_for(cube: MemoryCube) -> None:
    assert kept_texts(cube) == []
    assert cube.encode() == 2
    assert cube.encode() == 0
    assert kept_texts(cube) == [ALICE.memory, BOB.memory]


def test_an_edit_drops_one_cache_and_touches_no_other(cube: MemoryCube) -> None:
    cube.encode()
    before = bits(cube)
    cube.edit("alice", "Alice has a blue bicycle.")
    after = bits(cube)
    assert kept_texts(cube) == [BOB.memory]
    [bob] = after
    assert all(torch.equal(one, other) for one, other in zip(before[bob], after[bob], strict=True))
    assert cube.get("alice").metadata == {"page": 1}
    answer = cube.ask("Which colour?", max_new_tokens=4)
    assert (answer.cached, answer.encoded) == (("bob",), ("alice",))
    assert kept_texts(cube) == ["Alice has a blue bicycle.", BOB.memory]


def test_new_metadata_drop_no_cache(cube: MemoryCube) -> None:
    cube.encode()
    cube.edit("alice", ALICE.memory, {"page": 2})
    assert kept_texts(cube) == [ALICE.memory, BOB.memory]
    assert cube.get("alice").metadata == {"page": 2}


def test_adding_the_same_again_drops_no_cache(cube: MemoryCube) -> None:
    cube.encode()
    cube.add([ALICE, BOB])
    assert kept_texts(cube) == [ALICE.memory, BOB.memory]


def test_a_deletion_reaches_caches_made_from_several_texts_and_recent_contexts(cube: MemoryCube) -> None:
    cube.encode()
    cube.ask("Both?", strategy="exact", max_new_tokens=4)
    assert any(ALICE.memory in text and BOB.memory in text for text in kept_texts(cube))
    engine = cube.memory.engine
    cube.delete("alice")
    assert kept_texts(cube) == [BOB.memory]
    assert engine.prefixes.nbytes == 0
    assert cube.get("alice") is None
    cube.delete(["alice", "nobody"])  # missing ones are ignored


def test_a_text_that_another_one_still_says_keeps_its_cache(cube: MemoryCube) -> None:
    cube.add(TextualMemoryItem(id="copy", memory=ALICE.memory))
    cube.encode()
    cube.delete("alice")
    assert kept_texts(cube) == [ALICE.memory, BOB.memory]
    cube.delete("copy")
    assert kept_texts(cube) == [BOB.memory]


def test_a_text_within_another_leaves_the_other_alone(tiny_engine: HFEngine) -> None:
    cube = MemoryCube(tiny_engine)
    cube.add([BOB, TextualMemoryItem(id="short", memory="Bob")])
    cube.encode()
    cube.delete("short")
    assert kept_texts(cube) == [BOB.memory]


def test_every_tier_forgets(tiny_engine: HFEngine, tmp_path: Path) -> None:
    tiers = [MemoryStore(), DiskStore(tmp_path / "one"), DiskStore(tmp_path / "two")]
    cube = MemoryCube(tiny_engine, store=TieredStore(tiers))
    cube.add([ALICE, BOB])
    cube.encode()
    cube.delete("alice")
    for tier in tiers:
        [manifest] = map(tier.manifest, tier.keys())
        assert manifest.records.composed_text_memory == BOB.memory + "\n\n"
    assert not any(b"Alice" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    cube.memory.store.close()


def test_a_damaged_cache_of_a_deleted_text_goes_too(tiny_engine: HFEngine, tmp_path: Path) -> None:
    """The text of a damaged file cannot be read, and a store does not list the file."""
    cube = MemoryCube(tiny_engine, store=tmp_path / "kv", instruction=HEAD)
    cube.add([ALICE])
    cube.encode()
    [file] = list((tmp_path / "kv").rglob("*.safetensors"))
    file.write_bytes(b"\x10" + file.read_bytes()[1:])
    cube.delete("alice")
    assert not file.exists()


def test_a_failed_deletion_can_be_repeated(tiny_engine: HFEngine, tmp_path: Path) -> None:
    class Failing(DiskStore):
        broken = True

        def delete(self, keys: Any) -> None:
            if self.broken:
                raise StoreUnavailableError(5, "the disk is gone", str(self.path))
            super().delete(keys)

        _remove = delete

    store = Failing(tmp_path)
    cube = MemoryCube(tiny_engine, store=store)
    cube.add([ALICE])
    cube.encode()
    with pytest.warns(CacheWarning, match="the disk is gone"):
        assert cube.delete("alice").failed
    store.broken = False
    assert cube.delete("alice").ids
    assert kept_texts(cube) == []


def test_sync_adds_edits_and_deletes(cube: MemoryCube) -> None:
    cube.encode()
    cube.sync([TextualMemoryItem(id="alice", memory="Alice sold it."), CAROL])
    assert [text.memory for text in cube.get_all()] == ["Alice sold it.", CAROL.memory]
    assert kept_texts(cube) == []


def test_sync_deletes_caches_of_an_earlier_process(tiny_engine: HFEngine, tmp_path: Path) -> None:
    before = MemoryCube(tiny_engine, store=tmp_path)
    before.add([ALICE, BOB])
    before.encode()
    before.ask("Both?", strategy="exact", max_new_tokens=2)
    after = MemoryCube(tiny_engine, store=tmp_path)
    after.sync([BOB, CAROL])
    assert kept_texts(after) == [BOB.memory]  # what is still right is found
    assert after.encode() == 1


def test_a_cache_that_came_back_after_its_deletion_can_be_purged(cube: MemoryCube) -> None:
    cube.encode()
    with pytest.raises(InvalidInputError, match=r"the cube holds this text\. Call delete"):
        cube.purge(ALICE.memory)
    cube.delete("alice")
    system = {"role": "system", "content": [Document(f"{ALICE.memory}\n\n")]}
    sampling = cube.memory.engine.sampling(max_new_tokens=1)
    list(cube.memory.stream([system, {"role": "user", "content": "Who?"}], sampling=sampling))  # found before
    assert ALICE.memory in kept_texts(cube)
    assert len(cube.purge(ALICE.memory).ids) == 1
    assert not cube.purge(ALICE.memory)
    assert kept_texts(cube) == [BOB.memory]


def test_a_scheduler_forgets_with_the_cube(cube: MemoryCube, tmp_path: Path) -> None:
    """Regression: the scheduler encoded a deleted text ahead again, since it had been asked for often."""
    with CacheScheduler(cube.memory, 1 << 20, state=tmp_path / "state.sqlite", every_s=None, quiet_s=0) as scheduler:
        for _ in range(4):
            cube.ask("Who?", max_new_tokens=2)
        scheduler.run_once()
        cube.delete("alice")
        scheduler.run_once()
        assert kept_texts(cube) == [BOB.memory]
    assert not any(b"Alice" in file.read_bytes() for file in tmp_path.iterdir())


# --- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_reports_whether_it_was_encoded_or_cached(cube: MemoryCube) -> None:
    first = cube.ask("Who has a car?", strategy="query", max_new_tokens=4)
    assert str(first) == first.text
    assert (first.side, first.encoded) == ("encoded", ("alice", "bob"))
    second = cube.ask("Who has a bicycle?", strategy="query", max_new_tokens=4)
    assert (second.side, second.cached) == ("merged", ("alice", "bob"))
    assert second.report.encoded_tokens == 0
    assert second.report.recomputed_tokens > 0
    assert second.sources == [ALICE, BOB]
    assert second.finish_reason in ("stop", "length")


def test_texts_that_are_asked_for_again_become_exact(cube: MemoryCube) -> None:
    """The default strategy, `auto`."""
    cube.encode()
    merged = cube.ask("Who has a car?", max_new_tokens=2)
    assert (merged.side, merged.cached) == ("merged", ("alice", "bob"))
    again = cube.ask("Who has a bicycle?", max_new_tokens=2)  # both are encoded together when the model is idle
    assert (again.side, again.cached) == ("merged", ("alice", "bob"))
    engine, texts = cube.memory.engine, [f"{text.memory}\n\n" for text in (ALICE, BOB)]
    context_ids = engine.template.prompt(insert_documents(HEAD, texts, [{"role": "user", "content": "?"}])).context_ids
    until(lambda: engine.known_prefix(context_ids) == len(context_ids), seconds=20)
    exact = cube.ask("Who walks?", max_new_tokens=2)
    assert (exact.cached, exact.encoded, exact.report.encoded_tokens) == (("alice", "bob"), (), 0)


def test_a_damaged_cache_counts_as_encoded(tiny_engine: HFEngine, tmp_path: Path) -> None:
    cube = MemoryCube(tiny_engine, store=tmp_path, strategy="query")
    cube.add([ALICE])
    cube.encode()
    [file] = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(CacheWarning, match="encoding a document again"):
        answer = cube.ask("Who?", max_new_tokens=2)
    assert (answer.side, answer.encoded) == ("encoded", ("alice",))


def test_a_model_is_loaded_by_its_folder(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    cube = MemoryCube(tmp_path, namespace="mine")
    cube.add([ALICE])
    assert cube.encode() == 1
    assert repr(cube).startswith("<MemoryCube of 'mine': 1 texts over <HFEngine ")
    with pytest.raises(InvalidInputError, match="engine is a int"):
        MemoryCube(7)


def test_exact_keeps_the_texts_together(tiny_engine: HFEngine) -> None:
    cube = MemoryCube(tiny_engine, instruction=HEAD, strategy="exact")
    cube.add([ALICE, BOB])
    assert cube.encode() == 1
    answer = cube.ask("Who?", max_new_tokens=6)
    assert (answer.side, answer.cached) == ("prefix", ("alice", "bob"))
    assert (answer.report.encoded_tokens, answer.report.recomputed_tokens) == (0, 0)
    plain = HFEngine(tiny_model(), byte_tokenizer())
    system = f"{HEAD}\n\n{ALICE.memory}\n\n{BOB.memory}\n\n"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Who?"}]
    assert answer.text == plain.generate(messages, max_new_tokens=6)


def test_exact_is_exact_also_where_the_store_is_not(tmp_path: Path) -> None:
    engine = HFEngine(tiny_model(), byte_tokenizer(), prefix_cache_bytes=0)
    cube = MemoryCube(engine, store=DiskStore(tmp_path, quantize="int8"), strategy="exact")
    cube.add([ALICE, BOB])
    cube.encode()
    report = cube.ask("Who?", max_new_tokens=2).report
    assert report.recomputed_tokens + report.encoded_tokens == report.context_tokens


def test_the_texts_stand_between_the_instruction_and_the_question() -> None:
    cube = MemoryCube(EchoEngine(whole_prompt), instruction=HEAD)
    assert cube.ask("Who?").text == f"system: {HEAD}\n\n\nuser: Who?"
    cube.add([ALICE, BOB])
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who?"},
    ]
    answer = cube.ask(turns)
    system = f"system: {HEAD}\n\n{ALICE.memory}\n\n{BOB.memory}\n\nBe brief."
    assert answer.text == f"{system}\nuser: Hi.\nassistant: Hello.\nuser: Who?"
    assert (answer.side, answer.encoded) == ("encoded", ("alice", "bob"))
    assert answer.report is not None
    assert (answer.report.strategy, answer.report.is_exact) == ("exact", True)
    assert answer.report.encoded_tokens == len(f"{ALICE.memory}\n\n{BOB.memory}\n\n")


def test_a_cube_with_nothing_in_it_answers_without() -> None:
    assert MemoryCube(EchoEngine(whole_prompt)).ask("Who?").text == "user: Who?"


def test_texts_that_do_not_fit_are_refused_with_advice() -> None:
    cube = MemoryCube(EchoEngine(context_length=120))
    cube.add([f"Note {number}: {'x' * 30}" for number in range(5)])
    with pytest.raises(CorpusLengthError, match=r"all 5 texts.*texts=…") as raised:
        cube.ask("Who?", max_new_tokens=1)
    assert raised.value.texts == 5
    assert raised.value.excess > 0
    with pytest.raises(ContextLengthError) as plain:
        MemoryCube(EchoEngine(context_length=20)).ask("A question that alone is too long", max_new_tokens=1)
    assert not isinstance(plain.value, CorpusLengthError)


def test_k_needs_something_to_choose_by(cube: MemoryCube) -> None:
    with pytest.raises(InvalidInputError, match="k=1"):
        cube.search("Who?", k=1)


def test_an_engine_without_caches_cannot_encode_ahead() -> None:
    cube = MemoryCube(EchoEngine())
    cube.add([ALICE])
    with pytest.raises(UnsupportedModelError):
        cube.encode()


def test_a_stream_gives_the_same_text_as_ask(cube: MemoryCube) -> None:
    chunks = list(cube.stream("Who?", max_new_tokens=5))
    assert "".join(chunk.text for chunk in chunks) == cube.ask("Who?", max_new_tokens=5, strategy="query").text
    assert chunks[-1].usage.context.context_tokens > 0


async def test_asynchronous_twins(tiny_engine: HFEngine, tmp_path: Path) -> None:
    cube = MemoryCube(tiny_engine, instruction=HEAD)
    await cube.aadd([ALICE, BOB, CAROL])
    await cube.aedit("bob", "Bob sold his car.")
    await cube.adelete("carol")
    assert await cube.aencode() == 2
    assert [text.id for text in await cube.asearch("Who?")] == ["alice", "bob"]
    answer = await cube.aask("Who?", max_new_tokens=5)
    assert answer.side == "merged"
    assert answer.text == cube.ask("Who?", max_new_tokens=5).text
    streamed = [chunk async for chunk in cube.astream("Who?", max_new_tokens=5)]
    assert "".join(chunk.text for chunk in streamed) == answer.text
    await cube.adump(tmp_path)
    other = MemoryCube(tiny_engine, instruction=HEAD)
    await other.aload(tmp_path)
    assert other.get_all() == cube.get_all()


# --- namespaces and threads ------------------------------------------------------------------------------------------


def test_namespaces_share_no_file_no_hit_and_no_recent_context(tiny_engine: HFEngine, tmp_path: Path) -> None:
    mine, yours = (MemoryCube(tiny_engine, store=tmp_path, namespace=name) for name in ("mine", "yours"))
    for cube in (mine, yours):
        cube.add([ALICE])
    mine.encode()
    assert kept_texts(yours) == []
    mine.ask("Who?", max_new_tokens=2)
    answer = yours.ask("Who?", max_new_tokens=2)
    assert answer.side == "encoded"
    assert answer.usage.cached_tokens == 0
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    mine.delete("alice")
    assert kept_texts(yours) == [ALICE.memory]
    assert list(tmp_path.rglob("*.safetensors")) != files


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_caches_are_separate_per_user(tiny_engine: HFEngine, tmp_path: Path) -> None:
    cube = MemoryCube(tiny_engine, store=tmp_path / "kv")
    cube.add([ALICE])
    cube.encode()
    cube.dump(tmp_path / "dump")
    paths = [*(tmp_path / "kv").rglob("*"), *(tmp_path / "dump").rglob("*")]
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_file()} == {"0o600"}
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_dir()} == {"0o700"}


def test_concurrent_questions_and_edits_leave_no_stale_cache(tiny_engine: HFEngine) -> None:
    cube = MemoryCube(tiny_engine, instruction=HEAD)
    cube.add([ALICE, BOB, CAROL])
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(4):
                if number % 2:
                    cube.ask(f"Question {number} {turn}?", max_new_tokens=2, strategy="exact" if turn % 2 else "query")
                else:
                    cube.edit("alice", f"Alice, version {number} of {turn}.")
                    cube.delete("bob")
                    cube.add([BOB])
        except BaseException as error:
            failures.append(error)

    run_together(threading.Thread(target=work, args=(number,)) for number in range(4))
    assert not failures
    cube.encode()
    live = {text.memory for text in cube.get_all()}
    for kept in kept_texts(cube):
        assert set(kept.split("\n\n")) <= live


async def test_the_event_loop_keeps_ticking_while_a_cube_answers(cube: MemoryCube) -> None:
    assert await ticks_during(cube.aask("Who?", max_new_tokens=8)) > 10
