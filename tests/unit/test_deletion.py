"""What is deleted is gone from everywhere, stays gone whatever is under way, and what could not be deleted is named."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core import Document as Page
from llama_index.core import SummaryIndex
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import TextNode

from kvcag import CacheScheduler, CacheWarning, HFEngine, KVCacheMemory, MemoryCube
from kvcag import Document as Segment
from kvcag.contexts import DocumentCache
from kvcag.errors import InvalidInputError, StoreUnavailableError
from kvcag.langchain import ChatKVCAG, KVCAGMiddleware, create_cag_documents_chain
from kvcag.llama_index import (
    CAGContextChatEngine,
    CAGMemoryBlock,
    CAGQueryEngine,
    CAGSynthesizer,
    KVCacheLLM,
    KVCacheTransform,
    document_blocks,
)
from kvcag.stores import DiskStore, MemoryStore, TieredStore
from kvcag.stores.base import DeletionReport
from tests.commands import Kvcag
from tests.stored import random_item

SECRET = "Ada's password is swordfish."
OTHER = "The harbour opens at five."
PROMPT = ChatPromptTemplate.from_messages([("system", "Answer from:\n\n{context}"), ("human", "{input}")])
DOCUMENTS = [Document(SECRET), Document(OTHER)]
QUESTION = [{"role": "user", "content": "What?"}]


def holding(folder: Path, text: str) -> list[Path]:
    """The files that hold a text in any of the forms in which it is written."""
    forms = {text.encode(), json.dumps(text)[1:-1].encode(), json.dumps(json.dumps(text))[3:-3].encode()}
    return [path for path in folder.rglob("*") if path.is_file() and any(form in path.read_bytes() for form in forms)]


# --- through each door ---------------------------------------------------------------------------------------------


def by_chain(memory: KVCacheMemory) -> None:
    llm = ChatKVCAG(memory=memory, max_tokens=4)
    create_cag_documents_chain(llm, PROMPT).invoke({"context": DOCUMENTS, "input": "What?"})


def by_chain_that_renders(memory: KVCacheMemory) -> None:
    shown = PromptTemplate.from_template("<doc>{page_content}</doc>")
    chain = create_cag_documents_chain(ChatKVCAG(memory=memory, max_tokens=4), PROMPT, document_prompt=shown)
    chain.invoke({"context": DOCUMENTS, "input": "What?"})


def by_precompute(memory: KVCacheMemory) -> None:
    ChatKVCAG(memory=memory).precompute(DOCUMENTS, progress=False)


def by_middleware(memory: KVCacheMemory) -> None:
    """The corpus is one block: the text stands within a larger one."""
    agent = create_agent(ChatKVCAG(memory=memory, max_tokens=4), [], middleware=[KVCAGMiddleware(corpus=DOCUMENTS)])
    agent.invoke({"messages": [("user", "What?")]})


def by_context(memory: KVCacheMemory) -> None:
    llm = ChatKVCAG(memory=memory, max_tokens=4)
    llm.bind(cached_content=llm.create_context(DOCUMENTS)).invoke("What?")


def by_synthesizer(memory: KVCacheMemory) -> None:
    CAGSynthesizer(KVCacheLLM(memory=memory, max_new_tokens=4)).get_response("What?", [SECRET, OTHER], documents=True)


def by_query_engine(memory: KVCacheMemory) -> None:
    """All documents are one."""
    CAGQueryEngine.from_documents([SECRET, OTHER], KVCacheLLM(memory=memory, max_new_tokens=4)).query("What?")


def by_chat_engine(memory: KVCacheMemory) -> None:
    index = SummaryIndex.from_documents([Page(text=SECRET), Page(text=OTHER)])
    llm = KVCacheLLM(memory=memory, max_new_tokens=4)
    memory_of_chat = ChatMemoryBuffer.from_defaults(llm=llm)
    engine = CAGContextChatEngine.from_defaults(retriever=index.as_retriever(), llm=llm, memory=memory_of_chat)
    engine.chat("What?")


def by_memory_block(memory: KVCacheMemory) -> None:
    block = CAGMemoryBlock(documents=[SECRET, OTHER])
    system = ChatMessage(role=MessageRole.SYSTEM, blocks=document_blocks(block.documents or []))
    KVCacheLLM(memory=memory, max_new_tokens=4).chat([system, ChatMessage("What?")])


def by_ingestion(memory: KVCacheMemory) -> None:
    KVCacheTransform(KVCacheLLM(memory=memory))([TextNode(text=SECRET), TextNode(text=OTHER)])


def by_sync(memory: KVCacheMemory) -> None:
    memory.sync([SECRET, OTHER])


DOORS: list[Callable[[KVCacheMemory], None]] = [
    by_chain,
    by_chain_that_renders,
    by_precompute,
    by_middleware,
    by_context,
    by_synthesizer,
    by_query_engine,
    by_chat_engine,
    by_memory_block,
    by_ingestion,
    by_sync,
]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_after_a_purge_no_file_of_store_scheduler_and_dump_holds_the_text(
    door: Callable[[KVCacheMemory], None], tiny_engine: HFEngine, tmp_path: Path
) -> None:
    memory = KVCacheMemory(tiny_engine, tmp_path / "kv")
    with CacheScheduler(memory, 1 << 24, state=tmp_path / "scheduler.sqlite", every_s=None, quiet_s=0) as scheduler:
        door(memory)
        door(memory)
        scheduler.run_once()
        memory.dump(tmp_path / "dump")
        assert {path.relative_to(tmp_path).parts[0] for path in holding(tmp_path, SECRET)} >= {"kv", "dump"}
        report = memory.purge(SECRET, dumps=[tmp_path / "dump"])
        assert report.ids
        assert not report.failed
        scheduler.run_once()
        assert not holding(tmp_path, SECRET)
    assert not holding(tmp_path, SECRET)
    assert tiny_engine.prefixes.nbytes == 0
    KVCacheMemory(tiny_engine).load(tmp_path / "dump")


@pytest.mark.parametrize("strategy", ["auto", "exact"])
def test_after_a_deletion_no_file_of_a_cube_and_its_dump_holds_the_text(
    strategy: Any, tiny_engine: HFEngine, tmp_path: Path
) -> None:
    cube = MemoryCube(tiny_engine, store=tmp_path / "kv", strategy=strategy)
    [secret, _] = cube.add([SECRET, OTHER])
    cube.ask("What?", max_new_tokens=2)
    cube.dump(tmp_path / "dump")
    assert len(holding(tmp_path, SECRET)) >= 2
    assert cube.delete(secret).ids
    assert cube.purge(SECRET, dumps=tmp_path / "dump").deleted[str(tmp_path / "dump")]
    assert not holding(tmp_path, SECRET)
    assert [text.memory for text in MemoryCube.from_dir(tmp_path / "dump", tiny_engine).get_all()] == [OTHER]


def test_the_command_deletes_a_text_from_store_and_dumps(kvcag: Kvcag, tiny_engine: HFEngine) -> None:
    text = "The lighthouse of Varn is painted green."
    kvcag("encode", "notes")
    kvcag("ask", "Who?", "--strategy", "exact", "--max-new-tokens", 1)
    memory = KVCacheMemory(tiny_engine)
    memory.add([text, OTHER])
    memory.dump(kvcag.folder / "dump")
    (kvcag.folder / "notes" / "a.md").unlink()
    done = kvcag("purge", text, "--dump", "dump", "--json").json
    assert len(done["deleted"][str(kvcag.folder / "kv")]) == 2
    assert len(done["deleted"]["dump"]) == 1
    assert done["failed"] == {}
    assert not holding(kvcag.folder, text)
    assert holding(kvcag.folder, OTHER)
    assert kvcag("purge", text).code == 1


# --- what could not be deleted -------------------------------------------------------------------------------------


def damage(folder: Path) -> Path:
    path = sorted(folder.rglob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:100])
    return path


def test_a_purge_goes_on_past_a_damaged_file_and_its_report_names_it(tiny_engine: HFEngine, tmp_path: Path) -> None:
    """One truncated file made it raise, and nothing was deleted."""
    memory = KVCacheMemory(tiny_engine, tmp_path)
    texts = {id: text for text in (SECRET, OTHER) for id in memory.add(text)}
    path = damage(tmp_path)
    [(readable, text)] = [(id, text) for id, text in texts.items() if memory.store.file(id) != path]  # type: ignore[attr-defined]
    with pytest.warns(CacheWarning, match="not everything could be deleted"):
        report = memory.purge(text)
    assert report.ids == [readable]
    assert report.deleted == {str(tmp_path): [readable]}
    assert list(report.failed) == [str(path)]


def test_a_report_is_not_empty_looking_when_something_failed(tiny_engine: HFEngine, tmp_path: Path) -> None:
    memory = KVCacheMemory(tiny_engine, tmp_path)
    memory.add(OTHER)
    path = damage(tmp_path)
    with pytest.warns(CacheWarning, match="not everything could be deleted"):
        report = memory.purge("A text that was never here.")
    assert report
    assert not report.ids
    assert list(report.failed) == [str(path)]
    assert "may still hold the text" in str(report)
    assert not DeletionReport()


def test_a_damaged_file_of_the_text_itself_is_deleted(tiny_engine: HFEngine, tmp_path: Path) -> None:
    memory = KVCacheMemory(tiny_engine, tmp_path)
    memory.add(SECRET)
    path = damage(tmp_path)
    report = memory.purge(SECRET)
    assert not path.exists()
    assert not report.failed


@pytest.mark.parametrize("what", ["cut", "a directory", "under another name"])
def test_delete_all_deletes_what_cannot_be_read_or_says_so(what: str, tiny_engine: HFEngine, tmp_path: Path) -> None:
    """It skipped a damaged file and said nothing."""
    memory = KVCacheMemory(tiny_engine, tmp_path)
    memory.add([SECRET, OTHER])
    path = damage(tmp_path) if what == "cut" else sorted(tmp_path.rglob("*.safetensors"))[0]
    if what == "a directory":
        path.unlink()
        path.mkdir()
        with pytest.warns(CacheWarning, match="not everything could be deleted"):
            report = memory.delete_all()
        assert list(report.failed) == [str(path)]
        return
    if what == "under another name":
        path.rename(path.with_name("0" * 62 + ".safetensors"))
    report = memory.delete_all()
    assert not report.failed
    assert not list(tmp_path.rglob("*.safetensors"))


def test_rm_all_deletes_what_cannot_be_read(kvcag: Kvcag) -> None:
    kvcag("encode", "notes")
    path = damage(kvcag.folder / "kv")
    assert kvcag("rm", "--all", "--yes").code == 0
    assert not path.exists()


class ReadOnly(MemoryStore):
    def delete(self, keys: Any) -> None:
        raise StoreUnavailableError(None, "permission denied", "s3://bucket")


def test_a_report_says_where_a_text_was_deleted_and_where_it_could_not_be(tmp_path: Path) -> None:
    disk, other = DiskStore(tmp_path), ReadOnly()
    store = TieredStore([disk, other])
    store.put(random_item("a", text=SECRET))
    report = store.purge(SECRET)
    assert report.deleted[str(tmp_path)] == ["a"]
    assert "permission denied" in report.failed["a"]
    assert report.ids == ["a"]
    assert not disk.contains("a")
    assert other.contains("a")


def test_metadata_that_are_not_json_do_not_stop_a_purge(tiny_engine: HFEngine) -> None:
    """A date among the metadata made the store in memory raise, and nothing was deleted."""
    memory = KVCacheMemory(tiny_engine)
    memory.add(Document(OTHER, metadata={"when": object()}))
    memory.add(SECRET)
    assert len(memory.purge(SECRET).ids) == 1


class Broken:
    """A database of texts that fails."""

    def add(self, texts: Any) -> None:
        """Takes them."""

    def delete(self, ids: Any) -> None:
        raise ConnectionError("the database is gone")


def test_a_database_that_fails_does_not_keep_a_cube_from_deleting(tiny_engine: HFEngine, tmp_path: Path) -> None:
    cube = MemoryCube(tiny_engine, Broken(), tmp_path)
    [secret] = cube.add(SECRET)
    cube.encode()
    with pytest.warns(CacheWarning, match="the database is gone"):
        report = cube.delete(secret)
    assert report.failed == {"Broken": "ConnectionError: the database is gone"}
    assert not holding(tmp_path, SECRET)


def test_a_dump_that_cannot_be_read_is_named(tiny_engine: HFEngine, tmp_path: Path) -> None:
    memory = KVCacheMemory(tiny_engine)
    memory.add([SECRET, OTHER])
    memory.dump(tmp_path / "dump")
    damaged = damage(tmp_path / "dump")
    report = memory.purge("A text that is not there.", dumps=[tmp_path / "dump", tmp_path / "none"])
    assert set(report.failed) == {str(damaged), str(tmp_path / "none")}


# --- handles, recent contexts, work under way ----------------------------------------------------------------------


def test_a_handle_of_another_memory_over_the_store_does_not_answer(tiny_engine: HFEngine, tmp_path: Path) -> None:
    """It still answered, and stored the text again."""
    llm = ChatKVCAG(engine=tiny_engine, store=tmp_path, max_tokens=4)
    bound = llm.bind(cached_content=llm.create_context([SECRET]))
    bound.invoke("What?")
    KVCacheMemory(tiny_engine, DiskStore(tmp_path)).purge(SECRET)
    with pytest.raises(InvalidInputError, match="there is no context"):
        bound.invoke("What?")
    assert not holding(tmp_path, SECRET)


def test_a_stream_that_was_opened_before_a_purge_leaves_nothing(tiny_engine: HFEngine) -> None:
    """Its first step was taken for a question that came after the purge."""
    memory = KVCacheMemory(tiny_engine)
    asked = [{"role": "system", "content": [Segment(SECRET), Segment(OTHER)]}, {"role": "user", "content": "What?"}]
    for strategy in ("query", "exact"):
        stream = memory.stream(asked, strategy=strategy, max_new_tokens=4)
        memory.purge(SECRET)
        list(stream)
        assert tiny_engine.prefixes.nbytes == 0
        assert not tiny_engine.merge_history._contexts
        assert not memory.purge(SECRET)


class Meeting:
    """Lets another thread purge while a document is being encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoding, self.purged = threading.Event(), threading.Event()
        encode = DocumentCache.encode

        def slow(documents: DocumentCache, head_ids: Any, token_ids: Any, text: str, *rest: Any) -> Any:
            item = encode(documents, head_ids, token_ids, text, *rest)
            if SECRET in text:
                self.encoding.set()
                self.purged.wait(10)
            return item

        monkeypatch.setattr(DocumentCache, "encode", slow)

    def purge(self, work: Callable[[], object], purge: Callable[[], object]) -> None:
        self.encoding.clear()
        self.purged.clear()
        thread = threading.Thread(target=work)
        thread.start()
        assert self.encoding.wait(10)
        purge()
        self.purged.set()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    return Meeting(monkeypatch)


