"""Counts the source files of kvcag that a question uses.

    python benchmarks/trace_files.py

Counts the distinct files in which a function was called, through the documents chain, `CAGSynthesizer`,
`KVCacheMemory.merge` and `DiskStore.put`, over a tiny random model. Imports do not count. The first edition had 33, 32,
17 and 6; today there are 22, 22, 14 and 4.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate

import kvcag
from kvcag import HFEngine, KVCacheMemory
from kvcag.langchain import ChatKVCAG, create_cag_documents_chain
from kvcag.llama_index import CAGSynthesizer, KVCacheLLM
from kvcag.stores.disk import DiskStore
from kvcag.testing import byte_tokenizer, tiny_model

ROOT = Path(kvcag.__file__).parent
TEXTS = ["The library opens at nine.", "It is in Harbour Street."]


def files_entered(work: Callable[[], object]) -> list[str]:
    """The files, relative to the package."""
    seen: set[str] = set()

    def called(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen.add(frame.f_code.co_filename)

    threading.setprofile(called)
    sys.setprofile(called)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    inside = (Path(name) for name in seen)
    return sorted(str(path.relative_to(ROOT)) for path in inside if path.is_relative_to(ROOT))


def main() -> None:
    engine = HFEngine(tiny_model(), byte_tokenizer())
    llm = ChatKVCAG(engine=engine, max_tokens=4)
    prompt = ChatPromptTemplate.from_messages([("system", "Answer from:\n\n{context}"), ("human", "{input}")])
    chain = create_cag_documents_chain(llm, prompt)
    documents = [Document(text) for text in TEXTS]
    synthesizer = CAGSynthesizer(llm=KVCacheLLM(engine=engine, max_new_tokens=4))
    memory = KVCacheMemory(engine)
    ids = memory.add(TEXTS)
    item = memory.get_all()[0]
    with tempfile.TemporaryDirectory() as folder:
        store = DiskStore(folder)
        ways: dict[str, Callable[[], object]] = {
            "documents chain": lambda: chain.invoke({"context": documents, "input": "When does it open?"}),
            "CAGSynthesizer": lambda: synthesizer.get_response("When does it open?", TEXTS, documents=True),
            "KVCacheMemory.merge": lambda: memory.merge(ids, "When does it open?", strategy="query"),
            "DiskStore.put": lambda: store.put(item),  # type: ignore[arg-type]
        }
        for name, work in ways.items():
            entered = files_entered(work)
            print(f"{name}: {len(entered)} files: {', '.join(entered)}")


if __name__ == "__main__":
    main()
