"""From RAG to CAG in LangChain: the same chain before and after, on a local model.

    python examples/langchain_rag_to_cag.py

Lines marked with `# <-` differ: the model, and the chain that puts documents into the prompt. Retriever,
prompt and the other code stay. Needs
`pip install "kvcag[langchain,demo]" langchain-classic langchain-huggingface`.
"""

from __future__ import annotations

import re
import sys
import time
import warnings

from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable

from kvcag.demo.corpus import python_topics
from kvcag.demo.model import embedded_model
from kvcag.langchain import ChatKVCAG, create_cag_documents_chain

TOPICS = ["break", "while", "imaginary", "power", "nonlocal", "del"]
DOCUMENTS = [Document(topic.text, metadata={"title": topic.title}) for topic in python_topics(TOPICS)]
QUESTIONS = [
    "What happens when 0.0 is raised to a negative power?",
    'What is the "while" statement used for?',
    "What exception is raised if the name is unbound?",
]
PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer the question using only these passages.\n\n{context}"), ("human", "{input}")]
)


class SharedWords(BaseRetriever):
    """The documents that share the most words with the question. Any retriever will do."""

    documents: list[Document]
    k: int = 2

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        asked = words(query)
        return sorted(self.documents, key=lambda document: -len(asked & words(document.page_content)))[: self.k]


def words(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def before(model: str, max_tokens: int = 32) -> Runnable:
    """RAG: the model reads the retrieved documents again for every question."""
    from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline  # <-

    pipeline = HuggingFacePipeline.from_model_id(  # <-
        model,  # <-
        task="text-generation",  # <-
        pipeline_kwargs={"max_new_tokens": max_tokens, "do_sample": False, "return_full_text": False},  # <-
    )  # <-
    llm = ChatHuggingFace(llm=pipeline)  # <-
    return create_retrieval_chain(
        SharedWords(documents=DOCUMENTS),
        create_stuff_documents_chain(llm, PROMPT),  # <-
    )


def after(model: str, max_tokens: int = 32) -> Runnable:
    """CAG: every document is encoded once, and found again in whatever order it is retrieved."""
    llm = ChatKVCAG(model=model, max_tokens=max_tokens)  # <-
    llm.precompute(DOCUMENTS, PROMPT)  # <- optional: or each document is encoded when it is first retrieved
    return create_retrieval_chain(
        SharedWords(documents=DOCUMENTS),
        create_cag_documents_chain(llm, PROMPT),  # <-
    )


def ask(chain: Runnable, question: str) -> dict:
    """Stream an answer, and show when its first words came."""
    started, first, state = time.perf_counter(), 0.0, {"context": [], "answer": ""}
    for part in chain.stream({"input": question}):
        if part.get("answer"):
            first = first or time.perf_counter() - started
        state = {"context": part.get("context", state["context"]), "answer": state["answer"] + part.get("answer", "")}
    print(f"  {first:5.2f} s to the first words  {question}\n{'':26}{' '.join(state['answer'].split())}")
    return state


def main(model: str) -> None:
    for make in (before, after):
        print(f"{make.__name__}: {(make.__doc__ or '').strip()}")
        chain = make(model)
        for question in QUESTIONS:
            ask(chain, question)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1] if len(sys.argv) > 1 else str(embedded_model()))
