"""A model whose forward pass raises: every way of asking reports it at once, keeps no lock and leaves no thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import SystemMessage
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import TextNode
from llama_index.retrievers.bm25 import BM25Retriever
from tqdm import tqdm

from kvcag import CacheScheduler, Document, HFEngine, KVCacheMemory, MemoryCube
from kvcag.concurrency import in_thread, iterate
from kvcag.core import KVCacheItem
from kvcag.langchain import ChatKVCAG
from kvcag.llama_index import CAGContextChatEngine, CAGSynthesizer, KVCacheLLM
from kvcag.stores.memory import MemoryStore
from kvcag.testing import byte_tokenizer, tiny_model
from tests.waits import joined, run_together, until

TEXTS = ["Alice has a red bicycle.", "Bob has a green car."]
QUESTION = "Who has a car?"


@pytest.fixture(autouse=True)
def _no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # BM25's progress bar keeps a thread
    before = set(threading.enumerate())
    yield
    end = time.monotonic() + 1
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < end, f"still running: {left}"
        time.sleep(0.005)


@dataclass
class Failing:
    """Makes an engine's model raise.

    Attributes:
        engine: the engine.
        error: what is raised.
        after: forward passes that go well before.
        raised_at: when it was raised first; None as long as it was not.
    """

    engine: HFEngine = field(default_factory=lambda: HFEngine(tiny_model(), byte_tokenizer()))
    error: Callable[[str], Exception] = RuntimeError
    after: int = 0
    raised_at: float | None = None

    def __post_init__(self) -> None:
        self.passes = 0
        self.hook = self.engine.model.register_forward_pre_hook(self._pass)

    def mend(self) -> None:
        self.hook.remove()

    def _pass(self, *_: Any) -> None:
        self.passes += 1
        if self.passes > self.after:
            self.raised_at = self.raised_at or time.monotonic()
            raise self.error("the device is lost")


# --- every way of asking ----------------------------------------------------------------------------------------


def memory_over(engine: HFEngine) -> KVCacheMemory:
    return KVCacheMemory(engine, instruction="Answer from these.")


def cube_over(engine: HFEngine) -> MemoryCube:
    cube = MemoryCube(engine)
    cube.add(TEXTS)
    return cube


def chat_over(engine: HFEngine) -> ChatKVCAG:
    return ChatKVCAG(engine=engine, max_tokens=8)


def llm_over(engine: HFEngine) -> KVCacheLLM:
    return KVCacheLLM(engine=engine, max_new_tokens=8)


def chat_engine_over(engine: HFEngine) -> CAGContextChatEngine:
    retriever = BM25Retriever.from_defaults(nodes=[TextNode(text=text) for text in TEXTS], similarity_top_k=2)
    memory = ChatMemoryBuffer.from_defaults(token_limit=1000)  # core's `Memory` keeps a thread for its database
    return CAGContextChatEngine.from_defaults(retriever, llm=llm_over(engine), memory=memory)


def with_documents(engine: HFEngine) -> list[Any]:
    documents = [Document(f"{text}\n\n") for text in TEXTS]
    return [{"role": "system", "content": ["Use:\n\n", *documents]}, {"role": "user", "content": QUESTION}]


def sampled(engine: HFEngine) -> Any:
    return engine.sampling(max_new_tokens=8)


LANGCHAIN_DOCUMENTS = [SystemMessage([f"{TEXTS[0]} ", f"{TEXTS[1]} "]), ("human", QUESTION)]
LLAMA_INDEX = [ChatMessage(content=QUESTION)]

Way = Callable[[HFEngine], Any]
AsyncWay = Callable[[HFEngine], Awaitable[Any]]

ANSWERING: dict[str, Way] = {
    "generate": lambda engine: engine.generate(QUESTION, max_new_tokens=8),
    "generate_stream": lambda engine: list(engine.generate_stream(QUESTION, max_new_tokens=8)),
    "memory.stream": lambda engine: list(memory_over(engine).stream(QUESTION, sampling=sampled(engine))),
    "memory.stream, documents": lambda engine: list(
        memory_over(engine).stream(with_documents(engine), sampling=sampled(engine))
    ),
    "langchain invoke": lambda engine: chat_over(engine).invoke(QUESTION),
    "langchain invoke, documents": lambda engine: chat_over(engine).invoke(LANGCHAIN_DOCUMENTS),
    "langchain stream": lambda engine: list(chat_over(engine).stream(QUESTION)),
    "langchain batch": lambda engine: chat_over(engine).batch([QUESTION, "Who else?"]),
    "llama_index chat": lambda engine: llm_over(engine).chat(LLAMA_INDEX),
    "llama_index stream_chat": lambda engine: list(llm_over(engine).stream_chat(LLAMA_INDEX)),
    "llama_index complete": lambda engine: llm_over(engine).complete(QUESTION),
    "llama_index stream_complete": lambda engine: list(llm_over(engine).stream_complete(QUESTION)),
    "llama_index chat engine": lambda engine: chat_engine_over(engine).chat(QUESTION),
    "llama_index chat engine, stream": lambda engine: list(chat_engine_over(engine).stream_chat(QUESTION).response_gen),
    "cube.ask": lambda engine: cube_over(engine).ask(QUESTION, max_new_tokens=8),
    "cube.stream": lambda engine: list(cube_over(engine).stream(QUESTION, max_new_tokens=8)),
}
ENCODING: dict[str, Way] = {
    "build_kv_cache": lambda engine: engine.build_kv_cache(TEXTS[0]),
    "memory.extract": lambda engine: memory_over(engine).extract(TEXTS[0]),
    "memory.sync": lambda engine: memory_over(engine).sync(TEXTS),
    "cube.encode": lambda engine: cube_over(engine).encode(),
    "langchain create_context": lambda engine: chat_over(engine).create_context(TEXTS),
    "scheduler.promote": lambda engine: promoted(engine),
}


def promoted(engine: HFEngine) -> list[str]:
    with CacheScheduler(memory_over(engine), 1 << 20, quiet_s=0.0) as scheduler:
        return scheduler.promote(TEXTS[0])


async def all_of(pieces: Any) -> list[Any]:
    return [piece async for piece in pieces]


async def streamed_chat(engine: HFEngine) -> list[Any]:
    return await all_of(await llm_over(engine).astream_chat(LLAMA_INDEX))


async def streamed_completion(engine: HFEngine) -> list[Any]:
    return await all_of(await llm_over(engine).astream_complete(QUESTION))


async def streamed_by_a_chat_engine(engine: HFEngine) -> list[Any]:
    chat = await chat_engine_over(engine).astream_chat(QUESTION)
    try:
        return await all_of(chat.async_response_gen())
    finally:
        await asyncio.wait([chat.awrite_response_to_history_task])
        chat.awrite_response_to_history_task.exception()  # core raises it twice


async def synthesized(engine: HFEngine) -> Any:
    return await CAGSynthesizer(llm_over(engine)).aget_response(QUESTION, TEXTS, documents=True)


ASYNC_ANSWERING: dict[str, AsyncWay] = {
    "iterate": lambda engine: all_of(iterate(lambda: engine.generate_stream(QUESTION, max_new_tokens=8))),
    "langchain ainvoke": lambda engine: chat_over(engine).ainvoke(QUESTION),
    "langchain astream": lambda engine: all_of(chat_over(engine).astream(QUESTION)),
    "langchain astream, documents": lambda engine: all_of(chat_over(engine).astream(LANGCHAIN_DOCUMENTS)),
    "langchain abatch": lambda engine: chat_over(engine).abatch([QUESTION, "Who else?"]),
    "llama_index achat": lambda engine: llm_over(engine).achat(LLAMA_INDEX),
    "llama_index astream_chat": streamed_chat,
    "llama_index acomplete": lambda engine: llm_over(engine).acomplete(QUESTION),
    "llama_index astream_complete": streamed_completion,
    "llama_index synthesizer": synthesized,
    "llama_index chat engine, achat": lambda engine: chat_engine_over(engine).achat(QUESTION),
    "llama_index chat engine, astream_chat": streamed_by_a_chat_engine,
    "cube.aask": lambda engine: cube_over(engine).aask(QUESTION, max_new_tokens=8),
    "cube.astream": lambda engine: all_of(cube_over(engine).astream(QUESTION, max_new_tokens=8)),
}
ASYNC_ENCODING: dict[str, AsyncWay] = {
    "cube.aencode": lambda engine: cube_over(engine).aencode(),
    "langchain acreate_context": lambda engine: chat_over(engine).acreate_context(TEXTS),
    "in_thread": lambda engine: in_thread(engine.build_kv_cache, TEXTS[0]),
}


def finished(way: AsyncWay) -> Way:
    """An asynchronous way as one that blocks. The event loop's threads end with it."""

    async def bounded(engine: HFEngine) -> Any:
        return await asyncio.wait_for(way(engine), 30)

    return lambda engine: asyncio.run(bounded(engine))


