"""Tool calls: offered in a chat template's own format, enforced by a grammar, and parsed from the answer.

The format is read from the chat template: a probe call is rendered, and the rendered text shows how the model writes
calls (`<tool_call>` for Hermes and Qwen, bare JSON for Llama 3, `[TOOL_CALLS]` for Mistral). If the template does not
render tools, or renders calls that are not JSON, an instruction in the system message lists the tools, and a call is
`{"name": …, "arguments": {…}}`.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2.exceptions import TemplateError

from kvcag.chat_template import ChatTemplate, Document, Message
from kvcag.engines.constrain import Grammar, JsonSchema, lark_json, lark_literal
from kvcag.engines.decode import overlap
from kvcag.errors import InvalidInputError, KVCAGError


def _new_id() -> str:
    """Return a random id of nine letters and digits, as Mistral's template requires."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(9))


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call: its name, its description, and a JSON schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @classmethod
    def of(cls, tool: Mapping[str, Any]) -> Tool:
        """Read a tool from a dict in OpenAI's form, or from its `function` part only.

        Raises:
            InvalidInputError: the tool has no name, or its parameters are not a JSON schema of an object.
        """
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise InvalidInputError(f"a tool must be a mapping with name, description and parameters, not {tool!r:.80}")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise InvalidInputError(f"the parameters of tool {name!r} must be a JSON schema of an object")
        return cls(name, str(function.get("description") or ""), parameters)

    @property
    def shown(self) -> dict[str, Any]:
        """The tool in the form that chat templates expect, which is OpenAI's."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a known tool. The constraint ensures that the arguments satisfy the tool's schema."""

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=_new_id)


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """A call that was cut off, is not JSON, or names no known tool.

    Attributes:
        text: the call as the model wrote it.
        error: what is wrong with the call.
        id: a new id.
        name: the tool's name; None if it could not be read.
    """

    text: str
    error: str
    id: str = field(default_factory=_new_id)
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Parsed:
    """An answer: its text without calls, its valid calls, and its invalid calls."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    invalid_calls: tuple[InvalidToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a model writes calls: `opening`, calls with `separator` between them, `closing`.

    Attributes:
        opening: the text before the first call.
        closing: the text after the last call.
        separator: the text between two calls; None if the format allows one call only.
        before_name, before_arguments, after_arguments: the parts of a call around its name and its arguments.
        marker_id: the special token that starts the calls, if there is one. It is not part of `opening`.
    """

    opening: str = ""
    closing: str = ""
    separator: str | None = "\n"
    before_name: str = '{"name": '
    before_arguments: str = ', "arguments": '
    after_arguments: str = "}"
    marker_id: int | None = None

    @property
    def marker(self) -> str:
        """The text that begins every group of calls; empty if a call is bare JSON."""
        return self.opening.strip() if self.opening.strip(" \n[") else ""

    @property
    def keys(self) -> tuple[str, str]:
        """The JSON keys of the name and of the arguments."""
        name, arguments = re.findall(r'"(\w+)"\s*:', self.before_name + self.before_arguments)[-2:]
        return name, arguments

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return the text of one call."""
        written = json.dumps(arguments, ensure_ascii=False)
        return f"{self.before_name}{json.dumps(name)}{self.before_arguments}{written}{self.after_arguments}"


_PLAIN = CallFormat()
"""The format for templates that render no tools, or render calls that are not JSON."""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """How a conversation with tools is prompted, constrained and parsed. Made by `tool_spec`.

    Attributes:
        template: the model's chat template.
        offered: every tool.
        callable: the tools that the choice allows.
        forced: the answer is one or more calls and nothing else.
        parallel: the answer may have several calls.
        format: how calls are written.
    """

    template: ChatTemplate
    offered: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    forced: bool
    parallel: bool
    format: CallFormat

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The tools for the template; None if the template renders none, and `messages` lists them."""
        return None if self.format is _PLAIN else [tool.shown for tool in self.offered]

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages that the template can render, with an instruction if the template renders no tools."""
        shown = tool_messages(self.template, messages)
        if self.format is not _PLAIN:
            return shown
        system: Message = {"role": "system", "content": ""}
        if shown and shown[0]["role"] == "system":
            system, *shown = shown
        content = system.get("content") or ""
        instruction = ("\n\n" if content else "") + self._instruction
        added: Any = content + instruction if isinstance(content, str) else [*content, instruction]
        return [{**system, "content": added}, *shown]

    @property
    def constraint(self) -> Grammar:
        """A grammar that allows only calls if they are forced; else text, or valid calls."""
        return Grammar("\n".join(self._rules()))

    def parse(self, text: str) -> Parsed:
        """Read the text and the calls of an answer."""
        if self.format.marker:
            return self._parse_marked(text)
        if self.forced or re.match(r"\s*\[?\s*\{", text):
            calls, invalid = self._calls(text.lstrip())
            return Parsed("", tuple(calls), tuple(invalid))
        return Parsed(text)

    def parser(self) -> CallParser:
        """Return a parser for an answer that arrives in pieces."""
        return CallParser(self)

    @property
    def _instruction(self) -> str:
        tools = "\n".join(json.dumps(tool.shown["function"], ensure_ascii=False) for tool in self.offered)
        several = " Several calls stand on lines of their own." if self.parallel else ""
        return (
            f"These tools can be called:\n{tools}\nTo call one, answer with nothing but JSON: "
            f'{{"name": the tool\'s name, "arguments": {{its arguments}}}}.{several}'
        )

    def _rules(self) -> list[str]:
        """Return the grammar's rules, `start` first."""
        form, tools = self.format, list(enumerate(self.callable))
        rules = ["call: " + " | ".join(f"call_{index}" for index, _ in tools)]
        for index, tool in tools:
            before = lark_literal(f"{form.before_name}{json.dumps(tool.name)}{form.before_arguments}")
            schema = lark_json(JsonSchema({"type": "object", **tool.parameters}, closed=True))
            rules.append(f"call_{index}: {before} {schema} {lark_literal(form.after_arguments)}")
        calls = "call"
        if self.parallel and form.separator is not None:
            calls += f" ({lark_literal(form.separator)} call)*"
        if form.closing:
            calls += f" {lark_literal(form.closing)}"
        if form.marker and not self.forced:
            rest = form.opening.removeprefix(form.marker)
            marker = re.escape(form.marker).replace("/", "\\/")
            return [
                "start: calls* text",
                f"calls: before {lark_literal(rest) if rest else ''} {calls}",
                f"before[lazy]: /(.|\\n)*{marker}/",
                "text: /(.|\\n)*/",
                *rules,
            ]
        opening = f"<[{form.marker_id}]> " if form.marker_id is not None else ""
        opening += f"{lark_literal(form.opening)} " if form.opening else ""
        if self.forced:
            return [f"start: {opening}{calls}", *rules]
        # Without a marker, an answer that does not begin with `{` is text.
        return ["start: text | calls", "text: /([^{\\s](.|\\n)*)?/", f"calls: {opening}{calls}", *rules]

    def _parse_marked(self, text: str) -> Parsed:
        opening, closing = re.escape(self.format.marker), re.escape(self.format.closing.strip())
        calls, invalid, prose, at = list[ToolCall](), list[InvalidToolCall](), "", 0
        for found in re.finditer(f"(?s){opening}(.*?)(?:{closing}|$)" if closing else f"(?s){opening}(.*?)$", text):
            prose += text[at : found.start()]
            at = found.end()
            some, wrong = self._calls(found[1].strip())
            calls += some
            invalid += wrong
        content = (prose + text[at:]).rstrip() if at else text
        return Parsed(content, tuple(calls), tuple(invalid))

    def _calls(self, text: str) -> tuple[list[ToolCall], list[InvalidToolCall]]:
        """Return the valid and the invalid calls in a text, with any text between them."""
        calls, invalid, at = list[ToolCall](), list[InvalidToolCall](), 0
        while (start := text.find("{", at)) >= 0:
            try:
                value, at = json.JSONDecoder().raw_decode(text, start)
            except json.JSONDecodeError as error:
                named = re.search(rf'"{self.format.keys[0]}"\s*:\s*"([^"]+)"', text[start:])
                invalid.append(InvalidToolCall(text[start:], f"not JSON: {error}", name=named[1] if named else None))
                return calls, invalid
            call = self._call(value, text[start:at])
            if isinstance(call, ToolCall):
                calls.append(call)
            else:
                invalid.append(call)
        if not calls and not invalid:
            invalid.append(InvalidToolCall(text, "it has no JSON object"))
        return calls, invalid

    def _call(self, value: dict[str, Any], text: str) -> ToolCall | InvalidToolCall:
        name_key, arguments_key = self.format.keys
        name, arguments = value.get(name_key), value.get(arguments_key, {})
        known = [tool.name for tool in self.offered]
        if not isinstance(name, str) or name not in known:
            error = f"no tool has the name {name!r}; the tools are {', '.join(known)}"
            return InvalidToolCall(text, error, name=name if isinstance(name, str) else None)
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError as malformed:
                return InvalidToolCall(text, f"its arguments are not JSON: {malformed}", name=name)
        if not isinstance(arguments, dict):
            return InvalidToolCall(text, "its arguments are not a JSON object", name=name)
        return ToolCall(name, arguments)


