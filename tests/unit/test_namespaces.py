"""One knob separates users: file names, recent contexts, corpora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.documents import Document

from kvcag import HFEngine, KVCacheMemory, MemoryCube
from kvcag.cache.merge import MergeHistory
from kvcag.cache.prefix_cache import PrefixCache
from kvcag.langchain import ChatKVCAG
from kvcag.llama_index import KVCacheLLM
from kvcag.stores import DiskStore
from tests.commands import Kvcag

TEXT = "The harbour opens at five."


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}


def by_memory(engine: HFEngine, folder: Path) -> None:
    KVCacheMemory(engine, folder).add(TEXT)


def by_langchain(engine: HFEngine, folder: Path) -> None:
    ChatKVCAG(engine=engine, store=folder).precompute([Document(TEXT)], progress=False)


def by_llama_index(engine: HFEngine, folder: Path) -> None:
    KVCacheLLM(engine=engine, store=str(folder)).memory.add(TEXT)


def by_cube(engine: HFEngine, folder: Path) -> None:
    cube = MemoryCube(engine, store=folder)
    cube.add(TEXT)
    cube.encode()


@pytest.mark.parametrize("way", [by_memory, by_langchain, by_llama_index, by_cube], ids=lambda way: way.__name__)
def test_one_salt_for_every_store_that_is_opened_by_a_path(
    way: Any, tiny_engine: HFEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter, a cube and a command opened a folder without the server's salt, and left file names to be guessed."""
    way(tiny_engine, tmp_path / "without")
    monkeypatch.setenv("KVCAG_SALT", "a secret of the server")
    way(tiny_engine, tmp_path / "with")
    assert len(files(tmp_path / "without")) == len(files(tmp_path / "with")) == 1
    assert files(tmp_path / "without").isdisjoint(files(tmp_path / "with"))
    assert len(list(DiskStore(tmp_path / "with", salt=b"a secret of the server").keys())) == 1


def test_the_command_line_uses_the_same_salt(kvcag: Kvcag, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCAG_SALT", "a secret of the server")
    kvcag("encode", "notes")
    assert len(kvcag("ls", "--json").json) == 2
    assert not list(DiskStore(kvcag.folder / "kv", salt=b"").keys())


def test_a_dump_is_read_where_the_salt_is_another(
    tiny_engine: HFEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCAG_SALT", "one")
    memory = KVCacheMemory(tiny_engine)
    memory.add(TEXT)
    memory.dump(tmp_path)
    monkeypatch.setenv("KVCAG_SALT", "another")
    loaded = KVCacheMemory(tiny_engine)
    loaded.load(tmp_path)
    assert len(loaded) == 1


def layers(tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4))]


def test_a_tenant_cannot_evict_what_another_holds_within_its_share() -> None:
    """The least recently used went first, whosever it was: one tenant that asks much emptied the others'."""
    token = 2 * 4 * 4
    cache = PrefixCache(40 * token)
    cache.insert(range(10), layers(10), "quiet")
    for number in range(50):
        cache.insert(range(1000 * number, 1000 * number + 9), layers(9), "busy")
        assert cache.nbytes <= cache.max_bytes
    assert cache.match(range(10), "quiet")[0] == 10
    assert cache.match(range(49_000, 49_009), "busy")[0] == 9


def test_a_tenant_alone_has_the_whole_budget_and_gives_way_down_to_its_share() -> None:
    token = 2 * 4 * 4
    cache = PrefixCache(40 * token)
    for number in range(4):
        cache.insert(range(100 * number, 100 * number + 10), layers(10), "first")
    assert cache.nbytes == cache.max_bytes
    for number in range(4):
        cache.insert(range(100 * number, 100 * number + 10), layers(10), "second")
    kept = {
        who: sum(cache.match(range(100 * n, 100 * n + 10), who)[0] for n in range(4)) for who in ("first", "second")
    }
    assert kept == {"first": 20, "second": 20}


def test_a_tenant_cannot_make_another_s_merged_contexts_be_forgotten() -> None:
    history, merged = MergeHistory(remembered=4), object()
    history.put("quiet", (1,), merged)  # type: ignore[arg-type]
    for number in range(20):
        history.put("busy", (number,), merged)  # type: ignore[arg-type]
    assert history.get("quiet", (1,)) is merged
    assert history.get("busy", (19,)) is merged


def test_a_document_of_two_corpora_stays_until_both_drop_it(tiny_engine: HFEngine, tmp_path: Path) -> None:
    memory = KVCacheMemory(tiny_engine, tmp_path)
    memory.sync([TEXT], "A")
    report = memory.sync([TEXT], "B")
    assert (report.encoded, report.kept) == (0, 1)
    assert memory.sync([], "A").dropped == 1
    assert [item.records.composed_text_memory for item in memory] == [TEXT]
    assert memory.sync([], "A").dropped == 0
    assert memory.sync([], "B").dropped == 1
    assert len(memory) == 0


def test_a_corpus_does_not_drop_what_another_door_keeps(tiny_engine: HFEngine) -> None:
    memory = KVCacheMemory(tiny_engine)
    memory.add(TEXT)
    memory.sync([TEXT], "A")
    memory.sync([], "A")
    assert len(memory) == 1
