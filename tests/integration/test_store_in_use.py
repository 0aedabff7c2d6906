"""The stores under a memory that answers: namespaces, damage, a disk that fails, tiers."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from kvcag import HFEngine, KVCacheMemory
from kvcag.chat_template import Document, as_messages
from kvcag.core import MergeReport
from kvcag.engines.base import Sampling
from kvcag.errors import CacheWarning
from kvcag.stores import DiskStore, FsspecStore, KVStore, MemoryStore, TieredStore

TEXTS = ("The harbour master is Ada Lovelace.\n\n", "The lighthouse was built in 1831.\n\n")


def context(engine: HFEngine, store: KVStore, namespace: str = "") -> MergeReport:
    """Put the two documents together for a question, and say what that took."""
    memory = KVCacheMemory(engine, store, namespace=namespace)
    messages = [
        {"role": "system", "content": ["Use the passages.\n\n", *map(Document, TEXTS)]},
        {"role": "user", "content": "Who is the harbour master?"},
    ]
    return memory.context_for(engine.template.prompt(as_messages(messages))).report


def answer(engine: HFEngine, store: KVStore) -> str:
    messages = [
        {"role": "system", "content": ["Use the passages.\n\n", *map(Document, TEXTS)]},
        {"role": "user", "content": "Who is the harbour master?"},
    ]
    memory = KVCacheMemory(engine, store)
    return "".join(chunk.text for chunk in memory.stream(messages, sampling=Sampling(max_new_tokens=8)))


def test_a_restart_finds_the_documents_on_disk(tiny_engine: HFEngine, tmp_path: Path) -> None:
    encoded = context(tiny_engine, DiskStore(tmp_path))
    tiny_engine.prefixes.clear()  # what a restart forgets
    loaded = context(tiny_engine, DiskStore(tmp_path))

    assert encoded.encoded_tokens > loaded.encoded_tokens
    assert loaded.reused_tokens >= sum(len(text) for text in TEXTS) // 2


def test_two_tenants_with_the_same_text_share_no_file_and_no_hit(tiny_engine: HFEngine, tmp_path: Path) -> None:
    one, two = (DiskStore(tmp_path, namespace=namespace, salt=b"server's") for namespace in ("one", "two"))
    first = context(tiny_engine, one, "one")
    files = set(tmp_path.rglob("*.safetensors"))
    second = context(tiny_engine, two, "two")

    assert second == first  # not one token less was encoded
    assert two.stats().hits == 0
    assert len(set(tmp_path.rglob("*.safetensors")) - files) == len(files) == len(TEXTS)
    assert {path.name for path in files}.isdisjoint(path.name for path in two.directory.rglob("*"))


def test_damage_is_encoded_again_with_a_warning_and_mended(tiny_engine: HFEngine, tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    right = answer(tiny_engine, store)
    for path in tmp_path.rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[random.randrange(len(data))] ^= 0x10
        path.write_bytes(data)
    tiny_engine.prefixes.clear()

    with pytest.warns(CacheWarning, match="damaged"):
        assert answer(tiny_engine, store) == right
    assert store.verify().clean


def test_a_disk_that_fails_costs_the_cache_and_not_the_answer(tiny_engine: HFEngine, tmp_path: Path) -> None:
    right = answer(tiny_engine, DiskStore(tmp_path / "good"))
    store = DiskStore(tmp_path / "bad")
    shutil.rmtree(store.directory)
    store.directory.touch()  # a file is in the directory's place
    tiny_engine.prefixes.clear()

    with pytest.warns(CacheWarning):
        assert answer(tiny_engine, store) == right


def test_tiers_answer_like_one_store(tiny_engine: HFEngine, tmp_path: Path) -> None:
    right = answer(tiny_engine, MemoryStore())
    remote = FsspecStore(f"memory://{tmp_path.name}/kv")
    for memory_bytes in (0, 1 << 30):
        tiny_engine.prefixes.clear()
        with TieredStore([MemoryStore(memory_bytes), DiskStore(tmp_path / str(memory_bytes)), remote]) as store:
            assert answer(tiny_engine, store) == right
            assert len(list(store.keys())) == len(TEXTS)
