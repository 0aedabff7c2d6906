"""Whatever is wrong with a store, an answer comes: documents are encoded, and one warning says why."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate

from kvcag import CacheWarning, HFEngine, KVCacheMemory, MemoryCube
from kvcag.errors import StoreUnavailableError
from kvcag.langchain import ChatKVCAG, KVCAGMiddleware, create_cag_documents_chain
from kvcag.llama_index import CAGSynthesizer, KVCacheLLM
from kvcag.stores import DiskStore, KVStore, MemoryStore
from kvcag.stores.files import seal

ONE, OTHER = "Ada lives in Harbour Street.", "The harbour opens at five."
DOCUMENTS = [Document(ONE), Document(OTHER)]
PROMPT = ChatPromptTemplate.from_messages([("system", "{context}"), ("human", "{input}")])


def chat_model(engine: HFEngine, store: KVStore) -> None:
    chain = create_cag_documents_chain(ChatKVCAG(engine=engine, store=store, max_tokens=2), PROMPT)
    assert isinstance(chain.invoke({"context": DOCUMENTS, "input": "What?"}), str)


def llm(engine: HFEngine, store: KVStore) -> None:
    CAGSynthesizer(KVCacheLLM(engine=engine, store=store, max_new_tokens=2)).get_response(
        "What?", [ONE, OTHER], documents=True
    )


def middleware(engine: HFEngine, store: KVStore) -> None:
    model = ChatKVCAG(engine=engine, store=store, max_tokens=2)
    create_agent(model, [], middleware=[KVCAGMiddleware(corpus=DOCUMENTS)]).invoke({"messages": [("user", "What?")]})


def precompute(engine: HFEngine, store: KVStore) -> None:
    assert len(ChatKVCAG(engine=engine, store=store).precompute(DOCUMENTS, progress=False)) == 2


def cube(engine: HFEngine, store: KVStore) -> None:
    made = MemoryCube(engine, store=store)
    made.add([ONE, OTHER])
    assert made.ask("What?", max_new_tokens=2).usage.completion_tokens > 0


def sync(engine: HFEngine, store: KVStore) -> None:
    assert len(KVCacheMemory(engine, store).sync([ONE, OTHER]).ids) == 2


def memory(engine: HFEngine, store: KVStore) -> None:
    made = KVCacheMemory(engine, store)
    made.add([ONE, OTHER])
    made.ask("What?", [], max_new_tokens=2)


WAYS = [chat_model, llm, middleware, precompute, cube, sync, memory]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def hostile(path: Path) -> None:
    """A header whose seal is right and whose manifest is nested deeper than a reader's stack."""
    deep = "[" * 100_000 + "]" * 100_000
    body = f'{{"__metadata__":{{"kvcag.version":"1","kvcag.checksum":"{"0" * 16}","kvcag.manifest":{deep}}}}}'.encode()
    path.write_bytes(seal(len(body).to_bytes(8, "little") + body))


def foreign(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 something else")


@pytest.mark.parametrize("harm", [cut, fifo, directory, hostile, foreign], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_one_bad_file_in_the_store_does_not_stop_an_answer(
    way: Callable[[HFEngine, KVStore], None],
    harm: Callable[[Path], None],
    tiny_engine: HFEngine,
    tmp_path: Path,
) -> None:
    way(tiny_engine, DiskStore(tmp_path))
    harm(sorted(tmp_path.rglob("*.safetensors"))[0])
    tiny_engine.prefixes.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        way(tiny_engine, DiskStore(tmp_path))
    # `precompute` does not read what is there: whoever asks reads it, and is warned.
    assert len(said) <= 1 if way is precompute else [warned.category for warned in said] == [CacheWarning]


class Gone(MemoryStore):
    """A store whose place cannot be reached."""

    def _gone(self, *_: object) -> Any:
        raise StoreUnavailableError(None, "the bucket is gone", "s3://bucket")

    get = put = contains = keys = manifest = delete = stats = _gone  # type: ignore[assignment]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_store_that_is_gone_does_not_stop_an_answer(
    way: Callable[[HFEngine, KVStore], None], tiny_engine: HFEngine
) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        way(tiny_engine, Gone())
    assert [str(warned.message).count("the bucket is gone") for warned in said] == [1], [*map(str, said)]


def test_questions_over_everything_that_is_kept_go_on_past_a_damaged_file(
    tiny_engine: HFEngine, tmp_path: Path
) -> None:
    """The text of an item whose keys were damaged is still there: it is encoded again."""
    made = KVCacheMemory(tiny_engine, tmp_path)
    made.add([ONE, OTHER])
    path = sorted(tmp_path.rglob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.warns(CacheWarning, match="encoding a document again"):
        answer = made.ask("What?", max_new_tokens=2)
    assert answer.report is not None
    assert answer.report.context_tokens > len(ONE) + len(OTHER)


def test_a_memory_over_a_store_that_is_gone_can_be_shown(tiny_engine: HFEngine) -> None:
    assert "the bucket is gone" in repr(KVCacheMemory(tiny_engine, Gone()))
