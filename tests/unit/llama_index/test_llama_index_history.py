"""Histories that LlamaIndex's memories cut, and documents in tool results."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import TextNode
from llama_index.retrievers.bm25 import BM25Retriever

from kvcag import HFEngine
from kvcag.chat_template import Document
from kvcag.llama_index import CAGRetrieverTool, KVCacheLLM
from kvcag.llama_index.messages import to_messages
from kvcag.testing import byte_tokenizer, tiny_model

TEXTS = [
    "The atlas of Norway was lent in May, and Carol has it. She is at sea, and it is eleven weeks late by now.",
    "Alice lent the book on bicycles to Bob. She says that he gave it back, and he says that he never had it.",
    "The shop in Harbour Street has one copy of it, at nine pounds, and keeps it for us until Saturday at noon.",
]


@pytest.fixture
def llm() -> KVCacheLLM:
    return KVCacheLLM(engine=HFEngine(tiny_model(), byte_tokenizer()), max_new_tokens=4)


def usage(response: ChatResponse) -> dict[str, Any]:
    assert isinstance(response.raw, dict)
    found: dict[str, Any] = response.raw["usage"]
    return found


def test_a_memory_buffer_that_drops_the_oldest_messages_keeps_the_others_caches(llm: KVCacheLLM) -> None:
    history = [ChatMessage(role=role, content=text) for text in TEXTS * 2 for role in ("user", "assistant")]
    question = ChatMessage(content="What is late?")
    llm.chat([*history, question])
    buffer = ChatMemoryBuffer.from_defaults(chat_history=history, token_limit=900, tokenizer_fn=list)
    kept = buffer.get()
    assert len(kept) < len(history)
    report = usage(llm.chat([*kept, question]))
    assert report["context"]["mode"] == "merged"
    assert report["prompt_tokens"] - report["cached_tokens"] < 120


@pytest.mark.parametrize("found", ["call", "acall"])
async def test_documents_of_a_tool_are_found_by_their_content(llm: KVCacheLLM, found: str) -> None:
    retriever = BM25Retriever.from_defaults(nodes=[TextNode(text=text) for text in TEXTS], similarity_top_k=2)
    tool = CAGRetrieverTool.from_defaults(retriever, description="Finds notes.")
    output = tool.call("atlas of Norway") if found == "call" else await tool.acall("atlas of Norway")
    result = ChatMessage(role=MessageRole.TOOL, blocks=output.blocks, additional_kwargs={"tool_call_id": "c1"})
    [message] = to_messages([result])
    documents = [part for part in message["content"] if isinstance(part, Document)]
    assert len(documents) == 2
    assert documents[0] == f"{TEXTS[0]}\n\n"
    asked = [ChatMessage(content="What is late?"), ChatMessage(role="assistant", content="search"), result]
    llm.memory.add(TEXTS)
    report = usage(llm.chat(asked))["context"]
    assert report["mode"] == "merged"
    assert report["encoded_tokens"] < len(TEXTS[0])


def test_a_tool_that_retrieves_nothing_says_nothing() -> None:
    class Nothing(BaseRetriever):
        def _retrieve(self, query_bundle: Any) -> list[Any]:
            return []

    tool = CAGRetrieverTool.from_defaults(Nothing(), description="Finds nothing.")
    assert tool.call("atlas").blocks == []
