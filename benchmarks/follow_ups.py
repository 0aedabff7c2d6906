"""Measures turns of a chat and steps of an agent over documents, with and without caches of documents.

    PYTHONPATH=. python benchmarks/follow_ups.py --data FILE [--turns 5] [--repeat 5] [--out FILE]

FILE is MuSiQue (`ctxs[].text`, `question`). SmolLM2 in fp32, one run, medians over the repeats; a fresh engine for each
chat. Documents are about 250 tokens long, and six of them stand before the history.

- LangChain: `create_cag_documents_chain` beside LangChain's own stuff chain over the same model.
- LlamaIndex: `CAGContextChatEngine` beside `ContextChatEngine`, and a `SimpleChatEngine` whose memory has a
  `CAGMemoryBlock` beside one with a `StaticMemoryBlock`, over the same model.
- Agent: `KVCAGMiddleware` with a retriever, which finds the same documents in each step, beside an agent whose system
  message shows them as text. Each step calls a tool, forced by a grammar, whose result has about 60 tokens.
- KL: nats per token between the next answer over the reused merged context and over a full prefill of the same tokens,
  turn by turn.
- Ten questions over the same documents, each a chat of its own: seconds to the first token, beside `exact`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from fidelity import full_prefill, over_cache
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelCallLimitMiddleware
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.retrievers import BaseRetriever as LangChainRetriever
from langchain_core.tools import tool
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.chat_engine import ContextChatEngine, SimpleChatEngine
from llama_index.core.memory import Memory, StaticMemoryBlock
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import cache_of, concat
from kvcag.demo.model import embedded_model
from kvcag.langchain import ChatKVCAG, KVCAGMiddleware, create_cag_documents_chain
from kvcag.llama_index import CAGContextChatEngine, CAGMemoryBlock, KVCacheLLM
from kvcag.memory import insert_documents

INSTRUCTION = "Answer the question using only the passages below."
PROMPT = ChatPromptTemplate.from_messages(
    [("system", INSTRUCTION + "\n\n{context}"), MessagesPlaceholder("history"), ("human", "{input}")]
)
TOKENS = 16
QUESTIONS = 10


class Fixed(BaseRetriever):
    """Retrieves the same nodes for every question."""

    def __init__(self, texts: list[str]) -> None:
        self._nodes = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in texts]
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._nodes


Ask = Callable[[str], object]


def chain(create: Any) -> Callable[[HFEngine, list[str], str], Ask]:
    """A chat over one of LangChain's chains."""

    def opened(engine: HFEngine, texts: list[str], namespace: str) -> Ask:
        runnable = create(ChatKVCAG(engine=engine, max_tokens=TOKENS, namespace=namespace), PROMPT)
        documents = [Document(text) for text in texts]
        history: list[BaseMessage] = []

        def ask(question: str) -> None:
            answer = runnable.invoke({"context": documents, "history": history, "input": question})
            history.extend([HumanMessage(question), AIMessage(answer)])

        return ask

    return opened


def context_engine(engine_class: Any) -> Callable[[HFEngine, list[str], str], Ask]:
    """One of LlamaIndex's chat engines over a retriever."""

    def opened(engine: HFEngine, texts: list[str], namespace: str) -> Ask:
        llm = KVCacheLLM(engine=engine, max_new_tokens=TOKENS, namespace=namespace)
        return engine_class.from_defaults(retriever=Fixed(texts), llm=llm, system_prompt=INSTRUCTION).chat  # type: ignore[no-any-return]

    return opened


def block_engine(block: Callable[[list[str]], Any]) -> Callable[[HFEngine, list[str], str], Ask]:
    """LlamaIndex's simple chat engine, whose memory has a block of documents."""

    def opened(engine: HFEngine, texts: list[str], namespace: str) -> Ask:
        llm = KVCacheLLM(engine=engine, max_new_tokens=TOKENS, namespace=namespace)
        memory = Memory.from_defaults(memory_blocks=[block(texts)], token_limit=30_000)
        return SimpleChatEngine.from_defaults(llm=llm, memory=memory).chat

    return opened


def static_block(texts: list[str]) -> StaticMemoryBlock:
    return StaticMemoryBlock(static_content="\n\n".join([INSTRUCTION, *texts]))


PAIRS: dict[str, dict[str, Callable[[HFEngine, list[str], str], Ask]]] = {
    "LangChain": {
        "documents chain": chain(create_cag_documents_chain),
        "stuff chain": chain(create_stuff_documents_chain),
    },
    "LlamaIndex": {
        "CAGContextChatEngine": context_engine(CAGContextChatEngine),
        "ContextChatEngine": context_engine(ContextChatEngine),
    },
    "LlamaIndex memory": {
        "CAGMemoryBlock": block_engine(lambda texts: CAGMemoryBlock(documents=texts, instruction=INSTRUCTION)),
        "StaticMemoryBlock": block_engine(static_block),
    },
}


class Found(LangChainRetriever):
    """Finds the same documents for every question."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, **kwargs: Any) -> list[Document]:
        return self.documents


class TimedCalls(AgentMiddleware):
    """Has a tool called in each step, and times the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        began = time.perf_counter()
        response = handler(request.override(tool_choice="any"))
        self.seconds.append(time.perf_counter() - began)
        return response


@tool
def look(shelf: Literal["upper", "lower"]) -> str:
    """Look at a shelf of the archive."""
    return f"On the {shelf} shelf there are eleven boxes of letters, sorted by year. " * 4


AGENTS = ("retriever middleware", "documents as text")


