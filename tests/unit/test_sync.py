"""A memory in step with a corpus, purged on request, loading only where that is quicker, and apart by namespace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcag import Document, HFEngine, KVCacheMemory, Sampling
from kvcag.errors import EmptyPromptError
from kvcag.stores import DiskStore, MemoryStore
from kvcag.testing import byte_tokenizer, tiny_model

TEXTS = ["Alice has a red bicycle.", "Bob has a green car.", "Carol has a boat."]
HEAD = "Answer from the documents."


@pytest.fixture
def memory(tiny_engine: HFEngine, tmp_path: Path) -> KVCacheMemory:
    return KVCacheMemory(tiny_engine, DiskStore(tmp_path / "kv"), instruction=HEAD)


def asked(*texts: str) -> list[dict[str, Any]]:
    documents = [Document(f"{text}\n\n") for text in texts]
    return [{"role": "system", "content": [f"{HEAD}\n\n", *documents]}, {"role": "user", "content": "Who?"}]


def usage_of(memory: KVCacheMemory, *texts: str) -> Any:
    return list(memory.stream(asked(*texts), sampling=Sampling(max_new_tokens=2)))[-1].usage


def test_only_what_changed_is_encoded_and_what_is_gone_is_dropped(memory: KVCacheMemory) -> None:
    first = memory.sync(TEXTS)
    assert (first.encoded, first.kept, first.dropped) == (3, 0, 0)
    again = memory.sync(TEXTS)
    assert (again.encoded, again.kept, again.dropped) == (0, 3, 0)
    assert again.ids == first.ids
    edited = memory.sync([TEXTS[0], "Bob has a blue car.", TEXTS[2]])
    assert (edited.encoded, edited.kept, edited.dropped) == (1, 2, 1)
    assert {item.id for item in memory.get_all()} == set(edited.ids)


def test_a_question_finds_what_was_synced(memory: KVCacheMemory) -> None:
    memory.sync(TEXTS)
    assert usage_of(memory, *TEXTS).context.encoded_tokens == 0


def test_what_another_corpus_or_nobody_brought_stays(memory: KVCacheMemory) -> None:
    own = memory.extract("By hand.")
    memory.add(own)
    other = memory.sync([TEXTS[0]], corpus="other")
    memory.sync([TEXTS[1]])
    assert memory.sync([]).dropped == 1
    assert {item.id for item in memory.get_all()} == {own.id, *other.ids}


def test_equal_documents_are_one(memory: KVCacheMemory) -> None:
    report = memory.sync([TEXTS[0], TEXTS[0]])
    assert (report.encoded, len(report.ids)) == (1, 1)


def test_an_empty_document_is_refused_before_anything_changes(memory: KVCacheMemory) -> None:
    memory.sync(TEXTS)
    with pytest.raises(EmptyPromptError, match="document 2"):
        memory.sync(["New.", " "])
    assert len(memory.get_all()) == len(TEXTS)


def test_a_purge_leaves_nothing_of_a_text(memory: KVCacheMemory) -> None:
    memory.sync(TEXTS)
    list(memory.stream(asked(*TEXTS), strategy="exact", sampling=Sampling(max_new_tokens=2)))
    purged = memory.purge(TEXTS[1]).ids
    assert len(purged) == 1
    assert memory.get(purged[0]) is None
    prompt = memory.engine.template.prompt(asked(*TEXTS))
    assert memory.engine.prefixes.match(prompt.token_ids)[0] == 0  # type: ignore[attr-defined]
    assert usage_of(memory, *TEXTS).context.encoded_tokens >= len(prompt.document_ids[1])


def test_a_purge_leaves_other_tenants_recent_contexts(tiny_engine: HFEngine) -> None:
    mine, theirs = (KVCacheMemory(tiny_engine, MemoryStore(), namespace=name) for name in ("me", "them"))
    for memory in (mine, theirs):
        list(memory.stream("Hello", sampling=Sampling(max_new_tokens=1)))
    mine.purge("anything")
    ids = tiny_engine.template.prompt([{"role": "user", "content": "Hello"}]).token_ids
    assert tiny_engine.prefixes.match(ids, "me")[0] == 0
    assert tiny_engine.prefixes.match(ids, "them")[0] == len(ids)
    tiny_engine.prefixes.clear()
    assert tiny_engine.prefixes.nbytes == 0


def test_tenants_with_the_same_text_share_no_hit_and_no_file(tmp_path: Path) -> None:
    engine = HFEngine(tiny_model(), byte_tokenizer())
    memories = [
        KVCacheMemory(engine, DiskStore(tmp_path, namespace=name, salt=name.encode()), instruction=HEAD, namespace=name)
        for name in ("one", "two")
    ]
    reports, files = [], []
    for memory in memories:
        reports.append(usage_of(memory, *TEXTS))
        files.append(set(tmp_path.rglob("*.safetensors")))
    assert reports[0].context == reports[1].context  # the second namespace pays what the first paid: no timing tells
    assert reports[0].cached_tokens == reports[1].cached_tokens == 0
    assert len(files[1]) == 2 * len(files[0])
    assert not {path.name for path in files[0]} & {path.name for path in files[1] - files[0]}


def test_a_document_that_was_quantised_is_not_called_exact(tiny_engine: HFEngine, tmp_path: Path) -> None:
    """It was, where it stood first, and what was generated over it was remembered as exact."""
    memory = KVCacheMemory(tiny_engine, DiskStore(tmp_path, quantize="int8"), instruction=HEAD)
    item = memory.extract(TEXTS[0])
    memory.add(item)
    context = memory.merge([item.id], "Who?", strategy="rotate")
    assert context.report.mode == "merged"
    tiny_engine.generate(past_key_values=context, max_new_tokens=2)
    assert tiny_engine.prefixes.match(context.token_ids.tolist())[0] == item.base_position
    memory.dump(tmp_path / "dump")  # unquantised, and still what it was
    other = KVCacheMemory(tiny_engine, instruction=HEAD)
    other.load(tmp_path / "dump")
    assert other.merge([item.id], "Who?", strategy="rotate").report.mode == "merged"
