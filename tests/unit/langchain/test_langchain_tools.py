from __future__ import annotations

from typing import Annotated, Any, Literal

import jsonschema
import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, ConfigDict, Field
from pydantic.v1 import BaseModel as BaseModelV1
from typing_extensions import TypedDict

from kvcag import HFEngine
from kvcag.adapters import choice_of
from kvcag.core import Chunk, Usage
from kvcag.errors import ConstraintBudgetError, InvalidInputError
from kvcag.langchain import ChatKVCAG
from kvcag.langchain.messages import generation_chunks
from kvcag.testing import EchoEngine
from kvcag.tools import tool_spec


class Place(BaseModel):
    """A place."""

    city: Literal["Zürich", "東京"]
    days: int = Field(ge=1, le=7)


class Unwritable(BaseModel):
    """A type that no JSON schema can describe."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    engine: HFEngine


class PlaceV1(BaseModelV1):
    """A place."""

    city: str
    days: int


class PlaceDict(TypedDict):
    """A place."""

    city: Annotated[str, ..., "which city"]
    days: int


@tool
def travel(place: Place, note: str | int | None) -> str:
    """Travel somewhere."""
    return f"went to {place.city} for {place.days} days"


@tool
def stay() -> str:
    """Stay here."""
    return "stayed"


@pytest.fixture
def llm(tiny_engine: HFEngine) -> ChatKVCAG:
    """A model with random weights, so that only the grammar can make its answers valid."""
    return ChatKVCAG(engine=tiny_engine, max_tokens=150, temperature=1.0, seed=3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "auto"),
        (False, "auto"),
        (True, "any"),
        ("auto", "auto"),
        ("any", "any"),
        ("required", "any"),
        ("none", "none"),
        ("stay", "stay"),
        ({"type": "function", "function": {"name": "stay"}}, "stay"),
        ({"type": "tool", "name": "stay"}, "stay"),
        ({"type": "any"}, "any"),
    ],
)
def test_every_way_to_choose_a_tool(given: Any, expected: str) -> None:
    assert choice_of(given, ["travel", "stay"]) == expected


@pytest.mark.parametrize("choice", ["sleep", {"type": "function", "function": {"name": "sleep"}}])
def test_an_unknown_tool_is_refused_when_it_is_bound(llm: ChatKVCAG, choice: Any) -> None:
    with pytest.raises(ValueError, match=r"tool_choice 'sleep' is neither.*Tools: travel, stay"):
        llm.bind_tools([travel, stay], tool_choice=choice)


@pytest.mark.parametrize("seed", range(5))
def test_forced_arguments_always_follow_the_schema(llm: ChatKVCAG, seed: int) -> None:
    """Enumerations, bounds, `anyOf`, `$ref` and non-ASCII text."""
    answer = llm.bind_tools([travel], tool_choice="any").invoke("Where to?", seed=seed)
    [call] = answer.tool_calls
    jsonschema.validate(call["args"], travel.args_schema.model_json_schema())
    assert isinstance(travel.invoke(call), ToolMessage)
    assert (answer.text, answer.response_metadata["finish_reason"]) == ("", "tool_calls")


async def test_a_call_is_the_same_streamed_or_not_and_a_name_is_that_tool(llm: ChatKVCAG) -> None:
    bound = llm.bind_tools([travel, stay], tool_choice="stay")
    streamed = [chunk async for chunk in bound.astream("Where to?")]
    whole = streamed[0].__add__(streamed[1:])
    for message in (bound.invoke("Where to?"), await bound.ainvoke("Where to?"), whole):
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [("stay", {})]


@pytest.mark.parametrize("seed", range(3))
async def test_arguments_stream_as_they_are_written(llm: ChatKVCAG, seed: int) -> None:
    """Regression: the arguments arrived complete, with the last chunk."""
    bound = llm.bind_tools([travel, stay], tool_choice="travel")
    streamed = [chunk async for chunk in bound.astream("Where to?", seed=seed)]
    whole = streamed[0].__add__(streamed[1:])
    said = bound.invoke("Where to?", seed=seed)
    for message in (whole, said):
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [
            (call["name"], call["args"]) for call in said.tool_calls
        ]
        assert all(call["id"] for call in message.tool_calls + message.invalid_tool_calls)
    pieces = [piece for chunk in streamed for piece in chunk.tool_call_chunks]
    calls = {piece["index"]: [one for one in pieces if one["index"] == piece["index"]] for piece in pieces}
    for first, *rest in calls.values():
        assert first["name"] == "travel"
        assert first["id"]
        assert all(piece["name"] is None and piece["id"] is None for piece in rest)
    assert len(calls[0]) > 5


@pytest.mark.parametrize("tokens", range(45, 90, 3))
def test_a_call_that_is_cut_while_it_streams_is_never_completed(llm: ChatKVCAG, tokens: int) -> None:
    plan = tool_spec(llm.engine.template, [{"name": "travel", "parameters": {"type": "object"}}])
    written = '{"name": "travel", "arguments": {"note": "a \\"b\\\\", "place": [{"city": "{]"}, {"days": 1}]}}'

    def chunks() -> Any:
        for character in written[: tokens - 1]:
            yield Chunk(character)
        yield Chunk(written[tokens - 1], finish_reason="length", usage=Usage(1, 0, 0, 1, 0.0, 0.0))

    first, *rest = (chunk.message for chunk in generation_chunks(chunks(), "model", plan))
    message = first.__add__(rest)
    assert message.tool_calls == ([] if tokens < len(written) else [message.tool_calls[0]])
    assert len(message.invalid_tool_calls) == (tokens < len(written))


def test_no_tool_is_called_where_none_may_be() -> None:
    echo = ChatKVCAG(engine=EchoEngine(), max_tokens=200)
    written = '{"name": "stay", "arguments": {}}'
    assert echo.bind_tools([stay], tool_choice="none").invoke(written).text == written


@pytest.mark.parametrize(
    "written", ['{"name": "stay", "arguments": {"days": [1,', '{"name": "sleep", "arguments": {}}']
)
def test_a_call_that_was_cut_or_names_no_tool_is_invalid(llm: ChatKVCAG, written: str) -> None:
    plan = tool_spec(llm.engine.template, [{"name": "stay", "parameters": {"type": "object"}}])

    def chunks() -> Any:
        for character in written[:-1]:
            yield Chunk(character)
        yield Chunk(written[-1], finish_reason="length", usage=Usage(1, 0, 0, 1, 0.0, 0.0))

    first, *rest = (chunk.message for chunk in generation_chunks(chunks(), "model", plan))
    message = first.__add__(rest) if rest else first
    assert (message.tool_calls, message.text) == ([], "")
    [invalid] = message.invalid_tool_calls
    assert '{"days": [1,' in invalid["args"] or written in invalid["args"]
    assert "not JSON" in invalid["args"] or "no tool has the name 'sleep'" in invalid["args"]
    assert message.response_metadata["finish_reason"] == "length"


def test_a_tool_with_no_room_for_its_call_is_refused_before_any_work(llm: ChatKVCAG) -> None:
    with pytest.raises(ConstraintBudgetError, match="Raise max_new_tokens to at least"):
        llm.bind_tools([travel], tool_choice="any").invoke("Where to?", max_tokens=10)


def test_tokens_of_tools_are_counted(llm: ChatKVCAG) -> None:
    asked = [HumanMessage("Where to?")]
    used = llm.bind_tools([stay], tool_choice="any").invoke(asked).usage_metadata["input_tokens"]
    assert llm.get_num_tokens_from_messages(asked) < llm.get_num_tokens_from_messages(asked, tools=[stay])
    assert llm.get_num_tokens_from_messages(asked, tools=[stay]) >= used


def test_histories_with_calls_and_results_are_shown(llm: ChatKVCAG) -> None:
    call = {"name": "stay", "args": {}, "id": "c1", "type": "tool_call"}
    history = [
        SystemMessage("Be brief."),
        HumanMessage("Where to?"),
        AIMessage([{"type": "text", "text": "hm"}, {"type": "tool_use", "id": "c1"}], tool_calls=[call]),
        ToolMessage([{"type": "text", "text": "stayed"}], tool_call_id="c1", name="stay"),
        HumanMessage("And?"),
        HumanMessage("Well?"),
    ]
    seen = ChatKVCAG(engine=EchoEngine(lambda prompt: prompt), max_tokens=900)
    for model in (seen, seen.bind_tools([stay], tool_choice="none")):
        shown = model.invoke(history).text
        assert all(said in shown for said in ("Be brief.", '"name": "stay"', "stayed", "And?", "Well?"))
    assert llm.bind_tools([travel, stay], tool_choice="any").invoke(history).tool_calls


# --- structured output


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize(
    "schema", [Place, PlaceV1, PlaceDict, Place.model_json_schema()], ids=["v2", "v1", "typed", "json"]
)
@pytest.mark.filterwarnings("ignore:Core Pydantic V1")
def test_three_methods_and_four_kinds_of_schema(llm: ChatKVCAG, method: Any, schema: Any) -> None:
    structured = llm.with_structured_output(schema, method=method)
    answer = structured.invoke("Where to?")
    *_, streamed = structured.stream("Where to?")
    assert streamed == answer
    if isinstance(schema, type) and schema is not PlaceDict:
        assert isinstance(answer, schema)
        answer = answer.model_dump() if schema is Place else answer.dict()
    assert set(answer) == {"city", "days"}
    assert isinstance(answer["days"], int)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
async def test_the_raw_message_is_included(llm: ChatKVCAG, method: Any) -> None:
    answer = await llm.with_structured_output(Place, method=method, include_raw=True).ainvoke("Where to?")
    assert isinstance(answer["raw"], AIMessage)
    assert isinstance(answer["parsed"], Place)
    assert answer["parsing_error"] is None


def test_json_mode_without_a_schema_is_some_object(llm: ChatKVCAG) -> None:
    assert isinstance(llm.with_structured_output(method="json_mode").invoke("Anything."), dict)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_further_arguments_of_structured_output_reach_every_call(llm: ChatKVCAG, method: Any) -> None:
    """Regression: with `function_calling`, further arguments were dropped."""
    with pytest.raises(ConstraintBudgetError):
        llm.with_structured_output(Place, method=method, max_tokens=3).invoke("Where to?")


def test_structured_answers_read_from_the_cache(llm: ChatKVCAG) -> None:
    asked = [SystemMessage(["one document. ", "another. "]), HumanMessage("Where to?")]
    structured = llm.with_structured_output(Place, include_raw=True)
    structured.invoke(asked)
    warm = structured.invoke(asked)["raw"]
    assert warm.response_metadata["kvcag"]["encoded_tokens"] == 0


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda llm: llm.with_structured_output(Place, method="xml"), "unknown method 'xml'"),
        (lambda llm: llm.with_structured_output(), "needs a schema"),
        (lambda llm: llm.bind_tools([], response_format={"type": "xml"}), "response_format .* has an unknown form"),
        (lambda llm: llm.bind_tools([{"type": "web_search_preview"}]), "'web_search_preview' is a tool that runs on a"),
        (lambda llm: llm.bind_tools([{"some": "thing"}]), "is not a tool"),
        (lambda llm: llm.bind_tools([7]), "is not a tool"),
        (lambda llm: llm.bind_tools([Unwritable]), "is not a tool"),
        (lambda llm: llm.bind_tools([{"type": "function", "function": {"parameters": {}}}]), "is not a tool"),
        (lambda llm: llm.bind_tools([{"type": "function", "function": "stay"}]), "is not a tool: its function has no"),
        (lambda llm: llm.bind_tools(None), "tools is None: pass a list of tools"),
        (lambda llm: llm.bind_tools([stay], tool_choice={"function": "sleep"}), "'sleep' is neither"),
        (
            lambda llm: llm.bind(tools=[{"type": "web_search_preview"}]).invoke("?"),
            "'web_search_preview' is a tool that",
        ),
        (lambda llm: llm.bind_tools([], response_format={"type": "json_schema", "json_schema": 7}), "an unknown form"),
        (lambda llm: llm.bind_tools([], response_format={"type": "json_object", "schema": 7}), "has an unknown form"),
        (lambda llm: llm.bind_tools([stay], tempertaure=1), "unknown argument tempertaure"),
        (lambda llm: llm.with_structured_output(7), "is not a schema"),
        (lambda llm: llm.with_structured_output(Unwritable), "is not a schema"),
        (lambda llm: llm.with_structured_output(7, method="function_calling"), "is not a tool"),
        *(
            (lambda llm, m=method: llm.with_structured_output(Place, method=m, nonsense=1), "unknown argument nonsense")
            for method in ("json_schema", "function_calling", "json_mode")
        ),
    ],
)
def test_wrong_arguments_of_bind_are_refused(llm: ChatKVCAG, call: Any, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        call(llm)


def test_tools_may_be_bound_by_bind_alone(llm: ChatKVCAG) -> None:
    [call] = llm.bind(tools=[stay], tool_choice="any").invoke("Where to?").tool_calls
    assert call["name"] == "stay"


# --- agents


class FirstStay(AgentMiddleware[Any, Any, Any]):
    """Makes the agent stay in its first step, and then answer."""

    def wrap_model_call(self, request: ModelRequest[Any], handler: Any) -> Any:
        stayed = any(isinstance(message, ToolMessage) for message in request.messages)
        choice = "none" if stayed else "stay"
        if request.response_format is None:
            return handler(request.override(tool_choice=choice))
        return handler(request.override(model_settings={"tool_choice": choice}))  # not handed on with a format


def test_an_agent_calls_a_tool_and_gets_its_result(llm: ChatKVCAG) -> None:
    agent = create_agent(llm, [travel, stay], middleware=[FirstStay()])
    messages = agent.invoke({"messages": [HumanMessage("Where to?")]})["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert (messages[1].tool_calls[0]["name"], messages[2].content) == ("stay", "stayed")


@pytest.mark.parametrize("tools", [[], [stay]], ids=["without tools", "with tools"])
def test_an_agent_answers_in_the_models_own_structured_format(llm: ChatKVCAG, tools: list[Any]) -> None:
    middleware = [FirstStay()] if tools else []
    agent = create_agent(llm, tools, response_format=Place, middleware=middleware)
    state = agent.invoke({"messages": [HumanMessage("Where to?")]})
    assert isinstance(state["structured_response"], Place)
    assert len(state["messages"]) == (4 if tools else 2)


def test_an_agent_answers_by_a_tool_where_that_is_the_strategy(llm: ChatKVCAG) -> None:
    agent = create_agent(llm, [], response_format=ToolStrategy(Place))
    assert isinstance(agent.invoke({"messages": [HumanMessage("Where to?")]})["structured_response"], Place)


@pytest.mark.parametrize("seed", range(6))
def test_with_tools_and_a_format_an_answer_is_a_call_or_in_the_format(llm: ChatKVCAG, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": Place.model_json_schema()}}
    answer = llm.bind_tools([stay], response_format=form).invoke("Where to?", seed=seed)
    if answer.tool_calls:
        assert {call["name"] for call in answer.tool_calls} == {"stay"}
    else:
        Place.model_validate_json(answer.text)
        assert answer.response_metadata["finish_reason"] == "stop"


def test_the_profile_says_so(llm: ChatKVCAG) -> None:
    assert llm.profile["tool_calling"]
    assert llm.profile["structured_output"]
    assert not llm.profile["image_inputs"]