ALL_ANSWERING = ANSWERING | {name: finished(way) for name, way in ASYNC_ANSWERING.items()}
ALL_ENCODING = ENCODING | {name: finished(way) for name, way in ASYNC_ENCODING.items()}
ALL = ALL_ANSWERING | ALL_ENCODING

# Core's chat engine raises the error to the reader, and once more in the thread that writes the history.
core_raises_twice = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def error_of(way: Way, failing: Failing) -> BaseException:
    """What the caller gets. Fails if it does not come within a second of when the model raised."""
    errors: list[BaseException] = []
    arrived: list[float] = []

    def ask() -> None:
        try:
            way(failing.engine)
        except BaseException as error:
            arrived.append(time.monotonic())
            errors.append(error)

    run_together([threading.Thread(target=ask)])
    assert errors, "the caller was told of no error"
    assert failing.raised_at is not None, repr(errors)
    assert arrived[0] - failing.raised_at < 1
    return errors[0]


@core_raises_twice
@pytest.mark.parametrize("way", ALL.values(), ids=ALL)
def test_an_error_of_the_first_pass_arrives_within_a_second(way: Way) -> None:
    error = error_of(way, Failing())
    assert isinstance(error, RuntimeError)
    assert str(error) == "the device is lost"


@core_raises_twice
@pytest.mark.parametrize("way", ALL_ANSWERING.values(), ids=ALL_ANSWERING)
def test_an_error_in_the_middle_of_an_answer_arrives_within_a_second(way: Way) -> None:
    error = error_of(way, Failing(after=3))
    assert isinstance(error, RuntimeError)
    assert str(error) == "the device is lost"


