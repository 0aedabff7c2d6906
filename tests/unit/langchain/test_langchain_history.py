"""Histories that LangChain edits, and documents in tool results."""

from __future__ import annotations

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ClearToolUsesEdit, ContextEditingMiddleware, SummarizationMiddleware
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import create_retriever_tool

from kvcag import HFEngine
from kvcag.chat_template import Document as Segment
from kvcag.langchain import ChatKVCAG
from kvcag.langchain.messages import to_messages
from kvcag.testing import byte_tokenizer, tiny_model

SYSTEM = "You help a librarian. Be brief."
TEXTS = [
    "The atlas of Norway was lent in May, and Carol has it. She is at sea, and it is eleven weeks late by now.",
    "Alice lent the book on bicycles to Bob. She says that he gave it back, and he says that he never had it.",
    "The shop in Harbour Street has one copy of it, at nine pounds, and keeps it for us until Saturday at noon.",
    "Two readers asked for the map of the harbour, which hangs in the hall and cannot be lent to anybody at all.",
]


class Notes(BaseRetriever):
    """Finds the first notes."""

    def _get_relevant_documents(self, query: str, **kwargs: Any) -> list[Document]:
        return [Document(text) for text in TEXTS[: int(query)]]


@pytest.fixture
def llm() -> ChatKVCAG:
    return ChatKVCAG(engine=HFEngine(tiny_model(max_position_embeddings=8192), byte_tokenizer()), max_tokens=4)


def searched() -> list[BaseMessage]:
    """A question and four searches."""
    history: list[BaseMessage] = [HumanMessage("What is late?")]
    for number, text in enumerate(TEXTS):
        call = {"name": "search", "args": {"query": f"{number}"}, "id": f"c{number}"}
        history += [AIMessage("", tool_calls=[call]), ToolMessage(text, name="search", tool_call_id=f"c{number}")]
    return history


def made(message: BaseMessage) -> dict[str, Any]:
    assert isinstance(message, AIMessage)
    assert message.usage_metadata is not None
    read = message.usage_metadata["input_tokens"] - message.usage_metadata["input_token_details"]["cache_read"]
    return {**message.response_metadata["kvcag"], "read": read}


def test_tool_results_that_a_middleware_clears_leave_the_others_caches(llm: ChatKVCAG) -> None:
    history = [*searched(), AIMessage("The atlas."), HumanMessage("And what is lost?")]
    first = made(llm.invoke([SystemMessage(SYSTEM), *history]))
    assert first["mode"] == "encoded"
    editing = ContextEditingMiddleware(edits=[ClearToolUsesEdit(trigger=0, keep=3)])
    agent = create_agent(llm, tools=[], system_prompt=SYSTEM, middleware=[editing])
    cleared = made(agent.invoke({"messages": history})["messages"][-1])
    assert cleared["mode"] == "merged"
    assert cleared["recomputed_tokens"] == 0
    assert cleared["read"] < 120 < first["read"]


def test_messages_behind_a_summary_keep_their_caches(llm: ChatKVCAG) -> None:
    history: list[BaseMessage] = [HumanMessage("What is late?"), AIMessage("The atlas.")]
    history += [kind(text) for text in TEXTS for kind in (HumanMessage, AIMessage)]
    history.append(HumanMessage("And what is lost?"))
    llm.invoke([SystemMessage(SYSTEM), *history[:-1]])
    summing = SummarizationMiddleware(llm, trigger=("messages", 8), keep=("messages", 9))
    agent = create_agent(llm, tools=[], system_prompt=SYSTEM, middleware=[summing])
    behind = made(agent.invoke({"messages": history})["messages"][-1])
    assert behind["mode"] == "merged"
    assert behind["reused_tokens"] > 8 * 100


def test_trimmed_messages_keep_their_caches(llm: ChatKVCAG) -> None:
    history = [SystemMessage(SYSTEM), *(kind(text) for text in TEXTS for kind in (HumanMessage, AIMessage))]
    history.append(HumanMessage("And what is lost?"))
    llm.invoke(history)
    kept = trim_messages(history, max_tokens=8, token_counter=len, include_system=True, start_on="human")
    assert len(kept) < len(history)
    assert made(llm.invoke(kept))["mode"] == "merged"
    exact = made(llm.invoke(kept, merge_strategy="exact"))
    assert exact["is_exact"]


def test_documents_of_a_tools_artifact_are_found_by_their_content(llm: ChatKVCAG) -> None:
    llm.precompute(TEXTS, progress=False)
    search = create_retriever_tool(Notes(), "search", "Finds notes.", response_format="content_and_artifact")
    call = {"name": "search", "args": {"query": "3"}, "id": "c1", "type": "tool_call"}
    result = search.invoke(call)
    asked = [HumanMessage("What is late?"), AIMessage("", tool_calls=[call]), result]
    shown = to_messages(asked)[-1]["content"]
    assert "".join(shown) == result.content
    assert [part + part.ending for part in shown if isinstance(part, Segment)] == [f"{text}\n\n" for text in TEXTS[:3]]
    report = made(llm.invoke(asked))
    assert report["mode"] == "merged"
    assert report["encoded_tokens"] < sum(map(len, TEXTS[:3])) / 2  # what stands before them
    exact = made(llm.invoke(asked, merge_strategy="exact"))
    assert exact["is_exact"]


def test_only_artifacts_whose_text_is_in_the_tool_result_are_documents() -> None:
    artifact = [Document("two"), Document("five"), Document(""), "three", Document("four")]
    text = "Source: a\nContent: two\n\nSource: b\nContent: three four"
    result = ToolMessage(text, artifact=artifact, tool_call_id="c1")
    [message] = to_messages([result])
    assert "".join(message["content"]) == text
    assert [part for part in message["content"] if isinstance(part, Segment)] == ["two\n\n", "four"]


def test_an_artifact_of_another_kind_is_no_document() -> None:
    [message] = to_messages([ToolMessage("3", artifact={"value": 3}, tool_call_id="c1")])
    assert message["content"] == "3"


def test_marked_blocks_of_a_tools_result_are_documents() -> None:
    block = {"type": "text", "text": "one\n", "cache_control": {"type": "ephemeral"}}
    [message] = to_messages([ToolMessage(["Found:\n", block], tool_call_id="c1")])
    assert message["content"] == ["Found:\n", Segment("one\n")]
    assert isinstance(message["content"][1], Segment)
