"""A 10-question session over 2,000 tokens of documents in LangChain: `ChatHuggingFace` beside `ChatKVCAG`, in one run.

    python benchmarks/langchain_rag.py [--tokens 24] [--out benchmarks/results]

Every system is the same `create_retrieval_chain` over the same BM25 retriever, prompt, questions, weights (fp32, one
copy in memory) and token budget; greedy. Each question goes to every system before the next question, so that other
load on the machine affects all in the same way. The script checks that retrieval is identical. The systems:

- rag: `ChatHuggingFace` over a pipeline, and `create_stuff_documents_chain`;
- swap: `ChatKVCAG` in its place, nothing else changed: exact prefixes;
- cag: `ChatKVCAG` and `create_cag_documents_chain`: documents cached one by one, merged, a fifth recomputed;
- corpus: `ChatKVCAG` bound to a context of all documents, in one order: nothing is read again.

The retriever returns all twelve documents, best first, so that each system answers from the same text. TTFT is from
the call to the first piece of the answer. The floor is the bare model's forward pass over only the question, with a
cache that is ready.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline

from kvcag import ContextCache, HFEngine
from kvcag.cache.layers import cache_argument, generation_cache, layers_of
from kvcag.demo.corpus import python_topics
from kvcag.demo.model import embedded_model
from kvcag.langchain import ChatKVCAG, create_cag_documents_chain
from kvcag.stores.memory import MemoryStore

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.retrievers import BM25

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INSTRUCTION = "Answer the question using only these passages."
PROMPT = ChatPromptTemplate.from_messages([("system", f"{INSTRUCTION}\n\n{{context}}"), ("human", "{input}")])
QUESTIONS = [
    "What happens when 0.0 is raised to a negative power?",
    "What exception is raised if the name is unbound?",
    "What does an imaginary literal yield?",
    'What is the "while" statement used for?',
    'What does the "break" statement do to the nearest enclosing loop?',
    'When is the "pass" statement useful?',
    'What does "continue" do in a loop with a "finally" clause?',
    'What does "return" leave?',
    "What does an empty list display yield?",
    "What does deletion of a target list do?",
]


def systems(engine: HFEngine, documents: list[Document], tokens: int) -> dict[str, Runnable]:
    """The chains, by name; each takes `{"input": question}` and gives `context` and `answer`."""
    retriever = BM25(documents=documents, k=len(documents))
    pipeline = transformers.pipeline(
        "text-generation",
        model=engine.model,
        tokenizer=engine.tokenizer,
        max_new_tokens=tokens,
        do_sample=False,
        return_full_text=False,
    )
    hugging_face = ChatHuggingFace(
        llm=HuggingFacePipeline(pipeline=pipeline, model_id=engine.model_name), tokenizer=engine.tokenizer
    )

    def kvcag(name: str) -> ChatKVCAG:
        """One that shares the weights with the others, and nothing that was encoded."""
        return ChatKVCAG(engine=engine, max_tokens=tokens, namespace=name, store=MemoryStore())

    def over_corpus() -> Runnable:
        llm = kvcag("corpus")
        bound = llm.bind(cached_content=llm.create_context(documents, INSTRUCTION))
        return RunnableLambda(lambda state: state["input"]) | bound | StrOutputParser()

    return {
        "rag": create_retrieval_chain(retriever, create_stuff_documents_chain(hugging_face, PROMPT)),
        "swap": create_retrieval_chain(retriever, create_stuff_documents_chain(kvcag("swap"), PROMPT)),
        "cag": create_retrieval_chain(retriever, create_cag_documents_chain(kvcag("cag"), PROMPT)),
        "corpus": create_retrieval_chain(retriever, over_corpus()),
    }


def ask(chain: Runnable, question: str) -> dict[str, Any]:
    """One question, streamed: seconds to the first piece and to the end, what was retrieved, and the answer."""
    started, first, context, answer = time.perf_counter(), 0.0, [], ""
    for part in chain.stream({"input": question}):
        context = part.get("context", context)
        if part.get("answer"):
            first = first or time.perf_counter() - started
            answer += part["answer"]
    total = time.perf_counter() - started
    titles = [document.metadata["title"] for document in context]
    return {"ttft_s": first, "total_s": total, "retrieved": titles, "answer": " ".join(answer.split())}


@torch.no_grad()
def floor(engine: HFEngine, cache: ContextCache, question: str) -> float:
    """Seconds of the bare model over a question, behind a cache of the documents."""
    tail = torch.tensor([engine.build_prompt(question, cache).tail_ids], device=engine.device)
    own = generation_cache([layers_of(cache)], room=tail.shape[1])
    return timed(lambda: engine.model(input_ids=tail, **cache_argument(engine.model, own)))


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(engine: HFEngine, tokens: int) -> dict[str, Any]:
    documents = [Document(topic.text, metadata={"title": topic.title}) for topic in python_topics()]
    cache = engine.build_kv_cache("\n\n".join(document.page_content for document in documents))
    floors: list[float] = []
    started = time.perf_counter()
    chains = systems(engine, documents, tokens)
    made = dict.fromkeys(chains, 0.0) | {"corpus": time.perf_counter() - started}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chains}
    for question in QUESTIONS:
        for name, chain in chains.items():
            runs[name].append(ask(chain, question))
        floors.append(floor(engine, cache, question))
        print(question, *(f"{name} {runs[name][-1]['ttft_s']:.2f}" for name in runs), flush=True)
    same = all(len({tuple(runs[name][i]["retrieved"]) for name in runs}) == 1 for i in range(len(QUESTIONS)))
    assert same, "the systems retrieved different documents"
    return {
        "model": Path(engine.model_name).name,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "document_tokens": sum(len(engine.template.encode(document.page_content)) for document in documents),
        "answer_tokens": tokens,
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "identical_retrieval": same,
        "floor_ttft_s": statistics.median(floors),
        "summary": {name: summary(run, made[name], runs["rag"]) for name, run in runs.items()},
        "questions": [
            {"question": question, "floor_s": floors[i], **{name: runs[name][i] for name in runs}}
            for i, question in enumerate(QUESTIONS)
        ],
    }


def summary(run: list[dict[str, Any]], prepared: float, rag: list[dict[str, Any]]) -> dict[str, float]:
    """Sums and medians; `later` leaves the first question out, before which nothing was cached."""
    later = statistics.median(one["ttft_s"] for one in run[1:])
    return {
        "prepared_s": prepared,
        "session_s": prepared + sum(one["total_s"] for one in run),
        "first_ttft_s": run[0]["ttft_s"],
        "later_ttft_s": later,
        "later_ttft_speedup": statistics.median(one["ttft_s"] for one in rag[1:]) / later,
        "same_answer_as_rag": sum(a["answer"] == b["answer"] for a, b in zip(run, rag, strict=True)),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    labels = {
        "rag": "ChatHuggingFace, stuff chain",
        "swap": "ChatKVCAG, stuff chain",
        "cag": "ChatKVCAG, documents chain (merged, 20% recomputed)",
        "corpus": "ChatKVCAG, whole corpus by handle (exact)",
    }
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    numbers = range(1, len(result["questions"]) + 1)
    for name, label in labels.items():
        axes.plot(numbers, [question[name]["ttft_s"] for question in result["questions"]], marker="o", label=label)
    floors = [question["floor_s"] for question in result["questions"]]
    axes.plot(numbers, floors, color="grey", linestyle="--", label="floor: the bare model over the question")
    axes.set(xlabel="question", ylabel="time to first token, s", yscale="log", xticks=list(numbers))
    axes.set_title(f"{result['document_tokens']:,} tokens of documents, {result['model']}, {result['dtype']}, CPU")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each answer, at most")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    result = measure(HFEngine.from_pretrained(embedded_model(), dtype="float32"), given.tokens)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "langchain_rag.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    plot(result, given.out / "langchain_rag.png")
    print(json.dumps({"floor_ttft_s": result["floor_ttft_s"], **result["summary"]}, indent=1))


if __name__ == "__main__":
    main()
