"""From one process to a vLLM server: the same LangChain and LlamaIndex code, with one different line.

    python examples/vllm_server.py                              # the model in this process
    python examples/vllm_server.py http://127.0.0.1:8000/v1     # the same model on a server
    vllm serve MODEL --enable-prompt-tokens-details             # starts the server; see docs/vllm.md

The model or the server reads a corpus once, and then only the questions. The usage in both frameworks shows the cached
tokens of the second question. Needs `pip install "kvcag[langchain,llama-index,vllm,demo]"`.
"""

from __future__ import annotations

import sys

from llama_index.core import Document
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent

from kvcag import HFEngine, VLLMEngine
from kvcag.demo.corpus import python_topics
from kvcag.demo.model import embedded_model
from kvcag.engines.base import Engine
from kvcag.langchain import ChatKVCAG
from kvcag.llama_index import CAGQueryEngine, KVCacheLLM

TOPICS = ["break", "pass", "while", "imaginary", "del", "lists", "nonlocal", "power"]  # about 1,400 tokens
TEXTS = [topic.text for topic in python_topics(TOPICS)]
INSTRUCTION = "Answer the question using only the passages below."
QUESTIONS = ["What happens when 0.0 is raised to a negative power?", 'What is the "while" statement used for?']


def ask_langchain(engine: Engine) -> list[dict]:
    """Questions over a corpus that has an id: it is encoded, or sent to the server, before anybody asks."""
    llm = ChatKVCAG(engine=engine, max_tokens=24)
    chain = llm.bind(cached_content=llm.create_context(TEXTS, INSTRUCTION))
    answers = []
    for question in QUESTIONS:
        message = chain.invoke(question)
        usage = message.usage_metadata
        answers.append(
            {
                "text": message.text,
                "prompt_tokens": usage["input_tokens"],
                "cached_tokens": usage["input_token_details"]["cache_read"],
                "ttft_s": message.response_metadata["kvcag"]["ttft_s"],
            }
        )
    return answers


def ask_llama_index(engine: Engine) -> list[dict]:
    """Questions over a whole corpus: the first reads it, the second does not."""
    usages: list[dict] = []

    class Usages(BaseEventHandler):
        """What each answer took, where LlamaIndex tells it: in the raw response of its events."""

        def handle(self, event: BaseEvent, **_: object) -> None:
            if isinstance(event, LLMChatEndEvent) and event.response is not None:
                usages.append(event.response.raw["usage"])

    llm = KVCacheLLM(engine=engine, max_new_tokens=24)
    query_engine = CAGQueryEngine.from_documents([Document(text=text) for text in TEXTS], llm=llm)
    get_dispatcher().add_event_handler(Usages())
    texts = [str(query_engine.query(question)) for question in QUESTIONS]
    get_dispatcher().event_handlers.pop()
    return [{"text": text, **usage} for text, usage in zip(texts, usages, strict=True)]


def main(url: str | None, model: str) -> dict[str, list[dict]]:
    if url is None:
        engine: Engine = HFEngine.from_pretrained(model)
    else:
        engine = VLLMEngine(url, tokenizer=model)  # <- the different line
    answers = {"LangChain": ask_langchain(engine), "LlamaIndex": ask_llama_index(engine)}
    for framework, given in answers.items():
        print(framework)
        for answer in given:
            read = f"{answer['cached_tokens']:5} of {answer['prompt_tokens']} tokens cached"
            print(f"  {answer['ttft_s']:5.2f} s  {read}  {' '.join(answer['text'].split())}")
    return answers


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None, str(embedded_model()))
