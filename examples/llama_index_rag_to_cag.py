"""From RAG to CAG in LlamaIndex: the same query engine before and after, on a local model.

    python examples/llama_index_rag_to_cag.py

Lines marked with `# <-` differ: the model, and one argument. Retriever and the other code stay.
Needs `pip install "kvcag[llama-index,demo]" llama-index-llms-huggingface llama-index-retrievers-bm25`.
"""

from __future__ import annotations

import sys
import time
import warnings

from llama_index.core import Document
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import StreamingResponse
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.retrievers.bm25 import BM25Retriever

from kvcag.demo.corpus import python_topics
from kvcag.demo.model import embedded_model
from kvcag.llama_index import CAGSynthesizer, KVCacheLLM, KVCacheTransform

DOCUMENTS = [Document(text=topic.text, doc_id=topic.title) for topic in python_topics()]
QUESTIONS = [
    "What happens when 0.0 is raised to a negative power?",
    'What is the "while" statement used for?',
    "What exception is raised if the name is unbound?",
]


def before(model: str, max_tokens: int = 32) -> BaseQueryEngine:
    """RAG: the model reads the retrieved documents again for every question."""
    from llama_index.llms.huggingface import HuggingFaceLLM  # <-

    llm = HuggingFaceLLM(  # <-
        model_name=model,  # <-
        tokenizer_name=model,  # <-
        context_window=8192,  # <-
        max_new_tokens=max_tokens,  # <-
        is_chat_model=True,  # <-
        generate_kwargs={"do_sample": False},  # <-
    )  # <-
    retriever = BM25Retriever.from_defaults(nodes=DOCUMENTS, similarity_top_k=2)
    return RetrieverQueryEngine.from_args(retriever, llm=llm, streaming=True)


def after(model: str, max_tokens: int = 32) -> BaseQueryEngine:
    """CAG: every document is encoded once, and found again in whatever order it is retrieved."""
    llm = KVCacheLLM(model=model, max_new_tokens=max_tokens)  # <-
    synthesizer = CAGSynthesizer(llm, streaming=True)  # <-
    KVCacheTransform(synthesizer=synthesizer)(DOCUMENTS)  # <- optional: or each is encoded when it is first retrieved
    retriever = BM25Retriever.from_defaults(nodes=DOCUMENTS, similarity_top_k=2)
    return RetrieverQueryEngine.from_args(retriever, llm=llm, response_synthesizer=synthesizer)  # <-


def ask(engine: BaseQueryEngine, question: str) -> StreamingResponse:
    """Stream an answer, and show when its first words came."""
    started, first = time.perf_counter(), 0.0
    response = engine.query(question)
    response.response_txt = ""
    for piece in response.response_gen:
        first = first or (time.perf_counter() - started if piece else 0.0)
        response.response_txt += piece
    print(f"  {first:5.2f} s to the first words  {question}\n{'':26}{' '.join(response.response_txt.split())}")
    return response


def main(model: str) -> None:
    for make in (before, after):
        print(f"{make.__name__}: {(make.__doc__ or '').strip()}")
        engine = make(model)
        for question in QUESTIONS:
            ask(engine, question)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1] if len(sys.argv) > 1 else str(embedded_model()))
