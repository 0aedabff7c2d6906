"""ChatKVCAG and KVCacheLLM over a server answer as over a model of this process, and show the server's usage."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from llama_index.core import Document as Node
from llama_index.core.llms import ChatMessage
from pydantic import BaseModel

from kvcag import HFEngine
from kvcag.engines.vllm.engine import VLLMEngine
from kvcag.errors import ContextLengthError, ServerUnavailableError
from kvcag.langchain import ChatKVCAG, create_cag_documents_chain
from kvcag.llama_index import CAGQueryEngine, KVCacheLLM
from kvcag.testing import byte_tokenizer, tiny_model
from tests.wire_server import WireServer

TEXTS = ["The tower was completed in 1889. " * 4, "It is 330 metres high. " * 4]
QUESTION = "When was it completed?"


class City(BaseModel):
    year: int


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return city


@pytest.fixture
def engine(server: WireServer) -> Iterator[VLLMEngine]:
    with VLLMEngine(server.url, tokenizer=byte_tokenizer(), retry_wait=0.02) as made:
        yield made
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvcag")]


@pytest.fixture
def here() -> HFEngine:
    return HFEngine(tiny_model(), byte_tokenizer())


def test_a_chat_answers_as_over_a_model_of_this_process(engine: VLLMEngine, here: HFEngine) -> None:
    answers = []
    for each in (engine, here):
        llm = ChatKVCAG(engine=each, max_tokens=12)
        chain = llm.bind(cached_content=llm.create_context(TEXTS, "Answer."))
        answers.append([chain.invoke(QUESTION).text, chain.invoke("How high is it?").text])
    assert answers[0] == answers[1]


def test_a_context_that_was_sent_ahead_is_read_by_no_question(engine: VLLMEngine) -> None:
    llm = ChatKVCAG(engine=engine, max_tokens=2)
    chain = llm.bind(cached_content=llm.create_context(TEXTS, "Answer."))
    usage = chain.invoke(QUESTION).usage_metadata
    corpus = len(engine.template.encode("".join(f"{text}\n\n" for text in TEXTS)))
    assert usage["input_token_details"]["cache_read"] >= corpus // 16 * 16
    read = sum(usage["input_token_details"].values())
    assert read <= usage["input_tokens"]


def test_documents_of_a_chain_are_sent_in_order_and_found_again(server: WireServer, engine: VLLMEngine) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Read.\n\n{context}"), ("human", "{question}")])
    llm = ChatKVCAG(engine=engine, max_tokens=2)
    documents = [Document(text) for text in TEXTS]
    assert len(llm.precompute(documents, prompt, progress=False)) == 2
    chain = create_cag_documents_chain(llm, prompt)
    chain.invoke({"context": documents, "question": QUESTION})
    text = byte_tokenizer().decode(server.prompts()[-1])
    assert text.index(TEXTS[0]) < text.index(TEXTS[1]) < text.index(QUESTION)


async def test_invoke_stream_and_their_asynchronous_kin_agree(engine: VLLMEngine) -> None:
    llm = ChatKVCAG(engine=engine, max_tokens=10)
    whole = llm.invoke(QUESTION)
    assert "".join(chunk.text for chunk in llm.stream(QUESTION)) == whole.text
    assert "".join([chunk.text async for chunk in llm.astream(QUESTION)]) == whole.text
    assert (await llm.ainvoke(QUESTION)).text == whole.text
    assert [message.text for message in llm.batch([QUESTION] * 3)] == [whole.text] * 3
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.response_metadata["model_name"] == "tiny"


def test_tools_and_structured_output_are_the_servers_own(server: WireServer, engine: VLLMEngine) -> None:
    llm = ChatKVCAG(engine=engine, max_tokens=60)
    assert isinstance(llm.with_structured_output(City).invoke(QUESTION), City)
    assert "structured_outputs" in server.bodies[-1][1]
    called = llm.bind_tools([weather], tool_choice="any").invoke("Weather?")
    assert [call["name"] for call in called.tool_calls] == ["weather"] or called.invalid_tool_calls
    structured = KVCacheLLM(engine=engine, max_new_tokens=60).as_structured_llm(City)
    assert isinstance(structured.chat([ChatMessage(content=QUESTION)]).raw, City)


def test_closing_a_stream_closes_the_request(server: WireServer, engine: VLLMEngine) -> None:
    server.faults.pause = 0.05
    for stream in (
        ChatKVCAG(engine=engine, max_tokens=200).stream(QUESTION),
        KVCacheLLM(engine=engine, max_new_tokens=200).stream_chat([ChatMessage(content=QUESTION)]),
    ):
        server.aborted.clear()
        next(stream)
        stream.close()
        assert server.aborted.wait(5)


def langchain_hit(engine: VLLMEngine, namespace: str) -> int:
    message = ChatKVCAG(engine=engine, namespace=namespace, max_tokens=1).invoke(
        [("system", TEXTS[0]), ("human", QUESTION)]
    )
    return message.usage_metadata["input_token_details"]["cache_read"]


def llama_index_hit(engine: VLLMEngine, namespace: str) -> int:
    messages = [ChatMessage(role="system", content=TEXTS[0]), ChatMessage(content=QUESTION)]
    return KVCacheLLM(engine=engine, namespace=namespace, max_new_tokens=1).chat(messages).raw["usage"]["cached_tokens"]


@pytest.mark.parametrize("hit", [langchain_hit, llama_index_hit])
def test_namespaces_share_no_hit(engine: VLLMEngine, hit) -> None:
    first, other, again = (hit(engine, namespace) for namespace in ("a", "b", "a"))
    assert (first, other) == (0, 0)
    assert again > 0


def test_a_query_engine_over_a_server(engine: VLLMEngine, here: HFEngine) -> None:
    answers = []
    for each in (engine, here):
        llm = KVCacheLLM(engine=each, max_new_tokens=12)
        query_engine = CAGQueryEngine.from_documents([Node(text=text) for text in TEXTS], llm=llm)
        answers.append(str(query_engine.query(QUESTION)))
    assert answers[0] == answers[1]
    usage = [KVCacheLLM(engine=engine).complete(TEXTS[0] * 2, max_new_tokens=1).raw["usage"] for _ in range(2)]
    assert [each["cached_tokens"] > 0 for each in usage] == [False, True]
    assert usage[0]["prompt_tokens"] == usage[1]["prompt_tokens"]


def test_errors_reach_the_consumer_as_they_are(server: WireServer, engine: VLLMEngine) -> None:
    llm = ChatKVCAG(engine=engine, max_tokens=10)
    with pytest.raises(ContextLengthError):
        llm.invoke("x" * 3000)
    server.stop()
    with pytest.raises(ServerUnavailableError):
        llm.invoke(QUESTION)
    server.start()
    assert llm.invoke(QUESTION).text is not None


def test_what_identifies_a_chat_changes_with_the_servers_model(server: WireServer, engine: VLLMEngine) -> None:
    """It is the key of LangChain's response cache."""
    one = ChatKVCAG(engine=engine)
    server.model = "other"
    with VLLMEngine(server.url, tokenizer=byte_tokenizer()) as other:
        assert one._identifying_params != ChatKVCAG(engine=other)._identifying_params
    assert one.profile["max_input_tokens"] == 2048
