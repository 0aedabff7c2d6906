"""Whole-corpus CAG: the model reads the whole corpus once, as one context, without a retriever.

    python examples/whole_corpus.py [MODEL]

The corpus has an id that is a hash of its content. Its caches are stored in a folder. So another process (here the
second half of this script) answers from them at once, with the same tokens as after a full prefill. `kvcag encode`
and `kvcag ask` do the same in the shell. Needs `pip install "kvcag[demo]"`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from kvcag import HFEngine, KVCacheMemory, Sampling, Usage
from kvcag.demo.corpus import python_topics
from kvcag.demo.model import embedded_model
from kvcag.stores import DiskStore

TOPICS = ["break", "pass", "continue", "while", "nonlocal", "power"]
INSTRUCTION = "Answer the question using only the passages below."
QUESTIONS = ["What happens when 0.0 is raised to a negative power?", 'What is the "while" statement used for?']


def answer(memory: KVCacheMemory, corpus: str, question: str) -> tuple[str, Usage]:
    """Ask a corpus by its id."""
    messages = memory.with_context(corpus, [{"role": "user", "content": question}])
    text, usage = "", None
    for chunk in memory.stream(messages, strategy="rotate", sampling=Sampling(max_new_tokens=24)):
        text, usage = text + chunk.text, chunk.usage or usage
    assert usage is not None
    assert usage.context is not None
    print(f"  {usage.ttft_s:5.2f} s to the first token, {usage.context.mode}: {' '.join(text.split())}")
    return text, usage


def main(model: str, folder: str | Path) -> list[tuple[str, Usage]]:
    engine = HFEngine.from_pretrained(model)
    memory = KVCacheMemory(engine, DiskStore(folder))
    started = time.perf_counter()
    corpus = memory.create_context([topic.text for topic in python_topics(TOPICS)], INSTRUCTION)
    print(f"{corpus[:22]}…, in {time.perf_counter() - started:.2f} s")
    answers = [answer(memory, corpus, question) for question in QUESTIONS]

    print("Another process, with nothing but the folder and the id:")
    engine = HFEngine(engine.model, engine.tokenizer)  # the same weights, without recent contexts
    memory = KVCacheMemory(engine, DiskStore(folder))
    return answers + [answer(memory, corpus, question) for question in QUESTIONS]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if len(sys.argv) > 1 else str(embedded_model()), folder)