@core_raises_twice
@pytest.mark.parametrize("way", ALL.values(), ids=ALL)
def test_an_error_that_no_future_can_hold_arrives_too(way: Way) -> None:
    """Python before 3.12 drops a StopIteration that a worker thread raised, and whoever awaits it waits for ever."""
    error_of(way, Failing(error=StopIteration))


@core_raises_twice
@pytest.mark.parametrize("way", ALL.values(), ids=ALL)
def test_the_engine_answers_as_before_after_an_error(way: Way) -> None:
    failing = Failing(after=1 if way in ALL_ANSWERING.values() else 0)
    error_of(way, failing)
    failing.mend()
    answers: list[str] = []
    run_together([threading.Thread(target=lambda: answers.append(failing.engine.generate(QUESTION, max_new_tokens=8)))])
    assert answers == [HFEngine(tiny_model(), byte_tokenizer()).generate(QUESTION, max_new_tokens=8)]


@pytest.mark.parametrize("name", ["generate", "memory.stream, documents", "langchain invoke, documents", "cube.ask"])
def test_those_who_wait_for_the_one_that_fails_are_told_as_well(name: str) -> None:
    failing, errors = Failing(), []
    shared = memory_over(failing.engine)
    ways = {"memory.stream, documents": lambda: list(shared.stream(with_documents(failing.engine)))}
    ask = ways.get(name, lambda: ALL[name](failing.engine))

    def work() -> None:
        try:
            ask()
        except RuntimeError as error:
            errors.append(str(error))

    run_together([threading.Thread(target=work) for _ in range(4)])
    assert errors == ["the device is lost"] * 4


