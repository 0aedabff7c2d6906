"""How a model writes tool calls, read off its chat template, and histories with calls that any template can show.

A call is rendered and what comes out is looked at: Hermes' and Qwen's `<tool_call>`, Llama 3's bare JSON, Mistral's
`[TOOL_CALLS]`. Where a template shows no tools, or its calls are no JSON, they are `{"name": …, "arguments": {…}}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from kvcag.errors import KVCAGError
from kvcag.prompt import ChatTemplate, Message


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
