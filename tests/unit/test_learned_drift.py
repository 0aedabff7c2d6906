"""A drift that was learned from the user's own documents: versioned, reported, and used until it is learned again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.attention import rotations
from kvcag.cache.layers import concat, cut, layers_of
from kvcag.cache.merge import DriftSums, merge
from kvcag.calibration import _found_together, learned_drift_of
from kvcag.errors import InvalidInputError, StoreError
from kvcag.langchain import ChatKVCAG
from kvcag.testing import byte_tokenizer, tiny_model
from tests.merging import encode, equal, ids, parts_of

TEXTS = [f"Note {number}: the {thing} is kept in room {number * 7}." for number, thing in enumerate("abcdefghijklmn")]
HEAD = "Answer from the notes."


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def memory_of(namespace: str = "", seed: int = 0) -> KVCacheMemory:
    memory = KVCacheMemory(HFEngine(tiny_model(seed=seed), byte_tokenizer()), instruction=HEAD, namespace=namespace)
    memory.add(TEXTS)
    return memory


def rotated(memory: KVCacheMemory):
    return memory.merge(memory.add(TEXTS[:3]), "Where is a?", strategy="rotate")


def test_learned_drift_brings_documents_nearer_than_none() -> None:
    """Also those that it was not learned from."""
    model, head, tail = tiny_model("llama"), ids(5), ids(6, seed=99)
    sums = DriftSums()
    for context in range(12):
        first, *others = [ids(20, seed=10 * context + number) for number in range(4)]
        parts = parts_of(model, head, [first, *others])
        together = encode(model, torch.cat([first, *others]), head)
        at = torch.arange(sum(map(len, others)))
        alone_at = len(head) + torch.cat([torch.arange(len(other)) for other in others])
        alone = concat([part.layers for part in parts[2:]])
        sums.add(rotations(model), alone, alone_at, cut(together, len(first)), len(head) + len(first) + at)
    assert sums.tokens == 12 * 60
    documents = [ids(20, seed=seed) for seed in (501, 502, 503)]
    right = encode(model, torch.cat([head, *documents]))
    parts = parts_of(model, head, documents)
    plain = merge(model, parts, tail, strategy="rotate").layers
    given = merge(model, parts, tail, strategy="rotate", learned_drift=sums.drift()).layers
    for index in (1, 2):
        for which in (0, 1):
            was, now = ((layers[index][which] - right[index][which]).norm() for layers in (plain, given))
            assert now < was


def test_documents_that_are_alike_are_learned_from_together() -> None:
    """As one question finds them. Each is used once before one is used again."""
    draw = random.Random(0)
    topics = {topic: [draw.randrange(100 * topic, 100 * topic + 100) for _ in range(60)] for topic in range(1, 5)}
    documents = {
        f"{topic} {number}": [*draw.sample(words, 40), *draw.choices(range(1000, 1100), k=20)]
        for topic, words in topics.items()
        for number in range(3)
    }
    groups = _found_together(documents, contexts=6, size=3, draw=draw)
    assert [len({name[0] for name in group}) for group in groups] == [1] * 6
    assert sorted(name for group in groups[:4] for name in group) == sorted(documents)


def test_it_is_explicit_versioned_and_reported(cache_folder: Path) -> None:
    memory = memory_of()
    before = rotated(memory)
    assert (memory.drift, before.report.drift) == ("", "")
    learned = memory.learn(contexts=4)
    assert memory.drift == learned.digest
    assert len(learned.digest) == 16
    assert set(learned.documents) <= set(memory.store.keys())
    after = rotated(memory)
    assert after.report.drift == learned.digest
    assert not equal(layers_of(before.cache), layers_of(after.cache))
    again = memory.learn(contexts=4, seed=1)
    assert again.digest != learned.digest == memory.learn(contexts=4).digest


def test_equal_questions_have_equal_answers_until_it_is_learned_again(cache_folder: Path) -> None:
    memory = memory_of()
    memory.learn(contexts=4)
    first = layers_of(rotated(memory).cache)
    memory.add(["Another note that was written later."])
    memory.engine.forget()
    assert equal(layers_of(rotated(memory).cache), first)
    later = memory_of()  # another process
    assert equal(layers_of(rotated(later).cache), first)
    memory.learn(contexts=4, seed=3)
    assert not equal(layers_of(rotated(memory).cache), first)


def test_it_is_apart_by_namespace_and_by_model(cache_folder: Path) -> None:
    memory = memory_of()
    memory.learn(contexts=2)
    assert KVCacheMemory(memory.engine, namespace="other").drift == ""
    assert memory_of(seed=1).drift == ""


def test_it_is_given_under_the_recompute_too_and_to_nothing_that_is_exact(cache_folder: Path) -> None:
    memory = memory_of()
    asked = (memory.add(TEXTS[:3]), "Where is a?")
    before = memory.merge(*asked, strategy="query", ratio=0.3)
    learned = memory.learn(contexts=2)
    after = memory.merge(*asked, strategy="query", ratio=0.3)
    assert after.report.drift == learned.digest
    assert not equal(layers_of(before.cache), layers_of(after.cache))
    full = memory.merge(*asked, strategy="full")
    right, _ = memory.engine.prefill(full.token_ids.tolist(), namespace="another")
    assert full.report.drift == ""
    for merged, prefilled in zip(layers_of(full.cache), right, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(merged, prefilled, strict=True))


def test_what_is_encoded_in_context_gets_it_too(cache_folder: Path) -> None:
    memory = memory_of()
    memory.add(TEXTS, context="previous")
    before = rotated(memory)
    assert before.report.in_context_tokens > 0
    learned = memory.learn(contexts=2)
    after = rotated(memory)
    assert after.report.drift == learned.digest
    assert after.report.in_context_tokens == before.report.in_context_tokens
    assert not equal(layers_of(after.cache), layers_of(before.cache))


def test_it_may_be_learned_from_documents_that_are_not_kept(cache_folder: Path) -> None:
    memory = KVCacheMemory(HFEngine(tiny_model(), byte_tokenizer()))
    memory.learn(TEXTS, contexts=2)
    assert memory.drift
    assert len(memory) == 0


def test_few_documents_are_refused(cache_folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="at least 10 documents; there are 3"):
        memory_of().learn(TEXTS[:3])


def test_purging_a_text_forgets_what_was_learned_from_it(cache_folder: Path) -> None:
    memory = memory_of()
    learned = memory.learn(TEXTS[:12], contexts=8)
    memory.purge(TEXTS[13])
    assert memory.drift == learned.digest
    memory.purge(TEXTS[0])
    assert memory.drift == ""
    assert not list(cache_folder.rglob("*learned*"))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_text_that_is_purged_while_it_is_learned_from_leaves_no_drift(cache_folder: Path, elsewhere: bool) -> None:
    memory = memory_of()
    purging = memory_of() if elsewhere else memory
    with pytest.raises(StoreError, match="Learn it again"):
        memory.learn(TEXTS, contexts=4, progress=lambda done, total: done == 2 and purging.purge(TEXTS[0]))
    assert memory.drift == ""
    assert not list(cache_folder.rglob("*learned*"))


def test_purging_another_text_does_not_stop_it(cache_folder: Path) -> None:
    memory = memory_of()
    learned = memory.learn(TEXTS[:12], contexts=4, progress=lambda done, total: memory.purge(TEXTS[13]))
    assert memory.drift == learned.digest
    assert not list(cache_folder.rglob("*.claim"))


def test_a_purge_in_another_process_reaches_a_running_one(cache_folder: Path) -> None:
    running = memory_of()
    before = rotated(running)
    running.engine.forget()
    running.learn(TEXTS, contexts=4)
    assert rotated(running).report.drift
    other = memory_of()  # has its own engine and knows what the file says, as another process does
    other.purge(TEXTS[0])
    assert running.drift == ""
    after = rotated(running)
    assert after.report.drift == ""
    assert equal(layers_of(before.cache), layers_of(after.cache))


def test_what_another_process_learned_in_its_place_is_used(cache_folder: Path) -> None:
    running, other = memory_of(), memory_of()
    old = running.learn(TEXTS, contexts=4)
    assert other.drift == old.digest
    other.purge(TEXTS[0])
    new = other.learn(TEXTS[1:], contexts=4)
    assert running.drift == rotated(running).report.drift == new.digest != old.digest


def test_deleting_everything_forgets_it(cache_folder: Path) -> None:
    memory = memory_of()
    memory.learn(contexts=2)
    memory.delete_all()
    assert memory.drift == ""


def test_a_damaged_file_is_as_if_nothing_was_learned(cache_folder: Path) -> None:
    memory = memory_of()
    memory.learn(contexts=2)
    (file,) = cache_folder.rglob("*learned*")
    file.write_bytes(file.read_bytes()[:-5])
    assert learned_drift_of(memory_of().engine, "") is None


def test_a_drift_that_cannot_be_kept_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVCAG_CACHE", str(tmp_path / "file"))
    memory = memory_of()
    with pytest.warns(UserWarning, match="KVCAG_CACHE"):
        learned = memory.learn(contexts=2)
    assert memory.drift == learned.digest


def test_the_key_of_a_response_cache_knows_it(cache_folder: Path) -> None:
    memory = memory_of()
    llm = ChatKVCAG(memory=memory)
    before = llm._get_llm_string()
    learned = memory.learn(contexts=2)
    assert learned.digest in llm._get_llm_string() != before