# --- the scheduler ----------------------------------------------------------------------------------------------


def test_a_scheduler_says_that_a_pass_failed_and_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    failing = Failing()
    with CacheScheduler(memory_over(failing.engine), 1 << 20, every_s=0.05, quiet_s=0.0) as scheduler:
        for _ in range(2):
            scheduler.observe(TEXTS)
        until(lambda: scheduler.metrics()["failed"])
        assert failing.raised_at is not None
        assert time.monotonic() < failing.raised_at + 1
        assert "a pass of the scheduler failed and will be tried again" in caplog.text
        assert "the device is lost" in caplog.text
        failing.mend()
        until(lambda: scheduler.metrics()["promoted"] == len(TEXTS))


def test_a_scheduler_that_fails_closes_at_once() -> None:
    scheduler = CacheScheduler(memory_over(Failing().engine), 1 << 20, every_s=60.0, quiet_s=0.0)
    for _ in range(2):
        scheduler.observe(TEXTS)
    until(lambda: scheduler.metrics()["failed"])  # and now it would wait for a minute
    closing = threading.Thread(target=scheduler.close, daemon=True)
    closing.start()
    joined([closing], seconds=1)


def test_a_question_beside_a_scheduler_is_told_of_the_error() -> None:
    failing = Failing()
    memory = memory_over(failing.engine)
    with CacheScheduler(memory, 1 << 20, every_s=0.01, quiet_s=0.0) as scheduler:
        for _ in range(2):
            scheduler.observe(TEXTS)
        error = error_of(lambda engine: list(memory.stream(with_documents(engine))), failing)
        assert str(error) == "the device is lost"


# --- what is left behind ----------------------------------------------------------------------------------------


async def test_a_cube_is_as_it_was_after_an_error() -> None:
    failing = Failing(after=1)
    cube = cube_over(failing.engine)
    with pytest.raises(RuntimeError, match="the device is lost"):
        await asyncio.wait_for(cube.aask(QUESTION, max_new_tokens=8), 30)
    failing.mend()
    asked = cube.aask(QUESTION, max_new_tokens=8)
    answer = await asyncio.wait_for(asked, 30)
    assert answer.text == cube_over(HFEngine(tiny_model(), byte_tokenizer())).ask(QUESTION, max_new_tokens=8).text
    await asyncio.get_running_loop().shutdown_default_executor()


def test_a_store_that_fails_does_not_look_like_one_with_fewer_items(tmp_path: Path) -> None:
    class Ending(MemoryStore):
        def get(self, key: str) -> KVCacheItem | None:
            raise StopIteration

    memory = KVCacheMemory(HFEngine(tiny_model(), byte_tokenizer()), Ending())
    memory.add(memory.extract(TEXTS[0]))
    with pytest.raises(StopIteration):
        memory.get_all()
    with pytest.raises(RuntimeError):  # what a StopIteration becomes within a context manager
        memory.dump(tmp_path)


def test_documents_that_failed_to_be_encoded_ahead_are_encoded_when_asked() -> None:
    failing = Failing(after=2)
    chat = chat_over(failing.engine)
    documents = [LangChainDocument(text) for text in TEXTS]
    with pytest.raises(RuntimeError, match="the device is lost"):
        chat.precompute(documents * 3, progress=False)
    failing.mend()
    assert len(chat.precompute(documents, progress=False)) == 2
