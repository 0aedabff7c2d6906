"""How a model writes tool calls, read off its chat template, and histories with calls that any template can show.

A call is rendered and what comes out is looked at: Hermes' and Qwen's `<tool_call>`, Llama 3's bare JSON, Mistral's
`[TOOL_CALLS]`. Where a template shows no tools, or its calls are no JSON, they are `{"name": …, "arguments": {…}}`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2.exceptions import TemplateError

from kvcag.chat_template import ChatTemplate, Message
from kvcag.engines.constrain import Grammar, close_objects, lark_literal
from kvcag.errors import InvalidInputError, KVCAGError


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a model writes its calls: `opening`, one call or several with `separator` between, `closing`.

    Attributes:
        opening: what stands before the first call.
        closing: what stands after the last.
        separator: what stands between two; None where only one can be made.
        before_name, before_arguments, after_arguments: the rest of a call, which is JSON.
        marker_id: the special token that opens the calls, where one does; it is no part of `opening`, and no text.
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
        """The text by which calls are told from prose. Empty where a call is bare JSON."""
        return "" if self.opening.strip(" \n[") == "" else self.opening.strip()

    @property
    def keys(self) -> tuple[str, str]:
        """Under which the name and the arguments stand."""
        name, arguments = re.findall(r'"(\w+)"\s*:', self.before_name + self.before_arguments)[-2:]
        return name, arguments

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """One call."""
        written = json.dumps(arguments, ensure_ascii=False)
        return f"{self.before_name}{json.dumps(name)}{self.before_arguments}{written}{self.after_arguments}"


PLAIN = CallFormat()


def tool_messages(template: ChatTemplate, messages: Sequence[Message]) -> list[Message]:
    """A history whose calls and results the template shows: as it is, or with both written into the contents."""
    if call_format(template) is not PLAIN and _shows_results(template):
        return [dict(message) for message in messages]
    shown: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls") or ()
        if message["role"] == "tool":
            result = {"name": message.get("name") or message.get("tool_call_id"), "result": _plain(message)}
            shown.append({"role": "user", "content": json.dumps(result, ensure_ascii=False)})
        elif calls:
            functions = [call.get("function", call) for call in calls]
            written = [PLAIN.write(function["name"], _arguments(function)) for function in functions]
            content = "\n".join([*([_plain(message)] if _plain(message) else []), *written])
            shown.append({"role": "assistant", "content": content})
        else:
            shown.append(dict(message))
    return shown


def call_format(template: ChatTemplate) -> CallFormat:
    """The format in which a template writes calls; `PLAIN` where it shows no tools, or no JSON calls."""
    known = template.__dict__.get("_call_format")
    if known is None:
        known = template.__dict__["_call_format"] = _read_format(template)
    assert isinstance(known, CallFormat)
    return known


_NAME, _KEY, _VALUE, _ABOUT = "kvcag_probe", "kvcag_key", "kvcag_value", "kvcag about"
_ASKED: Message = {"role": "user", "content": "x"}
_PROBE = {
    "name": _NAME,
    "description": _ABOUT,
    "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
}
_SHOWN = [{"type": "function", "function": _PROBE}]


def _read_format(template: ChatTemplate) -> CallFormat:
    one = _rendered_calls(template, 1)
    if one is None:
        return PLAIN
    shape = re.search(
        rf'(?s)(?P<before>\{{\s*"\w+":\s*)"{_NAME}"(?P<middle>,\s*"\w+":\s*)\{{\s*"{_KEY}":\s*"{_VALUE}"\s*\}}'
        r'(?P<after>\s*\}|,\s*"id":\s*"\w+"\s*\})',
        one,
    )
    if shape is None:
        return PLAIN
    opening, closing = one[: shape.start()], one[shape.end() :]
    two = _rendered_calls(template, 2)
    separator = None
    if two is not None and two.startswith(opening + shape[0]):
        second = two.find(shape["before"], shape.end())
        separator = two[shape.end() : second] if second > 0 else None
    marker_id, opening = _special_opening(template, opening)
    return CallFormat(opening, closing, separator, shape["before"], shape["middle"], "}", marker_id)


def _calls(count: int) -> Message:
    function = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    calls = [{"type": "function", "id": f"probe000{i}", "function": function} for i in range(count)]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _rendered_calls(template: ChatTemplate, count: int) -> str | None:
    """What stands in an assistant turn that makes `count` calls; None where the template shows no tools or calls."""
    try:
        before = template.render([_ASKED], tools=_SHOWN)
        text = template.render([_ASKED, _calls(count)], tools=_SHOWN, add_generation_prompt=False)
    except (KVCAGError, TemplateError, TypeError):
        return None
    start = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
    said = text[start:] if start == len(before) else text[text.rfind(before[-1:], 0, start) + 1 :]
    if _ABOUT not in before or said.count(_NAME) != count:
        return None
    said = said.rpartition("</think>")[2].lstrip() if "</think>" in said else said
    ends = [said.find(end) for end in _end_tokens(template) if end in said]
    return said[: min(ends)] if ends else said.rstrip()


def _end_tokens(template: ChatTemplate) -> list[str]:
    """Special tokens that end a turn: all but those that open calls."""
    special = template.tokenizer.all_special_tokens
    return [token for token in special if not re.search("tool|python", token, re.IGNORECASE)]


def _special_opening(template: ChatTemplate, opening: str) -> tuple[int | None, str]:
    """The special token with which calls open, which is skipped in text, and the rest of the opening."""
    for token in template.tokenizer.all_special_tokens:
        if opening.lstrip().startswith(token):
            return template.tokenizer.added_tokens_encoder[token], opening.lstrip()[len(token) :].lstrip()
    return None, opening


def _shows_results(template: ChatTemplate) -> bool:
    result = {"role": "tool", "content": _ABOUT, "name": _NAME, "tool_call_id": "probe0000"}
    try:
        return _ABOUT in template.render([_ASKED, _calls(1), result], add_generation_prompt=False)
    except (KVCAGError, TemplateError, TypeError):
        return False


def _plain(message: Message) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


def _arguments(function: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = function.get("arguments") or {}
    return json.loads(arguments) if isinstance(arguments, str) else arguments


__all__ = [
    "CallFormat",
    "CallParser",
    "InvalidToolCall",
    "Parsed",
    "Tool",
    "ToolCall",
    "ToolSpec",
    "call_format",
    "tool_messages",
    "tool_spec",
]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that can be made."""

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=lambda: _new_id())


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """A call that was cut, is no JSON, or names no tool.

    Attributes:
        text: what the model wrote.
        error: what is wrong with it.
        name: the tool, where that much could be read.
    """

    text: str
    error: str
    id: str = field(default_factory=lambda: _new_id())
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Parsed:
    """An answer, its calls apart from its text."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    invalid_calls: tuple[InvalidToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """What a model is told of a function: its name, what it does, and a JSON schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @classmethod
    def of(cls, tool: Mapping[str, Any]) -> Tool:
        """From OpenAI's shape or from the function alone.

        Raises:
            InvalidInputError: it has no name, or its parameters are no JSON schema of an object.
        """
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(name, str) or not name:
            raise InvalidInputError(f"a tool is a mapping with name, description and parameters, not {tool!r:.80}")
        parameters = inner.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise InvalidInputError(f"the parameters of tool {name!r} are not a JSON schema of an object")
        return cls(name, str(inner.get("description") or ""), parameters)

    @property
    def shown(self) -> dict[str, Any]:
        """As templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """How a conversation with tools is prompted, constrained and read. Made by `tool_spec`.

    Attributes:
        template: the model's chat template.
        offered: every tool.
        callable: those that the choice allows.
        forced: the answer is one or more calls and nothing else.
        parallel: several calls may be made at once.
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
        """What the template is given; None where it shows no tools and `messages` does."""
        return None if self.format is PLAIN else [tool.shown for tool in self.offered]

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template can show them, with the tools among them where it has no place for those."""
        shown = tool_messages(self.template, messages)
        if self.format is not PLAIN:
            return shown
        if shown and shown[0]["role"] == "system":
            content = shown[0].get("content") or ""
            parts = [content] if isinstance(content, str) else list(content)
            space = "\n\n" if parts and parts != [""] else ""
            added: Any = [*parts, space + self._instruction]
            if isinstance(content, str):
                added = "".join(added)
            return [{**shown[0], "content": added}, *shown[1:]]
        return [{"role": "system", "content": self._instruction}, *shown]

    @property
    def constraint(self) -> Grammar:
        """Calls alone where they are forced; else text, or calls, which are then right."""
        return Grammar("\n".join(self._rules()))

    def parse(self, text: str) -> Parsed:
        """An answer's text and calls."""
        if self.format.marker:
            return self._parse_marked(text)
        start = text.lstrip()
        if self.forced or self.format.marker_id is None or start[:1] in ("{", "["):
            looks_like = self.forced or re.match(r"\[?\s*\{", start) is not None
            if looks_like:
                calls, invalid = self._read(start)
                if calls or invalid:
                    return Parsed("", tuple(calls), tuple(invalid))
        return Parsed(text)

    def parser(self) -> CallParser:
        """`parse` for an answer that comes in pieces."""
        return CallParser(self)

    def prose(self, text: str) -> str:
        """The beginning of an unfinished answer that is certainly not part of a call."""
        if self.forced:
            return ""
        marker = self.format.marker
        if not marker:
            return "" if text.lstrip()[:1] in ("", "{", "[") else text
        before, found, _ = text.partition(marker)
        if not found:
            overlaps = range(min(len(marker) - 1, len(text)), 0, -1)
            held = next((size for size in overlaps if text.endswith(marker[:size])), 0)
            before = text[: len(text) - held]
        return before.rstrip()

    @property
    def _instruction(self) -> str:
        tools = "\n".join(json.dumps(tool.shown["function"], ensure_ascii=False) for tool in self.offered)
        several = " Several calls stand on lines of their own." if self.parallel else ""
        return (
            f"These tools can be called:\n{tools}\nTo call one, answer with nothing but JSON: "
            f'{{"name": the tool\'s name, "arguments": {{its arguments}}}}.{several}'
        )

    def _rules(self) -> list[str]:
        form = self.format
        several = self.parallel and form.separator is not None
        more = f" ({lark_literal(form.separator or '')} call)*" if several else ""
        closing = f" {lark_literal(form.closing)}" if form.closing else ""
        marker = f"<[{form.marker_id}]> " if form.marker_id is not None else ""
        opening = f"{marker}{lark_literal(form.opening)} " if form.opening else marker
        rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(self.callable)))]
        for index, tool in enumerate(self.callable):
            schema = {**close_objects(tool.parameters), "x-guidance": {"whitespace_flexible": False}}
            before = lark_literal(f"{form.before_name}{json.dumps(tool.name)}{form.before_arguments}")
            written = json.dumps({"type": "object", **schema}, ensure_ascii=False)
            rules.append(f"call_{index}: {before} %json {written} {lark_literal(form.after_arguments)}")
        if self.forced:
            return [f"start: {opening}call{more}{closing}", *rules]
        if form.marker:
            rest = f"{lark_literal(form.opening[len(form.marker) :])} " if form.opening != form.marker else ""
            trigger = re.escape(form.marker).replace("/", "\\/")
            return [
                "start: calls* text",
                f"calls: before {rest}call{more}{closing}",
                f"before[lazy]: /(.|\\n)*{trigger}/",
                "text: /(.|\\n)*/",
                *rules,
            ]
        prose = "(.|\\n)*" if marker else "([^{\\s](.|\\n)*)?"
        return ["start: text | calls", f"text: /{prose}/", f"calls: {opening}call{more}{closing}", *rules]

    def _parse_marked(self, text: str) -> Parsed:
        opening, closing = re.escape(self.format.marker), re.escape(self.format.closing.strip())
        end = f"(?P<end>{closing})|$" if closing else "$"
        calls, invalid, prose, at = list[ToolCall](), list[InvalidToolCall](), "", 0
        for found in re.finditer(f"(?s){opening}(?P<body>.*?)(?:{end})", text):
            prose += text[at : found.start()]
            at = found.end()
            good, bad = self._read(found["body"].strip())
            calls += good
            invalid += bad
        if not at:
            return Parsed(text)
        return Parsed((prose + text[at:]).rstrip(), tuple(calls), tuple(invalid))

    def _read(self, text: str) -> tuple[list[ToolCall], list[InvalidToolCall]]:
        """JSON calls one after another, whatever stands between them."""
        calls, invalid, at = list[ToolCall](), list[InvalidToolCall](), 0
        decoder = json.JSONDecoder()
        while (start := text.find("{", at)) >= 0:
            try:
                value, at = decoder.raw_decode(text, start)
            except json.JSONDecodeError as cut:
                invalid.append(InvalidToolCall(text[start:], f"not JSON: {cut}", name=self._named(text[start:])))
                return calls, invalid
            call = self._call(value, text[start:at])
            (calls if isinstance(call, ToolCall) else invalid).append(call)  # type: ignore[arg-type]
        if not calls and not invalid:
            invalid.append(InvalidToolCall(text, "there is no JSON object in it"))
        return calls, invalid

    def _call(self, value: Any, text: str) -> ToolCall | InvalidToolCall:
        name_key, arguments_key = self.format.keys
        name, arguments = value.get(name_key), value.get(arguments_key, {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError as malformed:
                return InvalidToolCall(text, f"its arguments are not JSON: {malformed}", name=name)
        if name not in [tool.name for tool in self.offered]:
            known = ", ".join(tool.name for tool in self.offered)
            return InvalidToolCall(text, f"no tool is called {name!r}; there are {known}", name=_text_or_none(name))
        if not isinstance(arguments, dict):
            return InvalidToolCall(text, "its arguments are no JSON object", name=name)
        return ToolCall(name, arguments)

    def _named(self, text: str) -> str | None:
        found = re.search(rf'"{self.format.keys[0]}"\s*:\s*"([^"]+)"', text)
        return found[1] if found else None


class CallParser:
    """Reads an answer that comes in pieces. Give out what `push` returns; then `close`, and give out `rest`.

    Attributes:
        rest: after `close`, the end of the content that `push` held back.
    """

    def __init__(self, plan: ToolSpec) -> None:
        self._plan = plan
        self._text = ""
        self._given = 0
        self.rest = ""

    def push(self, text: str) -> str:
        """The text that is certainly no call."""
        self._text += text
        prose = self._plan.prose(self._text)
        given, self._given = prose[self._given :], max(self._given, len(prose))
        return given

    def close(self) -> Parsed:
        """The whole answer, read."""
        parsed = self._plan.parse(self._text)
        self.rest = parsed.content[self._given :]
        return parsed


def tool_spec(
    template: ChatTemplate, tools: Sequence[Mapping[str, Any]] | None, choice: str = "auto", parallel: bool = True
) -> ToolSpec | None:
    """Prepare a conversation in which tools may be called.

    Args:
        template: the model's chat template.
        tools: JSON-schema dicts, in OpenAI's shape or with `name`, `description` and `parameters` at the top.
        choice: `"auto"`: text or calls; `"any"` or `"required"`: calls; a tool's name: that one; `"none"`.
        parallel: several calls may be made at once.

    Returns:
        None where there is nothing to call.

    Raises:
        InvalidInputError: a malformed tool, two of the same name, or a choice that is no tool's name.
    """
    offered = tuple(Tool.of(tool) for tool in tools or ())
    names = [tool.name for tool in offered]
    if len(set(names)) < len(names):
        raise InvalidInputError(f"two tools have the same name: {', '.join(names)}")
    if choice not in ("auto", "any", "required", "none", *names):
        raise InvalidInputError(f"tool choice {choice!r} is neither auto, any, none nor one of: {', '.join(names)}")
    if not offered or choice == "none":
        return None
    chosen = tuple(tool for tool in offered if tool.name == choice)
    form = call_format(template)
    forced = choice != "auto"
    return ToolSpec(template, offered, chosen or offered, forced, parallel and not chosen, form)


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _new_id() -> str:
    """Nine letters and digits, which is what Mistral's template insists on."""
    return "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(9))