class CallParser:
    """Parses an answer that arrives in pieces: output the result of each `push`, then call `close` and output `rest`.

    Attributes:
        rest: after `close`, the end of the content that `push` held back.
    """

    def __init__(self, spec: ToolSpec) -> None:
        self._spec = spec
        self._text = ""
        self._given = 0
        self.rest = ""

    def push(self, text: str) -> str:
        """Add a piece, and return the new text that is certainly not part of a call."""
        self._text += text
        prose = self._prose()
        new, self._given = prose[self._given :], max(self._given, len(prose))
        return new

    def written(self) -> list[tuple[str, str]]:
        """Return the name of each call that has begun, and the JSON of its arguments as far as it was generated."""
        form, marker = self._spec.format, self._spec.format.marker
        at = self._text.find(marker) if marker else 0
        if at < 0 or not (marker or self._spec.forced or re.match(r"\s*\[?\s*\{", self._text)):
            return []
        name = re.compile(f'{re.escape(form.before_name)}"([^"]+)"{re.escape(form.before_arguments)}')
        calls = []
        while found := name.search(self._text, at):
            try:
                _, at = json.JSONDecoder().raw_decode(self._text, found.end())
            except json.JSONDecodeError:
                at = len(self._text)
            calls.append((found[1], self._text[found.end() : at]))
        return calls

    def close(self) -> Parsed:
        """Parse the whole answer, and set `rest`."""
        parsed = self._spec.parse(self._text)
        self.rest = parsed.content[self._given :]
        return parsed

    def _prose(self) -> str:
        """Return the beginning of the answer that is certainly not part of a call."""
        text, marker = self._text, self._spec.format.marker
        if self._spec.forced:
            return ""
        if not marker:
            return "" if text.lstrip()[:1] in ("", "{", "[") else text
        before, found, _ = text.partition(marker)
        if not found:
            before = text[: len(text) - overlap(text, marker)]
        return before.rstrip()


