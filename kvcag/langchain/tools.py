"""Tools and structured output: from the arguments of a call to a constraint of the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from kvcag.chat_template import ChatTemplate, Message
from kvcag.engines.constrain import ConstraintLike, Grammar, JsonSchema, close_objects
from kvcag.errors import InvalidInputError
from kvcag.tools import ToolSpec, tool_messages, tool_spec

_ANY = {"any", "required"}


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation as the model will see it, and the constraint of its answer."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    constraint: ConstraintLike | None
    plan: ToolSpec | None


def ask(template: ChatTemplate, messages: Sequence[Message], given: Mapping[str, Any]) -> Asked:
    """Prepare messages with what is bound in `tools`, `tool_choice`, `parallel_tool_calls` and `response_format`."""
    tools = given.get("tools") or []
    choice = choice_of(given.get("tool_choice"), [tool["function"]["name"] for tool in tools])
    parallel = given.get("parallel_tool_calls")
    plan = tool_spec(template, tools, choice, parallel=choice == "auto" if parallel is None else parallel)
    schema = schema_of(given.get("response_format"))
    answer = None if schema is None else JsonSchema(schema, closed=True)
    if plan is None:
        return Asked(tool_messages(template, messages), None, answer, None)
    constraint = plan.constraint if answer is None or plan.forced else _calls_or(answer, plan)
    return Asked(plan.messages(messages), plan.tools, constraint, plan)


def choice_of(tool_choice: Any, names: Sequence[str]) -> str:
    """`auto`, `any`, `none` or a tool's name, from any form that LangChain's models accept.

    True is `any`; False and None are `auto`; a dict is OpenAI's or Anthropic's.

    Raises:
        InvalidInputError: there is no such tool.
    """
    if isinstance(tool_choice, Mapping):
        named = tool_choice.get("function", tool_choice).get("name")
        tool_choice = named or tool_choice.get("type")
    if tool_choice in (None, False):
        return "auto"
    if tool_choice is True or (tool_choice in _ANY and tool_choice not in names):
        return "any"
    if tool_choice in ("auto", "none") or tool_choice in names:
        return str(tool_choice)
    known = ", ".join(names) or "none: no tools are bound"
    raise InvalidInputError(
        f"tool_choice {tool_choice!r} is neither auto, any, none nor a tool's name. Tools: {known}."
    )


def schema_of(response_format: Any) -> dict[str, Any] | None:
    """The JSON schema of OpenAI's `response_format`; None where the answer is free text.

    Raises:
        InvalidInputError: it has an unknown form.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object", **response_format.get("schema", {})}
    schema = response_format.get("json_schema", {}).get("schema") if kind == "json_schema" else None
    if not isinstance(schema, Mapping):
        raise InvalidInputError(
            f"response_format {str(response_format)[:80]!r} has an unknown form: pass {{'type': 'json_schema', "
            "'json_schema': {'name': …, 'schema': …}}, {'type': 'json_object'}, or use with_structured_output(schema)."
        )
    return dict(schema)


def response_format(schema: Any, method: str) -> dict[str, Any]:
    """OpenAI's `response_format` for a pydantic model, a TypedDict or a JSON schema."""
    if method == "json_mode" and schema is None:
        return {"type": "json_object"}
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        shown: Mapping[str, Any] = schema.model_json_schema()
    elif isinstance(schema, Mapping) and ("properties" in schema or "$ref" in schema or "anyOf" in schema):
        shown = schema
    else:
        shown = convert_to_json_schema(schema)
    if method == "json_mode":
        return {"type": "json_object", "schema": dict(shown)}
    return {"type": "json_schema", "json_schema": {"name": shown.get("title", "answer"), "schema": dict(shown)}}


def parsing(
    llm: Runnable[LanguageModelInput, Any], schema: Any, *, include_raw: bool
) -> Runnable[LanguageModelInput, Any]:
    """The model's JSON as an object of the schema: an instance of a pydantic model, else a dict."""
    is_model = isinstance(schema, type) and is_basemodel_subclass(schema)
    parser: Any = PydanticOutputParser(pydantic_object=schema) if is_model else JsonOutputParser()
    if not include_raw:
        whole: Runnable[LanguageModelInput, Any] = llm | parser
        return whole
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    parsed_or_not: Runnable[Any, Any] = parsed.with_fallbacks([failed], exception_key="parsing_error")
    return RunnableMap(raw=llm) | parsed_or_not


def _calls_or(answer: JsonSchema, plan: ToolSpec) -> Grammar:
    """A grammar of tool calls, or of an answer under a schema."""
    calls = replace(plan, forced=True).constraint.lark.removeprefix("start:")
    schema = {**close_objects(answer.schema), "x-guidance": {"whitespace_flexible": False}}
    return Grammar(f"start: answer | calls\ncalls:{calls}\nanswer: %json {json.dumps(schema, ensure_ascii=False)}")
