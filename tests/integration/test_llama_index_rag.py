"""LlamaIndex over real weights: exact prefixes, facts found, structure from a grammar, and the example."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path

import pytest
import torch
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import CacheControl, CachePoint, ChatMessage, TextBlock
from llama_index.core.schema import TextNode
from llama_index.core.tools import FunctionTool
from llama_index.retrievers.bm25 import BM25Retriever
from pydantic import BaseModel, Field

from kvcag import HFEngine
from kvcag.llama_index import CAGQueryEngine, CAGSynthesizer, KVCacheLLM
from kvcag.llama_index.messages import to_messages
from kvcag.stores.memory import MemoryStore
from tests.waits import awaited

EXAMPLE = Path(__file__).parents[2] / "examples" / "llama_index_rag_to_cag.py"
TEXTS = [
    "The Eiffel tower is 330 metres tall. It was completed in 1889.",
    "The Golden Gate bridge was opened in 1937. It is painted orange.",
    "The Danube flows through Vienna and Budapest into the Black Sea.",
]


def nodes() -> list[TextNode]:
    return [TextNode(text=text, id_=str(index)) for index, text in enumerate(TEXTS)]


@torch.no_grad()
def uncached(engine: HFEngine, token_ids: tuple[int, ...], length: int) -> str:
    """What the bare model says, greedy, without any cache of ours."""
    ids = torch.tensor([token_ids])
    out = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=0
    )
    return str(engine.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_over_a_cache_point_every_answer_is_the_uncached_models(smollm2_engine: HFEngine) -> None:
    llm = KVCacheLLM(engine=smollm2_engine, max_new_tokens=16)
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    for turn, question in enumerate(("How tall is the tower?", "When was the bridge opened?")):
        blocks = [TextBlock(text=" ".join(TEXTS)), point, TextBlock(text=question)]
        answer = llm.chat([ChatMessage(blocks=blocks)])
        prompt = smollm2_engine.template.prompt(to_messages([ChatMessage(blocks=blocks)]))
        assert answer.message.content == uncached(smollm2_engine, prompt.token_ids, 16)
        usage = answer.raw["usage"]
        assert usage["prompt_tokens"] == len(prompt.token_ids)
        assert usage["prompt_tokens"] - usage["cached_tokens"] == len(prompt.tail_ids if turn else prompt.token_ids)


async def test_facts_are_found_in_merged_documents_and_the_event_loop_ticks(smollm2_engine: HFEngine) -> None:
    llm = KVCacheLLM(engine=smollm2_engine, max_new_tokens=24)
    retriever = BM25Retriever.from_defaults(nodes=nodes(), similarity_top_k=2)
    engine = CAGQueryEngine.from_retriever(retriever, llm)
    asked = asyncio.create_task(awaited(engine.aquery("How tall is the Eiffel tower?"), 120))
    ticks = 0
    while not asked.done():
        await asyncio.sleep(0.001)
        ticks += 1
    answer = await asked
    assert "330" in str(answer)
    assert ticks > 24
    assert str(engine.query("How tall is the Eiffel tower?")) == str(answer)


class Building(BaseModel):
    """A building."""

    name: str = Field(max_length=12)
    year: int = Field(ge=1000, le=2100)


def test_structured_answers_come_from_cached_documents(smollm2_engine: HFEngine) -> None:
    llm = KVCacheLLM(engine=smollm2_engine, store=MemoryStore(), max_new_tokens=64)
    engine = CAGQueryEngine.from_documents(nodes(), llm, output_cls=Building, exact=False)
    answer = engine.query("When was the tower completed?")
    assert isinstance(answer.response, Building)
    kept = set(llm.memory.store.keys())
    assert len(kept) == len(TEXTS)
    engine.query("When was the bridge opened?")
    assert set(llm.memory.store.keys()) == kept


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # `workflows` reads deprecated attributes of pydantic objects
async def test_a_function_agent_makes_a_round_trip_when_the_call_is_forced(smollm2_engine: HFEngine) -> None:
    """The model, having seen one call, repeats it for ever; after two the agent asks for words."""

    def multiply(a: int, b: int) -> int:
        """Multiply two integers."""
        return a * b

    llm = KVCacheLLM(engine=smollm2_engine, max_new_tokens=32)
    agent = FunctionAgent(
        tools=[FunctionTool.from_defaults(multiply)],
        llm=llm,
        initial_tool_choice="multiply",
        allow_parallel_tool_calls=False,
    )
    handler = agent.run("What is 6 times 7?", max_iterations=2, early_stopping_method="generate")
    results = [event async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
    answer = await handler
    assert results[0].tool_name == "multiply"
    assert results[0].tool_output.raw_output == results[0].tool_kwargs["a"] * results[0].tool_kwargs["b"]
    assert answer.response.content


def test_merged_answers_stay_close_to_a_full_prefill_of_the_same_ids(smollm2_engine: HFEngine) -> None:
    llm = KVCacheLLM(engine=smollm2_engine, max_new_tokens=8, merge_strategy="full")
    messages = CAGSynthesizer(llm).messages("How tall is the tower?", TEXTS)
    prompt = smollm2_engine.template.prompt(to_messages(messages))
    assert llm.chat(messages).message.content == uncached(smollm2_engine, prompt.token_ids, 8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the RAG half's package
def test_the_example_runs_before_and_after(smollm2_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLE))
    example["DOCUMENTS"][:] = [document for document in example["DOCUMENTS"] if len(document.text) < 1500][:4]
    question = example["QUESTIONS"][0]
    answers = [example["ask"](example[name](str(smollm2_path), 4), question) for name in ("before", "after")]
    sources = [[node.node_id for node in answer.source_nodes] for answer in answers]
    assert sources[0] == sources[1]
    assert all(answer.response_txt for answer in answers)
