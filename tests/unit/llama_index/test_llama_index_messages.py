"""Conversion of ChatMessages: roles, tool calls and cache points."""

import pytest
from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    ChatMessage,
    CitableBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from kvcag.chat_template import Document
from kvcag.errors import UnsupportedContentError
from kvcag.llama_index import DOCUMENT_END, KVCacheLLM, document_blocks
from kvcag.llama_index.messages import to_messages
from kvcag.testing import EchoEngine

POINT = CachePoint(cache_control=CacheControl(type="ephemeral"))


def content(*blocks: object) -> object:
    return to_messages([ChatMessage(blocks=list(blocks))])[0]["content"]


def joined(*blocks: object) -> str:
    found = content(*blocks)
    return found if isinstance(found, str) else "".join(found)


def documents(*blocks: object) -> list[str]:
    return [part for part in content(*blocks) if isinstance(part, Document)]


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        (MessageRole.SYSTEM, "system"),
        (MessageRole.DEVELOPER, "system"),
        (MessageRole.USER, "user"),
        (MessageRole.ASSISTANT, "assistant"),
        (MessageRole.CHATBOT, "assistant"),
        (MessageRole.MODEL, "assistant"),
        (MessageRole.TOOL, "tool"),
        (MessageRole.FUNCTION, "tool"),
    ],
)
def test_every_role_has_a_neutral_name(role: MessageRole, expected: str) -> None:
    assert to_messages([ChatMessage(role=role, content="x")]) == [{"role": expected, "content": "x"}]


def test_text_blocks_are_joined_as_core_joins_them() -> None:
    message = ChatMessage(blocks=[TextBlock(text="a"), TextBlock(text="b")])
    assert to_messages([message])[0]["content"] == message.content == "a\nb"


def test_a_cache_point_closes_one_segment_and_changes_no_text() -> None:
    blocks = [TextBlock(text="a"), TextBlock(text="b"), POINT, TextBlock(text="c")]
    assert documents(*blocks) == ["a\nb\n"]
    assert joined(*blocks) == ChatMessage(blocks=blocks).content == "a\nb\nc"


def test_the_last_of_several_cache_points_counts() -> None:
    assert documents(TextBlock(text="a"), POINT, TextBlock(text="b"), POINT, TextBlock(text="c")) == ["a\nb\n"]


def test_a_cache_point_at_the_start_closes_nothing() -> None:
    assert content(POINT, TextBlock(text="a")) == "a"


def test_each_document_is_a_segment_whatever_stands_around_it() -> None:
    blocks = document_blocks(["one", "two"])
    first = documents(TextBlock(text="Read:"), *blocks, TextBlock(text="Which?"))
    assert first == documents(*blocks) == ["one\n\n", "two\n\n"]
    assert joined(TextBlock(text="Read:"), *blocks, TextBlock(text="Which?")) == "Read:\none\n\ntwo\n\nWhich?"


def test_cache_points_survive_json() -> None:
    message = ChatMessage(blocks=[*document_blocks(["one"]), TextBlock(text="?")])
    again = ChatMessage.model_validate_json(message.model_dump_json())
    assert to_messages([again]) == to_messages([message])
    assert DOCUMENT_END in again.blocks


def test_tool_calls_and_results_keep_their_names() -> None:
    call = ToolCallBlock(tool_call_id="7", tool_name="add", tool_kwargs={"a": 1})
    asked = ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm"), call])
    told = ChatMessage(role="tool", content="2", additional_kwargs={"tool_call_id": "7", "name": "add", "other": 1})
    assert to_messages([asked, told]) == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "7", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "7", "name": "add"},
    ]


def test_citable_blocks_are_read() -> None:
    assert content(CitableBlock(title="t", source="s", content=[TextBlock(text="a"), TextBlock(text="b")])) == "a\nb"


def test_an_image_is_refused_by_name() -> None:
    llm = KVCacheLLM(engine=EchoEngine())
    message = ChatMessage(blocks=[TextBlock(text="Look:"), ImageBlock(url="https://example.org/a.png")])
    with pytest.raises(UnsupportedContentError, match="image"):
        llm.chat([message])