@pytest.mark.parametrize("door", [by_chain, by_synthesizer, by_ingestion, by_sync], ids=lambda door: door.__name__)
def test_a_document_that_is_purged_while_it_is_encoded_does_not_come_back(
    door: Callable[[KVCacheMemory], None], meeting: Meeting, tiny_engine: HFEngine, tmp_path: Path
) -> None:
    memory = KVCacheMemory(tiny_engine, tmp_path)
    other = KVCacheMemory(tiny_engine, DiskStore(tmp_path))  # by another object over the same folder
    meeting.purge(lambda: door(memory), lambda: other.purge(SECRET))
    assert not holding(tmp_path, SECRET)
    assert holding(tmp_path, OTHER)


def test_a_document_that_is_purged_by_another_process_while_it_is_encoded_does_not_come_back(
    meeting: Meeting, tiny_engine: HFEngine, tmp_path: Path
) -> None:
    memory = KVCacheMemory(tiny_engine, tmp_path)

    def purge_elsewhere() -> None:
        child = os.fork()
        if not child:
            DiskStore(tmp_path).purge(SECRET)
            os._exit(0)
        os.waitpid(child, 0)

    meeting.purge(lambda: memory.add(SECRET), purge_elsewhere)
    assert not holding(tmp_path, SECRET)


