"""Chat engines, routers, sub-questions and evaluation over our engines; CAGMemoryBlock."""

import gc
import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine, SimpleChatEngine
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.evaluation import BatchEvalRunner, EvaluationResult
from llama_index.core.evaluation.base import BaseEvaluator
from llama_index.core.indices.query.query_transform.base import StepDecomposeQueryTransform
from llama_index.core.memory import Memory
from llama_index.core.query_engine import MultiStepQueryEngine, RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.schema import TextNode
from llama_index.core.selectors import LLMMultiSelector, LLMSingleSelector
from llama_index.core.tools import QueryEngineTool
from llama_index.retrievers.bm25 import BM25Retriever

from kvcag import HFEngine
from kvcag.chat_template import Document
from kvcag.llama_index import (
    CAGCondensePlusContextChatEngine,
    CAGContextChatEngine,
    CAGMemoryBlock,
    CAGQueryEngine,
    CAGSynthesizer,
    KVCacheLLM,
)
from kvcag.llama_index.messages import to_messages
from kvcag.testing import EchoEngine, byte_tokenizer, last_user_message, tiny_model, whole_prompt
from tests.stored import documents_in

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # see the fixture
    # `workflows`, which runs the agents, reads deprecated attributes; core's evaluation calls what core deprecates
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TEXTS = ["The tower is 330 metres tall.", "It was built in 1889.", "It stands in Paris."]
SYSTEM = "Talk like a pirate."


def nodes() -> list[TextNode]:
    return [TextNode(text=text, id_=str(index)) for index, text in enumerate(TEXTS)]


@pytest.fixture
def retriever() -> BM25Retriever:
    return BM25Retriever.from_defaults(nodes=nodes(), similarity_top_k=2)


@pytest.fixture(autouse=True)
def _connections_go_with_their_test() -> Iterator[None]:
    """LlamaIndex's `Memory` does not close its database: collect it here, so that no other test gets its warning."""
    yield
    gc.collect()


def documents(messages: list[ChatMessage]) -> list[str]:
    parts = [part for message in to_messages(messages) for part in message["content"]]
    return [part.strip() for part in parts if isinstance(part, Document)]


def squeezed(text: object) -> str:
    return " ".join(str(text).split())


# --- chat engines: what core's own tests ask of them, and the same prompts as core's engines --------------------------

PAIRS = [
    (ContextChatEngine, CAGContextChatEngine),
    (CondensePlusContextChatEngine, CAGCondensePlusContextChatEngine),
]
both = pytest.mark.parametrize(("plain", "cached"), PAIRS)


@both
def test_a_chat_gives_the_answers_of_cores_engine(
    llm: KVCacheLLM, retriever: BM25Retriever, plain: type[BaseChatEngine], cached: type[BaseChatEngine]
) -> None:
    ours, cores = (cls.from_defaults(retriever, llm=llm, system_prompt=SYSTEM) for cls in (cached, plain))
    for question in ("How tall is the tower?", "When was it built?"):
        answer, expected = ours.chat(question), cores.chat(question)
        assert SYSTEM in answer.response
        assert question in answer.response
        assert answer.response == expected.response
        assert answer.source_nodes == expected.source_nodes
    assert len(ours.chat_history) == 4
    ours.reset()
    assert ours.chat_history == []


@both
async def test_streams_and_asynchronous_chats_say_the_same(
    llm: KVCacheLLM, retriever: BM25Retriever, plain: type[BaseChatEngine], cached: type[BaseChatEngine]
) -> None:
    def fresh() -> BaseChatEngine:
        return cached.from_defaults(retriever, llm=llm, system_prompt=SYSTEM)

    question = "How tall is the tower?"
    expected = fresh().chat(question).response
    assert (await fresh().achat(question)).response == expected
    engine = fresh()
    assert "".join(engine.stream_chat(question).response_gen) == expected
    assert [message.content for message in engine.chat_history] == [question, expected]
    engine = fresh()
    stream = await engine.astream_chat(question)
    assert "".join([piece async for piece in stream.async_response_gen()]) == expected


