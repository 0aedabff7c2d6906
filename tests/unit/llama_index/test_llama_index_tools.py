"""Tools and structured output: a grammar makes the structure, since the models are random."""

import asyncio
import json
from importlib.metadata import version

import pytest
from llama_index.core.agent.react import ReActChatFormatter, ReActOutputParser
from llama_index.core.agent.workflow import FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.tools import FunctionTool
from packaging.version import Version
from pydantic import BaseModel, Field

from kvcag import HFEngine
from kvcag.errors import InvalidInputError
from kvcag.llama_index import CAGSynthesizer, KVCacheLLM
from kvcag.testing import EchoEngine, byte_tokenizer, tiny_model
from tests.stored import documents_in

pytest.importorskip("llguidance")

# `workflows`, which runs the agents, reads every attribute of a pydantic object, deprecated ones too, and core's agents
# ask it what it deprecates
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


def shout(text: str) -> str:
    """Say it loud."""
    return text.upper()


ADD, SHOUT = FunctionTool.from_defaults(add), FunctionTool.from_defaults(shout)


class Tower(BaseModel):
    """A tower."""

    name: str = Field(max_length=8)
    metres: int = Field(ge=0, le=9999)


@pytest.fixture
def llm(tiny_engine: HFEngine) -> KVCacheLLM:
    """A random model, whose answers have no structure except that of the grammar."""
    return KVCacheLLM(engine=tiny_engine, max_new_tokens=150)


def calling(text: str) -> KVCacheLLM:
    """An LLM that gives this answer first, and then repeats its last message."""
    said = iter([text])
    return KVCacheLLM(engine=EchoEngine(lambda prompt: next(said, "It is done.")))


@pytest.mark.parametrize("choice", [{"tool_required": True}, {"tool_choice": "add"}, {"tool_choice": "required"}])
async def test_a_required_call_is_made_however_it_is_asked_for(llm: KVCacheLLM, choice: dict[str, object]) -> None:
    history = [ChatMessage(content="Two and two?")]
    *_, streamed = llm.stream_chat_with_tools([ADD], chat_history=history, **choice)
    *_, astreamed = [r async for r in await llm.astream_chat_with_tools([ADD], chat_history=history, **choice)]
    responses = [
        llm.chat_with_tools([ADD], chat_history=history, **choice),
        await llm.achat_with_tools([ADD], chat_history=history, **choice),
        streamed,
        astreamed,
    ]
    for response in responses:
        (call,) = llm.get_tool_calls_from_response(response)
        assert call.tool_name == "add"
        assert all(isinstance(call.tool_kwargs[name], int) for name in "ab")
        assert response.raw["finish_reason"] == "tool_calls"
    assert len({json.dumps(llm.get_tool_calls_from_response(response)[0].tool_kwargs) for response in responses}) == 1


def test_the_choice_decides_which_tool(llm: KVCacheLLM) -> None:
    for tool in (ADD, SHOUT):
        choice = {"type": "function", "function": {"name": tool.metadata.name}}
        response = llm.chat_with_tools([ADD, SHOUT], "Go", tool_choice=choice)
        assert [call.tool_name for call in llm.get_tool_calls_from_response(response)] == [tool.metadata.name]
    with pytest.raises(InvalidInputError, match="subtract"):
        llm.chat_with_tools([ADD], "Go", tool_choice="subtract")
    with pytest.raises(InvalidInputError, match="neither auto, any, none nor a tool's name"):
        llm.chat_with_tools([ADD], "Go", tool_choice={"type": "function"})


def test_predict_and_call_calls(llm: KVCacheLLM) -> None:
    answer = llm.predict_and_call([ADD], "Two and two?", tool_required=True)
    (source,) = answer.sources
    assert answer.response == str(source.raw_output) == str(sum(source.raw_input["kwargs"].values()))


@pytest.mark.skipif(
    Version(version("llama-index-core")) < Version("0.14.25"), reason="core's own loop loses the arguments there"
)
async def test_apredict_and_call_calls(llm: KVCacheLLM) -> None:
    answer = await llm.apredict_and_call([SHOUT], "Hi", tool_required=True)
    assert answer.response == answer.sources[0].raw_input["kwargs"]["text"].upper()


@pytest.mark.parametrize("asynchronous", [True, False])
async def test_predict_and_call_reads_a_react_step_where_it_is_given_a_parser_of_one(asynchronous: bool) -> None:
    llm = calling('Thought: I have to add.\nAction: add\nAction Input: {"a": 1, "b": 2}\n')
    react = {"react_chat_formatter": ReActChatFormatter.from_defaults(), "output_parser": ReActOutputParser()}
    if asynchronous:
        answer = await llm.apredict_and_call([ADD], "One and two?", **react)
    else:
        answer = await asyncio.to_thread(llm.predict_and_call, [ADD], "One and two?", **react)
    assert (answer.response, answer.sources[0].raw_output) == ("3", 3)


def test_without_a_call_there_is_text() -> None:
    llm = calling("Four.")
    response = llm.chat_with_tools([ADD], "Two and two?", tool_choice="none")
    assert response.message.content == "Four."
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(InvalidInputError, match="called no tool"):
        llm.get_tool_calls_from_response(response)


def test_structured_prediction_is_an_object_of_the_class(llm: KVCacheLLM) -> None:
    prompt = PromptTemplate("Describe {what}.")
    assert isinstance(llm.structured_predict(Tower, prompt, what="a tower"), Tower)
    *_, last = llm.stream_structured_predict(Tower, prompt, what="a tower")
    assert Tower.model_validate(last.model_dump()) == llm.structured_predict(Tower, prompt, what="a tower")


