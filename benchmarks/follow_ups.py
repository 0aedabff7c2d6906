"""What the turns of a chat over retrieved documents take, beside the same chain without caches of documents.

    python benchmarks/follow_ups.py --data FILE [--turns 5] [--repeat 5] [--out benchmarks/results/follow_ups.json]

Six documents of about 250 tokens stand in the system message, the history follows, and each turn asks a new question.
`documents chain` is `create_cag_documents_chain`, whose documents are merged once and reused by the following turns.
`stuff chain` is LangChain's own over the same model, which reuses exact prefixes. FILE is MuSiQue (`ctxs[].text`,
`question`). SmolLM2 in fp32, one run, medians over the repeats; a fresh engine for each chat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.output_parsers import BaseOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder

from kvcag import HFEngine
from kvcag.demo.model import embedded_model
from kvcag.langchain import ChatKVCAG, create_cag_documents_chain

PROMPT = ChatPromptTemplate.from_messages(
    [
        ("system", "Answer the question using only the passages below.\n\n{context}"),
        MessagesPlaceholder("history"),
        ("human", "{input}"),
    ]
)
CHAINS = {"documents chain": create_cag_documents_chain, "stuff chain": create_stuff_documents_chain}
TOKENS = 16


class Whole(BaseOutputParser[BaseMessage]):
    """The message as it is, with its report."""

    def parse(self, text: str) -> BaseMessage:
        return AIMessage(text)

    def parse_result(self, result: Any, *, partial: bool = False) -> BaseMessage:
        return result[0].message


def documents_of(data: list[dict[str, Any]], start: int) -> list[Document]:
    """Six passages of about 250 tokens."""
    texts = [context["text"] for row in data for context in row["ctxs"]]
    return [Document(" ".join(" ".join(texts[i : i + 3]).split()[:185])) for i in range(start, start + 18, 3)]


def chat(engine: HFEngine, chain: str, documents: list[Document], questions: list[str]) -> list[dict[str, Any]]:
    """Seconds and report of each turn."""
    engine.prefixes.clear()
    llm = ChatKVCAG(engine=engine, max_tokens=TOKENS, namespace=f"{chain}-{time.perf_counter()}")
    runnable = CHAINS[chain](llm, PROMPT, output_parser=Whole())
    turns: list[dict[str, Any]] = []
    history: list[BaseMessage] = []
    for question in questions:
        began = time.perf_counter()
        answer = runnable.invoke({"context": documents, "history": history, "input": question})
        report = answer.response_metadata["kvcag"]
        turns.append({"seconds": time.perf_counter() - began, "ttft_s": report["ttft_s"], "mode": report["mode"]})
        history += [HumanMessage(question), AIMessage(answer.text)]
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    data = json.loads(given.data.read_text(encoding="utf-8"))
    engine = HFEngine.from_pretrained(embedded_model(), dtype="float32", device="cpu")
    rows: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in CHAINS}
    for repeat in range(given.repeat):
        questions = [row["question"] for row in data[repeat * given.turns : (repeat + 1) * given.turns]]
        for name in CHAINS:  # in turn, so that both see the same machine
            rows[name].append(chat(engine, name, documents_of(data, 18 * repeat), questions))
    figures = {
        name: [
            {
                "seconds": statistics.median(chat[turn]["seconds"] for chat in chats),
                "ttft_s": statistics.median(chat[turn]["ttft_s"] for chat in chats),
                "modes": sorted({chat[turn]["mode"] for chat in chats}),
            }
            for turn in range(given.turns)
        ]
        for name, chats in rows.items()
    }
    for name, turns in figures.items():
        print(name, *(f"{turn['seconds']:.2f} s ({'/'.join(turn['modes'])})" for turn in turns), sep="  ")
    later = {name: statistics.median(turn["seconds"] for turn in turns[1:]) for name, turns in figures.items()}
    print(f"turns 2 and on: {later['documents chain'] / later['stuff chain']:.2f} times the stuff chain's")
    if given.out:
        given.out.write_text(json.dumps({"repeat": given.repeat, **figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