@both
def test_the_synthesizer_of_a_chat_engine_is_ours(
    llm: KVCacheLLM, retriever: BM25Retriever, plain: type[BaseChatEngine], cached: type[BaseChatEngine]
) -> None:
    """`as_chat_engine(response_synthesizer=…)` drops it silently."""
    engine = cached.from_defaults(retriever, llm=llm)
    synthesizer = engine._get_response_synthesizer([ChatMessage(content="{context_str} or {query_str}?")])
    assert isinstance(synthesizer, CAGSynthesizer)
    assert documents(synthesizer.messages("Q", TEXTS)) == TEXTS


def test_a_second_turn_encodes_no_document_again(tiny_engine: HFEngine, retriever: BM25Retriever) -> None:
    llm = KVCacheLLM(engine=tiny_engine, max_new_tokens=4)
    engine = CAGContextChatEngine.from_defaults(retriever, llm=llm)
    engine.chat("How tall is the tower?")
    kept = set(documents_in(llm.memory.store))
    engine.chat("And when was the tower built?")
    assert len(kept) == 2
    assert kept <= set(documents_in(llm.memory.store))
    assert len(set(documents_in(llm.memory.store))) <= len(TEXTS)


async def test_cores_simple_chat_engine_runs_on_our_llm(llm: KVCacheLLM) -> None:
    engine = SimpleChatEngine.from_defaults(llm=llm, system_prompt=SYSTEM)
    assert "Hello World!" in engine.chat("Hello World!").response
    assert "Hello World!" in (await engine.achat("And again.")).response
    assert "And again." in "".join(engine.stream_chat("Once more.").response_gen)


# --- routers, sub-questions, evaluation ------------------------------------------------------------------------------


def scripted(prompt: str) -> str:
    """Chooses the second of two tools (or both), asks one sub-question, and otherwise answers with its prompt."""
    asked = last_user_message(prompt)
    if "Some choices are given below" in asked and "no more than 2" in asked:
        return json.dumps([{"choice": 1, "reason": "one"}, {"choice": 2, "reason": "two"}])
    if "Some choices are given below" in asked:
        return json.dumps([{"choice": 2, "reason": "it is about towers"}])
    if "Tools" in asked and "sub_question" in asked:
        return "```json\n" + json.dumps({"items": [{"sub_question": "How tall?", "tool_name": "towers"}]}) + "\n```"
    return asked


def tools(llm: KVCacheLLM) -> list[QueryEngineTool]:
    bridges = CAGQueryEngine.from_documents([TextNode(text="The bridge is red.")], llm)
    towers = CAGQueryEngine.from_documents(nodes(), llm)
    return [
        QueryEngineTool.from_defaults(bridges, name="bridges", description="Knows bridges."),
        QueryEngineTool.from_defaults(towers, name="towers", description="Knows towers."),
    ]


async def test_a_router_chooses_one_of_our_engines() -> None:
    llm = KVCacheLLM(engine=EchoEngine(scripted))
    router = RouterQueryEngine(LLMSingleSelector.from_defaults(llm), tools(llm), llm=llm)
    for answer in (router.query("How tall?"), await router.aquery("How tall?")):
        assert answer.metadata["selector_result"].ind == 1
        assert all(text in str(answer) for text in TEXTS)
        assert [source.node.text for source in answer.source_nodes] == TEXTS


def asked_by_sub_questions(llm: KVCacheLLM) -> Any:
    return SubQuestionQueryEngine.from_defaults(
        tools(llm),
        llm=llm,
        question_gen=LLMQuestionGenerator.from_defaults(llm),
        response_synthesizer=CAGSynthesizer(llm),
        use_async=False,
        verbose=False,
    ).query("How tall is the tower?")