def tool_spec(
    template: ChatTemplate, tools: Sequence[Mapping[str, Any]] | None, choice: str = "auto", parallel: bool = True
) -> ToolSpec | None:
    """Prepare a conversation in which the model may call tools.

    Args:
        template: the model's chat template.
        tools: dicts with `name`, `description` and `parameters` (a JSON schema), or the same in OpenAI's form.
        choice: `"auto"`: text or calls; `"any"` or `"required"`: calls; a tool's name: one call of that tool;
            `"none"`: no calls.
        parallel: the answer may have several calls.

    Returns:
        The specification; None if there are no tools, or the choice is `"none"`.

    Raises:
        InvalidInputError: a malformed tool, two tools of the same name, or a choice that is not a tool's name.
    """
    offered = tuple(Tool.of(tool) for tool in tools or ())
    names = [tool.name for tool in offered]
    if len(set(names)) < len(names):
        raise InvalidInputError(f"two tools have the same name: {', '.join(names)}. Rename one of them.")
    if choice not in ("auto", "any", "required", "none", *names):
        raise InvalidInputError(f"tool choice {choice!r} is not auto, any, none or one of: {', '.join(names)}")
    if not offered or choice == "none":
        return None
    chosen = tuple(tool for tool in offered if tool.name == choice)
    forced, parallel = choice != "auto", parallel and not chosen
    return ToolSpec(template, offered, chosen or offered, forced, parallel, call_format(template))


def tool_messages(template: ChatTemplate, messages: Sequence[Message]) -> list[Message]:
    """Return a history that the template can render: if it renders no calls or results, they become message text.

    Each result gets its tool's name. The ids of calls become numbers, because random ids would make each run's prompt
    different, and some templates refuse the ids of other models.
    """
    numbered = _numbered(messages)
    if call_format(template) is not _PLAIN and _renders_results(template):
        return numbered
    return [_as_text(message) for message in numbered]


def _numbered(messages: Sequence[Message]) -> list[Message]:
    """Number the calls of messages, and give each result the number of its call and the name of its tool."""
    shown = list[Message]()
    answers = dict[str, dict[str, str]]()
    count = 0
    for message in messages:
        message = dict(message)
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                count += 1
                calls.append({**call, "id": f"call{count:05}"})
                name = call.get("function", call)["name"]
                answers[call.get("id") or ""] = {"tool_call_id": calls[-1]["id"], "name": name}
            message["tool_calls"] = calls
        elif message["role"] == "tool":
            message |= answers.get(message.get("tool_call_id") or "", {})
        shown.append(message)
    return shown


