"""Callbacks and instrumentation: the events, their order, and that each event can be serialised."""

import json
from collections.abc import Iterator
from typing import Any

import llama_index.core.instrumentation as instrument
import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.schema import TextNode
from llama_index.core.tools import FunctionTool
from pydantic import Field

from kvcag.llama_index import CAGQueryEngine, KVCacheLLM, document_blocks
from kvcag.testing import EchoEngine


class Seen(BaseEventHandler):
    """Keeps every event."""

    events: list[Any] = Field(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.events.append(event)

    @property
    def names(self) -> list[str]:
        names = [event.class_name() for event in self.events if "InProgress" not in event.class_name()]
        return [name for name in names if name != "SpanDropEvent"]


@pytest.fixture
def seen() -> Iterator[Seen]:
    handler = Seen()
    root = instrument.get_dispatcher()
    root.add_event_handler(handler)
    yield handler
    root.event_handlers.remove(handler)


@pytest.fixture
def llm() -> KVCacheLLM:
    return KVCacheLLM(engine=EchoEngine())


def nodes() -> list[TextNode]:
    return [TextNode(text="The tower is 330 metres tall."), TextNode(text="It stands in Paris.")]


QUERY = [
    "QueryStartEvent",
    "RetrievalStartEvent",
    "RetrievalEndEvent",
    "SynthesizeStartEvent",
    "GetResponseStartEvent",
    "LLMChatStartEvent",
    "LLMChatEndEvent",
    "SynthesizeEndEvent",
    "QueryEndEvent",
]


async def test_a_query_reports_each_step_in_order(llm: KVCacheLLM, seen: Seen) -> None:
    engine = CAGQueryEngine.from_documents(nodes(), llm)
    engine.query("How tall?")
    assert seen.names == QUERY
    seen.events.clear()
    await engine.aquery("How tall?")
    assert seen.names == QUERY


def test_a_streamed_answer_ends_after_the_query(llm: KVCacheLLM, seen: Seen) -> None:
    answer = CAGQueryEngine.from_documents(nodes(), llm, streaming=True).query("How tall?")
    assert seen.names == [name for name in QUERY if name != "LLMChatEndEvent"]
    text = "".join(answer.response_gen)
    assert seen.names[-1] == "LLMChatEndEvent"
    assert seen.events[-1].response.message.content == text


async def test_every_event_can_be_written_down(llm: KVCacheLLM, seen: Seen) -> None:
    messages = [ChatMessage(blocks=[*document_blocks(["one", "two"])]), ChatMessage(content="Which?")]
    llm.chat(messages, stop=["x"], max_new_tokens=9)
    await llm.achat(messages)
    list(llm.stream_chat(messages))
    [_ async for _ in await llm.astream_chat(messages)]
    llm.complete("Hi")
    await llm.acomplete("Hi")
    list(llm.stream_complete("Hi"))
    [_ async for _ in await llm.astream_complete("Hi")]
    llm.chat_with_tools([FunctionTool.from_defaults(lambda: 1, name="one", description="One.")], "Hi")
    CAGQueryEngine.from_documents(nodes(), llm).query("How tall?")
    assert len({event.class_name() for event in seen.events}) > 12
    for event in seen.events:
        assert json.loads(event.model_dump_json())["id_"] == event.id_
    ended = [event for event in seen.events if event.class_name() == "LLMChatEndEvent"]
    assert all(json.loads(event.model_dump_json())["response"]["raw"]["usage"]["prompt_tokens"] for event in ended)


def test_callbacks_come_in_order_and_hold_the_answer(llm: KVCacheLLM) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    manager = CallbackManager([debug])
    engine = CAGQueryEngine.from_documents(nodes(), llm, callback_manager=manager)
    answer = engine.query("How tall?")
    started = [pair[0].event_type for pair in debug.get_event_pairs()]
    assert started == [CBEventType.QUERY, CBEventType.RETRIEVE, CBEventType.SYNTHESIZE, CBEventType.LLM]
    (ended,) = [pair[1] for pair in debug.get_llm_inputs_outputs()]
    assert str(ended.payload["response"].message.content) == str(answer)