def test_sub_questions_are_answered_by_our_engines() -> None:
    answer = asked_by_sub_questions(KVCacheLLM(engine=EchoEngine(scripted)))
    assert "Sub question: How tall?" in str(answer)
    assert all(text in str(answer) for text in TEXTS)


class ScriptedEngine(HFEngine):
    """Encodes documents, and gives the answers of `scripted`."""

    def stream(self, prompt: Any, sampling: Any, past_key_values: Any = None, **settings: Any) -> Any:
        return EchoEngine(scripted).stream(prompt, sampling)


def kept(llm: KVCacheLLM) -> set[str]:
    """The texts of the stored documents."""
    store = llm.memory.store
    return {store.manifest(key).records.composed_text_memory.strip() for key in documents_in(store)}


def asked_in_steps(llm: KVCacheLLM) -> None:
    """The last prompt contains the question and the answer of each step."""
    transform, inner = StepDecomposeQueryTransform(llm=llm), CAGQueryEngine.from_documents(nodes(), llm)
    steps: dict[str, Any] = {"num_steps": 2, "stop_fn": lambda step: False}
    engine = MultiStepQueryEngine(inner, transform, CAGSynthesizer(llm), index_summary="towers", **steps)
    engine.query("How tall is the tower?")


def asked_of_several(llm: KVCacheLLM) -> None:
    """A router that chose two engines joins their answers by the summarizer's `get_response`."""
    summarizer: Any = CAGSynthesizer(llm)
    selector = LLMMultiSelector.from_defaults(llm, max_outputs=2)
    RouterQueryEngine(selector, tools(llm), llm=llm, summarizer=summarizer).query("How tall is the tower?")


async def asked_of_several_asynchronously(llm: KVCacheLLM) -> None:
    summarizer: Any = CAGSynthesizer(llm)
    selector = LLMMultiSelector.from_defaults(llm, max_outputs=2)
    await RouterQueryEngine(selector, tools(llm), llm=llm, summarizer=summarizer).aquery("How tall is the tower?")


def asked_directly(llm: KVCacheLLM) -> None:
    answer = str(CAGQueryEngine.from_documents(nodes(), llm).query("How tall?"))
    assert answer
    CAGSynthesizer(llm).get_response("Q", [answer, "It is 330 metres tall, says the model."])


@pytest.mark.parametrize(
    "ask", [asked_by_sub_questions, asked_in_steps, asked_of_several, asked_of_several_asynchronously, asked_directly]
)
async def test_generated_text_is_not_kept_as_a_document(ask: Any) -> None:
    """Regression: the answers that a router joins were stored as documents."""
    engine = ScriptedEngine(tiny_model(max_position_embeddings=1 << 14), byte_tokenizer())
    llm = KVCacheLLM(engine=engine, max_new_tokens=800)
    done = ask(llm)
    if inspect.isawaitable(done):
        await done
    assert kept(llm) <= {"The bridge is red.", "\n\n".join(TEXTS)}
    assert "\n\n".join(TEXTS) in kept(llm)


@both
async def test_turns_of_a_chat_are_not_kept_as_documents(
    tiny_engine: HFEngine, retriever: BM25Retriever, plain: type[BaseChatEngine], cached: type[BaseChatEngine]
) -> None:
    llm = KVCacheLLM(engine=tiny_engine, max_new_tokens=6)
    chat = cached.from_defaults(retriever, llm=llm, system_prompt=SYSTEM)
    for question in ("How tall is the tower?", "When was it built, my password is swordfish?"):
        chat.chat(question)
        list(chat.stream_chat(question).response_gen)
        await chat.achat(question)
    simple = SimpleChatEngine.from_defaults(llm=llm, system_prompt=SYSTEM)
    simple.chat("My password is swordfish.")
    simple.chat("What did I say?")
    assert kept(llm) <= set(TEXTS)
    assert kept(llm)


