from __future__ import annotations

import pytest
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
    merge_message_runs,
)

from kvcag.chat_template import Document
from kvcag.errors import InvalidInputError, UnsupportedContentError
from kvcag.langchain.documents_chain import with_documents
from kvcag.langchain.messages import to_messages


def documents(messages: list) -> list[str]:
    """The documents among the parts of neutral messages."""
    return [
        part for m in to_messages(messages) if isinstance(m["content"], list) for part in m["content"] if is_doc(part)
    ]


def is_doc(part: object) -> bool:
    return isinstance(part, Document)


def text(text: str, **more: object) -> dict:
    return {"type": "text", "text": text, **more}


def test_every_role_has_its_counterpart() -> None:
    call = {"name": "add", "args": {"a": 1}, "id": "c1", "type": "tool_call"}
    assert to_messages(
        [
            SystemMessage("s"),
            HumanMessage("h", name="ann"),
            AIMessage("a", tool_calls=[call]),
            ToolMessage("3", tool_call_id="c1", name="add"),
            FunctionMessage("3", name="add"),
            ChatMessage("c", role="critic"),
        ]
    ) == [
        {"role": "system", "content": "s"},
        {"role": "user", "name": "ann", "content": "h"},
        {
            "role": "assistant",
            "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}],
            "content": "a",
        },
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "3"},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "critic", "content": "c"},
    ]


def test_an_ai_messages_own_blocks_are_not_read_as_text() -> None:
    blocks = [
        {"type": "reasoning", "reasoning": "hm"},
        text("some text"),
        {"type": "tool_use", "id": "c1", "name": "add", "input": {}},
    ]
    assert to_messages([AIMessage(blocks)])[0]["content"] == "some text"


def test_marked_blocks_are_the_documents_and_nothing_else_is() -> None:
    marked = text("doc", cache_control={"type": "ephemeral"})
    conversation = [SystemMessage([text("be brief"), text("be kind")]), HumanMessage([marked, text("and?"), text("q")])]
    assert documents(conversation) == ["doc"]


def test_plain_text_blocks_are_documents() -> None:
    plain = {"type": "text-plain", "text": "doc", "mime_type": "text/plain"}
    assert documents([HumanMessage([plain, text("q")])]) == ["doc"]


def test_without_marks_blocks_of_a_system_message_are_documents_and_those_of_a_human_message_are_not() -> None:
    """Regression: a password in the first of two blocks was stored."""
    conversation = [
        SystemMessage([text("a"), "b"]),
        HumanMessage([text("c"), text("d")]),
        AIMessage([text("x"), text("y")]),
        HumanMessage([text("e"), text("question")]),
    ]
    assert documents(conversation) == ["a", "b"]


def test_a_message_of_one_block_is_no_document() -> None:
    assert to_messages([HumanMessage([text("hello")])]) == [{"role": "user", "content": "hello"}]


def test_documents_that_the_chain_put_there_are_found_by_its_note() -> None:
    message = with_documents(SystemMessage(""), "head ", ["one ", "two "], "tail")
    assert [(str(part), is_doc(part)) for part in to_messages([message])[0]["content"]] == [
        ("head ", False),
        ("one ", True),
        ("two ", True),
        ("tail", False),
    ]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image", "base64": "AAAA", "mime_type": "image/png"},
        {"type": "audio", "base64": "AAAA", "mime_type": "audio/wav"},
        {"type": "file", "base64": "AAAA", "mime_type": "application/pdf"},
    ],
    ids=lambda block: block["type"],
)
def test_blocks_that_are_not_text_are_refused_by_type(block: dict) -> None:
    with pytest.raises(
        UnsupportedContentError, match=rf"human message contains a block of type '{block['type']}'.*Pass"
    ):
        to_messages([HumanMessage([text("look"), block])])


def test_a_message_that_is_no_part_of_a_conversation_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="RemoveMessage cannot be part of a conversation"):
        to_messages([RemoveMessage(id="1")])


def test_a_message_whose_documents_were_trimmed_is_read_as_it_is() -> None:
    message = with_documents(SystemMessage(""), "Use:\n\n", ["one\n\n", "two"], ending="\n\n")
    message.content = message.content[:2]
    assert documents([message]) == ["one\n\n"]
    message.content = message.content[:1]
    assert to_messages([message]) == [{"role": "system", "content": "Use:\n\n"}]


def test_documents_stay_documents_where_runs_of_messages_are_merged() -> None:
    """Regression: documents were noted by index, so a question was stored and documents were read as text."""
    one = with_documents(SystemMessage(""), "Use:\n", ["one\n\n", "two"], ending="\n\n")
    other = with_documents(SystemMessage(""), "And:\n", ["three\n\n", "four"], "\nQ", ending="\n\n")
    brief = SystemMessage("Be brief.")
    for run, expected in (
        ([one, other], ["one\n\n", "two", "three\n\n", "four"]),
        ([brief, one], ["one\n\n", "two"]),
        ([one, brief], ["one\n\n", "two"]),
    ):
        merged = merge_message_runs(run)
        assert documents(merged) == expected
        endings = [part.ending for part in to_messages(merged)[0]["content"] if is_doc(part)]
        assert endings == ["", "\n\n"] * (len(expected) // 2)
    asked = merge_message_runs([HumanMessage("my password"), with_documents(HumanMessage(""), "x", ["y"], "z")])
    assert documents(asked) == ["y"]
    marked = HumanMessage([text("doc", cache_control={"type": "ephemeral"})])
    assert documents(merge_message_runs([HumanMessage("q"), marked, HumanMessage("my password")])) == ["doc"]
