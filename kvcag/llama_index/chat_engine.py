"""LlamaIndex's two chat engines that answer from retrieved nodes, with cached documents."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.response_synthesizers import CompactAndRefine

from kvcag.llama_index.synthesizer import CAGSynthesizer


class CAGContextChatEngine(ContextChatEngine):
    """`ContextChatEngine` with cached documents. The arguments are the same; the llm is a `KVCacheLLM`."""

    def _get_response_synthesizer(  # type: ignore[override]  # core declares its own class
        self, chat_history: list[ChatMessage], streaming: bool = False
    ) -> CAGSynthesizer:
        return _cached(super()._get_response_synthesizer(chat_history, streaming))


class CAGCondensePlusContextChatEngine(CondensePlusContextChatEngine):
    """`CondensePlusContextChatEngine` with cached documents. The arguments are the same; the llm is a `KVCacheLLM`."""

    def _get_response_synthesizer(  # type: ignore[override]  # core declares its own class
        self, chat_history: list[ChatMessage], streaming: bool = False
    ) -> CAGSynthesizer:
        return _cached(super()._get_response_synthesizer(chat_history, streaming))


def _cached(plain: CompactAndRefine) -> CAGSynthesizer:
    """A `CAGSynthesizer` with the prompts and settings of LlamaIndex's synthesizer."""
    prompts: dict[str, Any] = plain.get_prompts()
    return CAGSynthesizer(
        plain._llm,
        text_qa_template=prompts["text_qa_template"],
        refine_template=prompts["refine_template"],
        streaming=plain._streaming,
        callback_manager=plain.callback_manager,
    )