def test_a_promotion_does_not_bring_a_purged_text_back(meeting: Meeting, tiny_engine: HFEngine, tmp_path: Path) -> None:
    """The scheduler encoded a hot text ahead, and stored it after it was purged."""
    memory = KVCacheMemory(tiny_engine, tmp_path / "kv")
    with CacheScheduler(memory, 1 << 24, state=tmp_path / "state", every_s=None, quiet_s=0) as scheduler:
        for _ in range(4):
            scheduler.observe([SECRET])
        meeting.purge(scheduler.run_once, lambda: memory.purge(SECRET))
        scheduler.run_once()
        assert not holding(tmp_path, SECRET)


@pytest.mark.filterwarnings("ignore::kvcag.CacheWarning")
def test_twenty_of_twenty_stay_deleted(tiny_engine: HFEngine, tmp_path: Path) -> None:
    """The text came back 18 times of 20."""
    memory = KVCacheMemory(tiny_engine, tmp_path / "kv")
    with CacheScheduler(memory, 1 << 24, state=tmp_path / "state", every_s=0.01, quiet_s=0) as scheduler:
        for turn in range(20):
            asking = threading.Thread(target=by_chain, args=(memory,))
            asking.start()
            for _ in range(turn % 5):
                scheduler.observe([SECRET])
            memory.purge(SECRET)
            asking.join()
            memory.purge(SECRET)  # the question may have come after the first purge
        assert not holding(tmp_path, SECRET)