def steps_of(engine: HFEngine, name: str, texts: list[str], namespace: str, question: str, steps: int) -> list[float]:
    """Seconds of each step of an agent."""
    llm = ChatKVCAG(engine=engine, max_tokens=64, namespace=namespace)
    timed, system = TimedCalls(), INSTRUCTION
    middleware: list[Any] = [timed, ModelCallLimitMiddleware(run_limit=steps, exit_behavior="end")]
    if name == AGENTS[0]:
        middleware.append(KVCAGMiddleware(retriever=Found(documents=[Document(text) for text in texts])))
    else:
        system = "\n\n".join([INSTRUCTION, *texts])
    agent = create_agent(llm, [look], system_prompt=system, middleware=middleware)
    agent.invoke({"messages": [HumanMessage(question)]}, {"recursion_limit": 100})
    return timed.seconds


def texts_of(data: list[dict[str, Any]], start: int) -> list[str]:
    """Six passages of about 250 tokens."""
    texts = [context["text"] for row in data for context in row["ctxs"]]
    return [" ".join(" ".join(texts[i : i + 3]).split()[:185]) for i in range(start, start + 18, 3)]


def seconds_of(ask: Ask, questions: list[str]) -> list[float]:
    """Seconds of each turn."""
    turns = []
    for question in questions:
        began = time.perf_counter()
        ask(question)
        turns.append(time.perf_counter() - began)
    return turns


def drifts(engine: HFEngine, texts: list[str], questions: list[str]) -> Iterator[float]:
    """The KL of each turn of a chat over documents that are merged for its first question."""
    memory = KVCacheMemory(engine, namespace="kl")
    history: list[dict[str, str]] = []
    for question in questions:
        history.append({"role": "user", "content": question})
        prompt = engine.template.prompt(insert_documents(INSTRUCTION, [f"{text}\n\n" for text in texts], history))
        answer = "".join(chunk.text for chunk in memory.stream(prompt, max_new_tokens=TOKENS))
        known, pieces = engine.prefixes.match(prompt.context_ids, "kl", merged=True)
        assert known == len(prompt.context_ids)
        _, tokens, expected = full_prefill(engine.model, torch.tensor(prompt.token_ids))
        found = over_cache(engine.model, cache_of(concat(pieces)), torch.tensor(prompt.tail_ids), tokens)
        yield (expected.exp() * (expected - found)).sum(-1).mean().item()
        history.append({"role": "assistant", "content": answer})


def first_tokens(engine: HFEngine, texts: list[str], questions: list[str], strategy: str) -> list[float]:
    """Seconds to the first token of questions over the same documents, each a conversation of its own."""
    memory = KVCacheMemory(engine, instruction=INSTRUCTION, namespace=strategy)
    ids = memory.add(texts)
    seconds = []
    for question in questions:
        began = time.perf_counter()
        stream = memory.stream(question, ids, strategy=strategy, max_new_tokens=TOKENS)
        next(stream)
        seconds.append(time.perf_counter() - began)
        for _ in stream:
            pass
        time.sleep(0.2)  # someone reads the answer
    return seconds


def medians(rows: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    data = json.loads(given.data.read_text(encoding="utf-8"))
    engine = HFEngine.from_pretrained(embedded_model(), dtype="float32", device="cpu")
    turns: dict[str, list[list[float]]] = {name: [] for pair in [*PAIRS.values(), AGENTS] for name in pair}
    kl: list[list[float]] = []
    many: dict[str, list[list[float]]] = {"auto": [], "exact": []}
    for repeat in range(given.repeat):
        texts = texts_of(data, 18 * repeat)
        questions = [row["question"] for row in data[repeat * given.turns :]]
        for pair in PAIRS.values():
            for name, opened in pair.items():  # in turn, so that all see the same machine
                engine.prefixes.clear()
                turns[name].append(seconds_of(opened(engine, texts, f"{name} {repeat}"), questions[: given.turns]))
        for name in AGENTS:
            engine.prefixes.clear()
            turns[name].append(steps_of(engine, name, texts, f"{name} {repeat}", questions[0], given.turns))
        for strategy, rows in many.items():
            engine.prefixes.clear()
            rows.append(first_tokens(engine, texts, questions[:QUESTIONS], strategy))
        engine.prefixes.clear()
        engine.forget("kl")
        kl.append(list(drifts(engine, texts, questions[: given.turns])))
    figures: dict[str, Any] = {"repeat": given.repeat, "turns": {name: medians(rows) for name, rows in turns.items()}}
    for title, pair in {**PAIRS, "agent": AGENTS}.items():
        for name in pair:
            print(f"{name:22}", *(f"{seconds:.2f} s" for seconds in figures["turns"][name]), sep="  ")
        ours, plain = (statistics.median(figures["turns"][name][1:]) for name in pair)
        figures[title] = ours / plain
        print(f"{title}, turns 2 and on: {ours / plain:.2f} times as long")
    figures["kl"] = [statistics.mean(column) for column in zip(*kl, strict=True)]
    print("KL by turn", *(f"{value:.4f}" for value in figures["kl"]), sep="  ")
    figures["ten questions"] = {strategy: medians(rows) for strategy, rows in many.items()}
    for strategy, seconds in figures["ten questions"].items():
        print(f"first token, {strategy:5}", *(f"{value:.2f} s" for value in seconds), sep="  ")
    auto, exact = (statistics.median(figures["ten questions"][name][2:]) for name in ("auto", "exact"))
    figures["third question and on"] = auto / exact
    print(f"from the third question on: {auto / exact:.2f} times exact's")
    if given.out:
        given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