def _as_text(message: Message) -> Message:
    """Return a message whose calls, or whose tool result, are text in the content."""
    content = message.get("content") or ""
    name = message.get("name") or message.get("tool_call_id")
    if message["role"] == "tool" and any(isinstance(part, Document) for part in content):
        return {"role": "user", "content": [json.dumps({"result of": name}, ensure_ascii=False) + "\n", *content]}
    if not isinstance(content, str):
        content = "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
    if message["role"] == "tool":
        result = {"name": name, "result": content}
        return {"role": "user", "content": json.dumps(result, ensure_ascii=False)}
    if not message.get("tool_calls"):
        return dict(message)
    lines = [content] if content else []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        lines.append(_PLAIN.write(function["name"], arguments))
    return {"role": "assistant", "content": "\n".join(lines)}


# --- the format of a template ----------------------------------------------------------------------------------

_NAME, _KEY, _VALUE, _ABOUT = "kvcag_probe", "kvcag_key", "kvcag_value", "kvcag about"
_QUESTION: Message = {"role": "user", "content": "x"}
_PROBE = Tool(_NAME, _ABOUT, {"type": "object", "properties": {_KEY: {"type": "string"}}})
_PROBE_CALL = re.compile(
    rf'(?P<before>\{{\s*"\w+":\s*)"{_NAME}"(?P<middle>,\s*"\w+":\s*)\{{\s*"{_KEY}":\s*"{_VALUE}"\s*\}}'
    r'(?:\s*\}|,\s*"id":\s*"\w+"\s*\})'
)


def call_format(template: ChatTemplate) -> CallFormat:
    """Return the format in which a template renders calls; `_PLAIN` if it renders no tools, or calls without JSON."""
    known = template.__dict__.get("_call_format")
    if known is None:
        known = template.__dict__["_call_format"] = _read_format(template)
    assert isinstance(known, CallFormat)
    return known


def _read_format(template: ChatTemplate) -> CallFormat:
    one, two = _rendered_calls(template, 1), _rendered_calls(template, 2)
    call = _PROBE_CALL.search(one)
    if call is None:
        return _PLAIN
    opening, closing, separator = one[: call.start()], one[call.end() :], None
    if two.startswith(one[: call.end()]):
        second = two.find(call["before"], call.end())
        separator = two[call.end() : second] if second > 0 else None
    marker_id = None
    for token in template.tokenizer.all_special_tokens:
        if opening.lstrip().startswith(token):  # an answer's text does not include special tokens
            marker_id = template.tokenizer.added_tokens_encoder[token]
            opening = opening.lstrip()[len(token) :].lstrip()
            break
    return CallFormat(opening, closing, separator, call["before"], call["middle"], "}", marker_id)


def _assistant(count: int) -> Message:
    """Return an assistant message with `count` probe calls."""
    function = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    calls = [{"type": "function", "id": f"probe000{i}", "function": function} for i in range(count)]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _rendered_calls(template: ChatTemplate, count: int) -> str:
    """Render an assistant turn with `count` calls; empty if the template renders no tools or no calls."""
    try:
        before = template.render([_QUESTION], tools=[_PROBE.shown])
        text = template.render([_QUESTION, _assistant(count)], tools=[_PROBE.shown], add_generation_prompt=False)
    except (KVCAGError, TemplateError, TypeError):
        return ""
    start = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
    turn = text[start:] if start == len(before) else text[text.rfind(before[-1:], 0, start) + 1 :]
    if _ABOUT not in before or turn.count(_NAME) != count:
        return ""
    if "</think>" in turn:
        turn = turn.rpartition("</think>")[2].lstrip()
    special = template.tokenizer.all_special_tokens
    ends = [token for token in special if not re.search("tool|python", token, re.IGNORECASE)]  # these do not end a turn
    cut = [turn.find(end) for end in ends if end in turn]
    return turn[: min(cut)] if cut else turn.rstrip()


def _renders_results(template: ChatTemplate) -> bool:
    result = {"role": "tool", "content": _ABOUT, "name": _NAME, "tool_call_id": "probe0000"}
    try:
        return _ABOUT in template.render([_QUESTION, _assistant(1), result], add_generation_prompt=False)
    except (KVCAGError, TemplateError, TypeError):
        return False