def test_a_scheduler_does_not_encode_a_deleted_item_again(tiny_engine: HFEngine, tmp_path: Path) -> None:
    memory = KVCacheMemory(tiny_engine, tmp_path / "kv")
    with CacheScheduler(memory, 1 << 24, state=tmp_path / "state", every_s=None, quiet_s=0) as scheduler:
        for _ in range(4):
            scheduler.observe([SECRET])
        [key] = scheduler.run_once().promoted
        memory.delete(key)
        assert scheduler.run_once().promoted == []
        assert not holding(tmp_path, SECRET)


def test_no_log_holds_a_hash_of_a_text(tiny_engine: HFEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every line of the scheduler's named an item by the SHA-256 of its tokens: whoever has the text finds it there."""
    memory = KVCacheMemory(tiny_engine, tmp_path / "kv")
    budget = 2 * 60 * tiny_engine.bytes_per_token
    with caplog.at_level("DEBUG"), CacheScheduler(memory, budget, state=tmp_path / "s", every_s=None, quiet_s=0) as one:
        for text in (SECRET, OTHER, "A third text that makes the others leave.", "And a fourth one, as long."):
            for _ in range(4):
                one.observe([text])
            one.run_once()
        ids = list(memory.store.keys())
        digests = {id.removeprefix("kv:sha256:") for id in ids} | set(one._texts.known)
        assert caplog.records
        assert not [line for line in caplog.messages if any(digest in line for digest in digests)]
        memory.purge(SECRET)
        purged = memory.documents.key(memory.engine.template.encode_text(f"{SECRET}\n\n")).removeprefix("kv:sha256:")
        for path in tmp_path.iterdir():
            assert path.is_dir() or purged.encode() not in path.read_bytes()


def test_a_context_that_is_read_while_another_door_deletes_it_is_not_remembered(tiny_engine: HFEngine) -> None:
    class Slow(MemoryStore):
        def delete(self, keys: Any) -> None:
            reader.with_context(id, QUESTION)
            super().delete(keys)

    store = Slow()
    reader = KVCacheMemory(tiny_engine, store)
    id = reader.create_context([SECRET])
    for delete in (lambda: store.purge(SECRET), lambda: store.erase([id])):
        delete()
        with pytest.raises(InvalidInputError, match="there is no context"):
            reader.with_context(id, QUESTION)
        reader.create_context([SECRET])


def test_a_memory_with_another_store_forgets_the_contexts_of_the_first(tiny_engine: HFEngine) -> None:
    memory = KVCacheMemory(tiny_engine)
    id = memory.create_context([SECRET])
    memory.store = MemoryStore()
    with pytest.raises(InvalidInputError, match="there is no context"):
        memory.with_context(id, QUESTION)
