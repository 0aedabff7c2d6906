"""RAG and CAG in LlamaIndex, over the same index, retriever, prompts and weights, in one run.

    python benchmarks/llama_index_rag.py --data musique.json [--questions 10] [--words 120] [--top-k 4] [--model DIR]

RAG is `HuggingFaceLLM` (llama-index-llms-huggingface) with LlamaIndex's synthesizer. CAG is `KVCacheLLM` with
`CAGSynthesizer`; its documents are encoded once during ingestion. CAG answers twice: merged (`query`), and with
everything recomputed (`full`), which is a full prefill of the same ids. If `full` differs from RAG, the reason is the
white space of the prompts, not the caches. Every question goes to all of them in turn. Reported for each: exact
match and F1 against the reference answers, agreement with the others, time to first token, total time, and tokens that
went through the model. `--data` is a list of MuSiQue questions with `question`, `answers` and `ctxs[].text`
(Trivedi et al., 2022).

`HuggingFaceLLM` returns a word when the next word begins: its first text comes a token or two after its first token.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import string
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import TextNode
from llama_index.llms.huggingface import HuggingFaceLLM
from llama_index.retrievers.bm25 import BM25Retriever
from pydantic import Field

from kvcag import HFEngine
from kvcag.demo.model import embedded_model
from kvcag.llama_index import CAGSynthesizer, KVCacheLLM, KVCacheTransform

matplotlib.use("Agg")
import matplotlib.pyplot as plt

QA = PromptTemplate(
    "Passages:\n{context_str}\nAnswer the question in a few words, using only the passages.\n"
    "Question: {query_str}\nAnswer:"
)


class LastUsage(BaseEventHandler):
    """Keeps what the last answer says it took."""

    usage: dict[str, Any] = Field(default_factory=dict)
    messages: list[Any] = Field(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, LLMChatEndEvent) and event.response is not None:
            raw = event.response.raw
            self.usage = raw.get("usage", {}) if isinstance(raw, dict) else {}
            self.messages = list(event.messages)


def normal(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(answer: str, reference: str) -> float:
    said, expected = normal(answer), normal(reference)
    shared = sum((Counter(said) & Counter(expected)).values())
    return 2 * shared / (len(said) + len(expected)) if shared else float(said == expected)


def ask(engine: BaseQueryEngine, question: str) -> dict[str, Any]:
    """One streamed answer, with its times."""
    started, first, text = time.perf_counter(), 0.0, ""
    for piece in engine.query(question).response_gen:
        if piece:
            first = first or time.perf_counter() - started
            text += piece
    return {"answer": text.strip(), "ttft_s": first, "total_s": time.perf_counter() - started}


def systems(
    engine: HFEngine, nodes: list[TextNode], top_k: int, max_new_tokens: int
) -> tuple[dict[str, BaseQueryEngine], Callable[[Any], int], float]:
    """The query engines, what counts the tokens that RAG encodes, and how long encoding all documents took."""
    retriever = BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=top_k)
    rag_llm = HuggingFaceLLM(
        model=engine.model,
        tokenizer=engine.tokenizer,
        context_window=engine.context_length,
        max_new_tokens=max_new_tokens,
        is_chat_model=True,
        generate_kwargs={"do_sample": False},
    )
    rag = get_response_synthesizer(llm=rag_llm, text_qa_template=QA, streaming=True)
    made: dict[str, BaseQueryEngine] = {"rag": RetrieverQueryEngine(retriever, rag)}
    for name, strategy in (("cag", "query"), ("cag_full", "full")):
        llm = KVCacheLLM(engine=engine, max_new_tokens=max_new_tokens, merge_strategy=strategy)
        made[name] = RetrieverQueryEngine(retriever, CAGSynthesizer(llm, text_qa_template=QA, streaming=True))
    started = time.perf_counter()
    synthesizer = made["cag"]._response_synthesizer
    IngestionPipeline(transformations=[KVCacheTransform(synthesizer=synthesizer)]).run(nodes=nodes)

    def rag_tokens(messages: Any) -> int:
        return len(engine.tokenizer(rag_llm.messages_to_prompt(messages))["input_ids"])

    return made, rag_tokens, time.perf_counter() - started


def measure(engine: HFEngine, data: list[dict[str, Any]], given: argparse.Namespace) -> tuple[list[dict], float, int]:
    """A row for each question and system."""
    texts = dict.fromkeys(" ".join(c["text"].split()[: given.words]) for case in data for c in case["ctxs"])
    nodes = [TextNode(text=text, id_=str(index)) for index, text in enumerate(texts)]
    made, rag_tokens, ingestion_s = systems(engine, nodes, given.top_k, given.max_new_tokens)
    usage = LastUsage()
    get_dispatcher().add_event_handler(usage)
    rows = []
    for system in made.values():
        ask(system, data[0]["question"])  # warms up
    for index, case in enumerate(data):
        for name, system in made.items():
            row = {"question": index, "system": name, **ask(system, case["question"])}
            taken = usage.usage
            prompt = taken["prompt_tokens"] if taken else rag_tokens(usage.messages)
            row |= {"prompt_tokens": prompt, "encoded_tokens": prompt - taken.get("cached_tokens", 0)}
            row["em"] = float(any(normal(row["answer"]) == normal(answer) for answer in case["answers"]))
            row["f1"] = max(f1(row["answer"], answer) for answer in case["answers"])
            rows.append(row)
            times = f"{row['ttft_s']:6.2f} s {row['total_s']:6.2f} s"
            print(f"{index:>3} {name:>8} {times}  {row['answer']!r:.70}", flush=True)
    return rows, ingestion_s, len(nodes)


def summary(rows: list[dict], name: str) -> dict[str, float]:
    """Means of the answers' quality, medians of times and tokens."""
    mine = [row for row in rows if row["system"] == name]

    def agreement(other: str) -> dict[str, float]:
        theirs = {row["question"]: row["answer"] for row in rows if row["system"] == other}
        pairs = [(row["answer"], theirs[row["question"]]) for row in mine]
        return {
            f"same_as_{other}": round(statistics.mean(normal(left) == normal(right) for left, right in pairs), 3),
            f"f1_to_{other}": round(statistics.mean(f1(left, right) for left, right in pairs), 3),
        }

    return {
        "em": round(statistics.mean(row["em"] for row in mine), 3),
        "f1": round(statistics.mean(row["f1"] for row in mine), 3),
        **agreement("rag"),
        **agreement("cag_full"),
        **{
            key: round(statistics.median(row[key] for row in mine), 3)
            for key in ("ttft_s", "total_s", "prompt_tokens", "encoded_tokens")
        },
    }


