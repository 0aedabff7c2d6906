"""LangChain's and LlamaIndex's wrappers of a Hugging Face model, which read the whole prompt each time."""

from __future__ import annotations

import time
from collections.abc import Sequence

import transformers
from geometry import HEAD
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from llama_index.core.llms import ChatMessage
from llama_index.llms.huggingface import HuggingFaceLLM

from kvcag import HFEngine
from peers.base import TOKENS, Answer, timed


class LangChain:
    """`ChatHuggingFace` over a `HuggingFacePipeline`, streamed."""

    name = "ChatHuggingFace"

    def __init__(self, engine: HFEngine) -> None:
        pipeline = transformers.pipeline(
            "text-generation",
            model=engine.model,
            tokenizer=engine.tokenizer,
            max_new_tokens=TOKENS,
            do_sample=False,
            return_full_text=False,
        )
        llm = HuggingFacePipeline(pipeline=pipeline, model_id=engine.model_name)
        self.chat = ChatHuggingFace(llm=llm, tokenizer=engine.tokenizer)

    def prepare(self, documents: Sequence[str]) -> None:
        self.system = f"{HEAD}\n\n" + "".join(documents)

    def ask(self, question: str) -> Answer:
        started = time.perf_counter()
        messages: list[BaseMessage] = [SystemMessage(self.system), HumanMessage(question)]
        return timed((str(chunk.content) for chunk in self.chat.stream(messages)), started)

    @property
    def bytes_held(self) -> int:
        return 0


class LlamaIndex:
    """`HuggingFaceLLM.stream_chat`."""

    name = "llama-index HuggingFaceLLM"

    def __init__(self, engine: HFEngine) -> None:
        self.llm = HuggingFaceLLM(
            model=engine.model,
            tokenizer=engine.tokenizer,
            context_window=engine.context_length,
            max_new_tokens=TOKENS,
            is_chat_model=True,
            generate_kwargs={"do_sample": False},
        )

    def prepare(self, documents: Sequence[str]) -> None:
        self.system = f"{HEAD}\n\n" + "".join(documents)

    def ask(self, question: str) -> Answer:
        started = time.perf_counter()
        messages = [ChatMessage(role="system", content=self.system), ChatMessage(role="user", content=question)]
        return timed((response.delta or "" for response in self.llm.stream_chat(messages)), started)

    @property
    def bytes_held(self) -> int:
        return 0
