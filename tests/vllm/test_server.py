"""The adapters over a real vLLM server, measured by the frameworks' own usage."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from llama_index.core.llms import ChatMessage
from pydantic import BaseModel, Field

from kvcag import Choices, Document, Grammar, HFEngine, KVCacheMemory, Regex, VLLMEngine
from kvcag.concurrency import iterate
from kvcag.demo.corpus import python_topics
from kvcag.errors import ConstraintError, ContextLengthError
from kvcag.langchain import ChatKVCAG
from kvcag.llama_index import KVCacheLLM
from tests.vllm.vllm_process import Vllm
from tests.waits import awaited

Figures = Callable[[str], None]
QUESTIONS = ["What happens when 0.0 is raised to a negative power?", 'What is the "while" statement used for?']


@pytest.fixture(scope="session")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "vllm_server.py"
    spec = importlib.util.spec_from_file_location("vllm_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def corpus(*names: str) -> str:
    return "\n\n".join(topic.text for topic in python_topics(names))


CORPUS = corpus("break", "pass", "while", "imaginary", "del", "lists", "nonlocal", "power")


def test_the_second_question_through_langchain_finds_the_corpus_cached(engine: VLLMEngine, figures: Figures) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Answer from this.\n\n{corpus}"), ("human", "{question}")])
    chain = prompt | ChatKVCAG(engine=engine, max_tokens=8)
    first, second = (chain.invoke({"corpus": CORPUS, "question": question}) for question in QUESTIONS)
    read = [message.usage_metadata["input_token_details"]["cache_read"] for message in (first, second)]
    times = [message.response_metadata["kvcag"]["ttft_s"] for message in (first, second)]
    size = first.usage_metadata["input_tokens"]
    figures(f"LangChain: cached {read} of {size}, TTFT {times[0]:.2f} → {times[1]:.3f} s")
    assert first.usage_metadata["input_tokens"] >= 1400
    assert read[0] == 0
    assert read[1] >= 1300
    assert times[0] >= 5 * times[1]


def test_the_second_question_through_llama_index_finds_the_corpus_cached(engine: VLLMEngine, figures: Figures) -> None:
    llm = KVCacheLLM(engine=engine, max_new_tokens=8)
    usage = []
    for question in QUESTIONS:
        messages = [ChatMessage(role="system", content=f"Answer from this.\n\n{CORPUS}"), ChatMessage(content=question)]
        usage.append(llm.chat(messages).raw["usage"])
    read, times = ([each[name] for each in usage] for name in ("cached_tokens", "ttft_s"))
    size = usage[0]["prompt_tokens"]
    figures(f"LlamaIndex: cached {read} of {size}, TTFT {times[0]:.2f} → {times[1]:.3f} s")
    assert usage[0]["cached_tokens"] == 0
    assert usage[1]["cached_tokens"] >= 1300
    assert usage[0]["ttft_s"] >= 5 * usage[1]["ttft_s"]


def test_namespaces_share_no_hit(engine: VLLMEngine, figures: Figures) -> None:
    messages = [{"role": "system", "content": CORPUS[:3000]}, {"role": "user", "content": "When?"}]
    read = {}
    for namespace in ("a", "b", "a", "b"):
        *_, last = KVCacheMemory(engine, namespace=namespace).stream(
            messages, sampling=engine.sampling(max_new_tokens=1)
        )
        read.setdefault(namespace, []).append(last.usage.cached_tokens)
    figures(f"namespaces: cached at the first and the second question {read}")
    assert [hits[0] for hits in read.values()] == [0, 0]
    assert all(hits[1] > 500 for hits in read.values())


def test_the_example_answers_alike_in_a_process_and_on_a_server(
    example: ModuleType, here: HFEngine, engine: VLLMEngine
) -> None:
    for ask in (example.ask_langchain, example.ask_llama_index):
        ours, theirs = ask(here), ask(engine)
        assert [answer["text"] for answer in theirs] == [answer["text"] for answer in ours]
        assert [answer["prompt_tokens"] for answer in theirs] == [answer["prompt_tokens"] for answer in ours]
        assert theirs[1]["cached_tokens"] >= 1300


def test_the_servers_own_tokenizer_makes_the_same_prompts(vllm: Vllm, here: HFEngine, engine: VLLMEngine) -> None:
    messages = [
        {"role": "system", "content": ["Read.\n", Document("Ünïcode 日本語 🙂\n\n"), Document("  spaced\t")]},
        {"role": "user", "content": "x\n\ny <|im_end|> é"},
    ]
    with VLLMEngine(vllm.url) as asking:
        assert asking.template.prompt(messages) == here.template.prompt(messages) == engine.template.prompt(messages)
        assert asking.fingerprint.digest == engine.fingerprint.digest
        assert asking.template.has_system_role
        assert "<|im_start|>" in asking.tokenizer.all_special_tokens
        assert asking.generate("What is the capital of France?", max_new_tokens=8) == here.generate(
            "What is the capital of France?", max_new_tokens=8
        )


def test_items_are_sent_ahead_and_their_merge_is_all_of_them(engine: VLLMEngine, here: HFEngine) -> None:
    texts = [corpus("power"), corpus("while"), corpus("nonlocal")]
    answers = []
    for memory in (KVCacheMemory(engine, instruction="Answer."), KVCacheMemory(here, instruction="Answer.")):
        items = [memory.extract(text) for text in texts]
        memory.add(items)
        context = memory.merge([item.id for item in items], QUESTIONS[0], "exact")
        answers.append(memory.engine.generate(None, context, max_new_tokens=16))
        if memory.engine is engine:
            prompt = engine.build_prompt(None, context)
            *_, last = engine.stream(prompt, engine.sampling(max_new_tokens=1), context)
            assert last.usage.cached_tokens > len(items[0].token_ids)
            assert all(text.strip() in context.prompt for text in texts)
    assert answers[0] == answers[1]


# --- constraints -----------------------------------------------------------------------------------------------


class City(BaseModel):
    name: str = Field(max_length=12)
    population: int = Field(ge=0, le=99_999_999)


@tool
def weather(city: str, days: int) -> str:
    """The weather in a city."""
    return f"{city} {days}"


@pytest.mark.parametrize(
    "constraint",
    [City, Regex("[A-Z][a-z]{2,8}/[0-9]{4}"), Choices(["Paris", "Rome"]), Grammar('start: "x" /[0-9]{1,8}/ "y"')],
)
def test_constrained_answers_agree_with_those_of_this_process(engine: VLLMEngine, here: HFEngine, constraint) -> None:
    asked = "Which city is the capital of France?"
    ours, theirs = (each.generate(asked, constraint=constraint, max_new_tokens=60) for each in (here, engine))
    assert ours == theirs


def test_tools_and_structured_output_through_langchain(engine: VLLMEngine) -> None:
    llm = ChatKVCAG(engine=engine, max_tokens=100)
    city = llm.with_structured_output(City).invoke("Name a city.")
    assert isinstance(city, City)
    called = llm.bind_tools([weather], tool_choice="any").invoke("What will the weather be in Rome for 3 days?")
    assert [call["name"] for call in called.tool_calls] == ["weather"]
    assert isinstance(called.tool_calls[0]["args"]["days"], int)
    assert called.response_metadata["finish_reason"] == "tool_calls"
    free = llm.bind_tools([weather]).invoke("What is the capital of France?")
    assert "Paris" in free.text
    assert not free.tool_calls


def test_a_constraint_that_the_server_refuses_is_a_typed_error(engine: VLLMEngine) -> None:
    with pytest.raises(ConstraintError, match="unclosed group"):
        engine.generate("?", constraint=Regex("(a"))


# --- streams ---------------------------------------------------------------------------------------------------


def test_stop_strings_and_budgets(engine: VLLMEngine) -> None:
    answer = engine.generate("What is the capital of France?", stop=["Paris"], max_new_tokens=30)
    assert answer == "The capital of France is "
    *_, last = engine.stream(
        engine.template.prompt([{"role": "user", "content": "Count."}]), engine.sampling(max_new_tokens=3)
    )
    assert (last.finish_reason, last.usage.completion_tokens) == ("length", 3)


def test_a_prompt_that_is_too_long_is_refused_by_either_side(
    vllm: Vllm, engine: VLLMEngine, smollm2_path: Path
) -> None:
    with pytest.raises(ContextLengthError):
        engine.generate(CORPUS * 2)
    with (
        VLLMEngine(vllm.url, tokenizer=smollm2_path, context_length=100_000) as unaware,
        pytest.raises(ContextLengthError, match="2048") as refused,
    ):
        unaware.generate(CORPUS * 2)
    assert refused.value.prompt_tokens > 2048


def running(vllm: Vllm) -> float:
    text = httpx.get(vllm.url.removesuffix("/v1") + "/metrics").text
    return sum(float(value) for value in re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", text, re.M))


async def test_cancelling_ends_the_request_on_the_server(vllm: Vllm, engine: VLLMEngine) -> None:
    prompt = engine.template.prompt([{"role": "user", "content": "Write a long story."}])

    async def consume() -> None:
        async for _ in iterate(lambda: engine.stream(prompt, engine.sampling(max_new_tokens=1500))):
            pass

    task = asyncio.create_task(consume())
    until = time.monotonic() + 60
    while not await asyncio.to_thread(running, vllm):
        assert time.monotonic() < until
        await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await awaited(task)
    until = time.monotonic() + 10
    while await asyncio.to_thread(running, vllm):
        assert time.monotonic() < until
        await asyncio.sleep(0.05)


async def test_asynchronous_answers_are_the_synchronous_ones(engine: VLLMEngine) -> None:
    llm = ChatKVCAG(engine=engine, max_tokens=12)
    asked = "What is the capital of France?"
    whole = llm.invoke(asked).text
    assert "".join([chunk.text async for chunk in llm.astream(asked)]) == whole
    assert [message.text for message in await llm.abatch([asked, asked])] == [whole, whole]


def test_after_a_restart_the_server_is_warm_again(vllm: Vllm, engine: VLLMEngine, figures: Figures) -> None:
    """The last test: it takes a minute."""
    context = engine.build_vllm_kv_cache(CORPUS[:2500])
    other = engine.build_vllm_kv_cache(CORPUS[2500:5000])
    vllm.stop()
    with pytest.raises(ConnectionError):
        engine.generate("Hello?", max_new_tokens=2)
    vllm.start()
    engine.generate("Hello?", max_new_tokens=2)
    until = time.monotonic() + 60
    while engine._preloads._thread is not None and time.monotonic() < until:
        time.sleep(0.1)
    for each in (context, other):
        *_, last = engine.stream(engine.build_prompt("When?", each), engine.sampling(max_new_tokens=1), each)
        figures(f"after a restart: {last.usage.cached_tokens} of {last.usage.prompt_tokens} cached")
        assert last.usage.cached_tokens >= len(each.token_ids) - 128