def plot(rows: list[dict], path: Path) -> None:
    """Time to first token and tokens encoded, question by question."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, key, label in zip(
        axes, ("ttft_s", "encoded_tokens"), ("seconds to the first token", "tokens encoded"), strict=True
    ):
        for name in ("rag", "cag"):
            mine = [row for row in rows if row["system"] == name]
            axis.plot([row["question"] for row in mine], [row[key] for row in mine], "o-", label=name.upper())
        axis.set_xlabel("question")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=None)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--words", type=int, default=120)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "llama_index_rag.json")
    given = parser.parse_args()
    engine = HFEngine.from_pretrained(given.model or embedded_model(), dtype="float32")
    data = json.loads(given.data.read_text())[: given.questions]
    rows, ingestion_s, documents = measure(engine, data, given)
    result = {
        "model": Path(engine.model_name).name,
        "dtype": "float32",
        "settings": {"questions": len(data), "documents": documents, "words": given.words, "top_k": given.top_k},
        "machine": {
            "device": str(engine.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "ingestion_s": round(ingestion_s, 2),
        "systems": {name: summary(rows, name) for name in ("rag", "cag", "cag_full")},
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, given.out.with_suffix(".png"))
    print(json.dumps(result["systems"], indent=1))
    print(f"figures: {given.out}, {given.out.with_suffix('.png')}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