class SaysSo(BaseEvaluator):
    """Evaluates whether an answer contains its question."""

    def _get_prompts(self) -> dict:
        return {}

    def _update_prompts(self, prompts: dict) -> None:
        """There are none."""

    async def aevaluate(self, query=None, response=None, contexts=None, **kwargs) -> EvaluationResult:
        return EvaluationResult(query=query, response=response, contexts=contexts, passing=query in response)


async def test_four_workers_give_the_result_of_one_and_do_not_change_the_caches(tiny_engine: HFEngine) -> None:
    questions = ["How tall?", "When?", "Where?", "Why?", "How tall is it?", "Who?"]
    llm = KVCacheLLM(engine=tiny_engine, max_new_tokens=4)
    engine = CAGQueryEngine.from_documents(nodes(), llm)
    serial = [str(engine.query(question)) for question in questions]
    store = llm.memory.store

    def stored() -> dict[str, list]:
        items = {key: store.get(key) for key in documents_in(store)}
        return {
            key: [tensor.clone() for layer in item.memory.layers for tensor in (layer.keys, layer.values)]
            for key, item in items.items()
        }

    before = stored()
    runner = BatchEvalRunner({"says so": SaysSo()}, workers=4)
    results = (await runner.aevaluate_queries(engine, queries=questions))["says so"]
    assert [result.response for result in results] == serial
    after = stored()
    assert before.keys() == after.keys()
    assert all(a.equal(b) for key in before for a, b in zip(before[key], after[key], strict=True))


# --- memory --------------------------------------------------------------------------------------------------------


async def test_the_memory_block_survives_a_round_trip_and_no_limit_cuts_it(tiny_engine: HFEngine) -> None:
    long = [f"{text} " * 40 for text in TEXTS]
    memory = Memory.from_defaults(token_limit=50, memory_blocks=[CAGMemoryBlock(documents=long)])
    for turn in range(6):
        await memory.aput(ChatMessage(role="user", content=f"Question {turn}, and a few more words than needed"))
        await memory.aput(ChatMessage(role="assistant", content=f"Answer {turn}, and a few more words than needed"))
    got = await memory.aget()
    assert documents(got) == ["\n\n".join(long).strip()], "one document: they are encoded together"
    assert got[0].role == MessageRole.SYSTEM
    assert got[-1].content.startswith("Answer 5")
    block = CAGMemoryBlock(documents=nodes())
    assert CAGMemoryBlock.model_validate_json(block.model_dump_json()) == block
    assert block.documents == TEXTS


def test_documents_in_memory_are_cached_behind_the_agents_own_system_message(tiny_engine: HFEngine) -> None:
    llm = KVCacheLLM(engine=tiny_engine, max_new_tokens=4)
    memory = Memory.from_defaults(memory_blocks=[CAGMemoryBlock(documents=nodes())])
    for cached in (False, True):
        agent = [ChatMessage(role="system", content=SYSTEM), *memory.get(), ChatMessage(content="How tall?")]
        context = llm.chat(agent).raw["usage"]["context"]
        assert (context["encoded_tokens"] == 0) is cached
        assert context["mode"] != "merged", "documents that do not change are exact by default"
    assert len(documents_in(llm.memory.store)) == 1, "encoded together, in their order"
    assert CAGMemoryBlock(documents=[], name="none").priority == 0


async def test_an_agent_reads_its_documents_as_memory() -> None:
    agent = FunctionAgent(llm=KVCacheLLM(engine=EchoEngine(whole_prompt)), system_prompt=SYSTEM)
    memory = Memory.from_defaults(memory_blocks=[CAGMemoryBlock(documents=nodes())])
    said = squeezed((await agent.run("How tall?", memory=memory)).response.content)
    assert said.startswith(f"system: {SYSTEM} Answer from the documents below. {TEXTS[0]}")
    assert said.endswith("user: How tall?")
    assert all(text in said for text in TEXTS)