async def test_structured_prediction_is_the_same_asynchronously(llm: KVCacheLLM) -> None:
    prompt = PromptTemplate("Describe {what}.")
    expected = llm.structured_predict(Tower, prompt, what="a tower")
    assert await llm.astructured_predict(Tower, prompt, what="a tower") == expected
    *_, last = [each async for each in await llm.astream_structured_predict(Tower, prompt, what="a tower")]
    assert Tower.model_validate(last.model_dump()) == expected


def test_a_structured_llm_passes_settings_on(llm: KVCacheLLM) -> None:
    structured = llm.as_structured_llm(Tower)
    response = structured.chat([ChatMessage(content="A tower.")], max_new_tokens=120)
    assert Tower.model_validate_json(response.message.content) == response.raw
    with pytest.raises(InvalidInputError, match="tempo"):
        structured.chat([ChatMessage(content="A tower.")], tempo=1)


@pytest.mark.parametrize("wrapped", [True, False])
async def test_structured_answers_over_documents_use_their_caches(llm: KVCacheLLM, wrapped: bool) -> None:
    found = [NodeWithScore(node=TextNode(text=text)) for text in ("Eiffel {x}: 330 metres.", "CN Tower: 553 metres.")]
    synthesizer: BaseSynthesizer = (
        CAGSynthesizer(llm.as_structured_llm(Tower)) if wrapped else CAGSynthesizer(llm, output_cls=Tower)
    )
    first = synthesizer.synthesize("Which?", found)
    assert isinstance(first.response, Tower)
    kept = documents_in(llm.memory.store)
    assert len(kept) == 2
    assert (await synthesizer.asynthesize("Which?", found)).response == first.response
    assert documents_in(llm.memory.store) == kept


async def test_a_function_agent_makes_a_round_trip() -> None:
    llm = calling('{"name": "add", "arguments": {"a":20,"b":3}}')
    agent = FunctionAgent(tools=[ADD], llm=llm, initial_tool_choice="add", streaming=True)
    handler = agent.run("What is 20 + 3?")
    results = [event async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
    answer = await handler
    assert [result.tool_name for result in results] == ["add"]
    assert results[0].tool_output.raw_output == 23
    assert answer.response.content == "It is done."
    assert not any(isinstance(block, ToolCallBlock) for block in answer.response.blocks)


async def test_a_react_agent_runs() -> None:
    steps = iter(
        [
            'Thought: I add.\nAction: add\nAction Input: {"a": 20, "b": 3}\n',
            "Thought: I can answer without using any more tools.\nAnswer: 23\n",
        ]
    )
    agent = ReActAgent(tools=[ADD], llm=KVCacheLLM(engine=EchoEngine(lambda prompt: next(steps))))
    assert str(await agent.run("What is 20 + 3?")) == "23"


def test_a_model_that_cannot_call_tools_reports_it() -> None:
    llm = KVCacheLLM(engine=HFEngine(tiny_model(), byte_tokenizer(chat_template=None)))
    assert not llm.metadata.is_function_calling_model
    assert KVCacheLLM(engine=EchoEngine()).metadata.is_function_calling_model


async def test_the_prompts_of_an_agent_are_the_same_in_every_run_and_name_the_tool() -> None:
    async def prompts() -> list[str]:
        llm = calling('{"name": "add", "arguments": {"a":20,"b":3}}')
        await FunctionAgent(tools=[ADD], llm=llm).run("What is 20 + 3?")
        return [str(llm.engine.template.tokenizer.decode(list(token_ids))) for _, token_ids in llm.engine.prompts]

    first = await prompts()
    assert first == await prompts()
    assert '{"name": "add", "result": "23"}' in first[-1]


async def test_streamed_structured_output_gives_partial_objects(llm: KVCacheLLM) -> None:
    prompt = PromptTemplate("Describe {what}.")
    whole = llm.structured_predict(Tower, prompt, what="a tower")
    streamed = list(llm.stream_structured_predict(Tower, prompt, what="a tower"))
    astreamed = [each async for each in await llm.astream_structured_predict(Tower, prompt, what="a tower")]
    structured = llm.as_structured_llm(Tower)
    by_structured_llm = [each.raw for each in structured.stream_chat([ChatMessage(content="Describe a tower.")])]
    for objects in (streamed, astreamed, by_structured_llm):
        names = [partial.name for partial in objects if partial.name]
        assert len(names) > 2
        assert all(whole.name.startswith(name) for name in names)
        assert Tower.model_validate(objects[-1].model_dump()) == whole


def test_a_tool_call_is_streamed_as_it_is_written() -> None:
    llm = calling('{"name": "shout", "arguments": {"text":"a b c"}}')
    responses = list(llm.stream_chat_with_tools([SHOUT], "Go"))
    calls = [block for response in responses for block in response.message.blocks if isinstance(block, ToolCallBlock)]
    assert {call.tool_name for call in calls} == {"shout"}
    assert [call.tool_kwargs.get("text", "") for call in calls][:5] == ["", "", "a", "a ", "a b"]
    assert calls[-1].tool_kwargs == {"text": "a b c"}
    assert len({call.tool_call_id for call in calls}) == 1
    assert responses[-1].raw["finish_reason"] == "tool_calls"
