"""Tools: offered, called in the model's own format, and parsed."""

from __future__ import annotations

import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcag.chat_template import ChatTemplate, Document
from kvcag.engines.hf import HFEngine
from kvcag.errors import InvalidInputError
from kvcag.testing import CHATML, byte_tokenizer, tiny_model
from kvcag.tools import _PLAIN, call_format, tool_messages, tool_spec
from tests.templates import HERMES, LLAMA, MISTRAL, with_markers

WEATHER = {
    "name": "weather",
    "description": "Looks out of the window.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Köln", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
    },
}
STOP = {"type": "function", "function": {"name": "stop", "description": "", "parameters": None}}
TOOLS = [WEATHER, STOP]
ASK = [{"role": "user", "content": "Will it rain?"}]
SEVEN_CALLS = [{"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}]

TEMPLATES = {
    "plain": ChatTemplate(byte_tokenizer(CHATML)),
    "none": ChatTemplate(byte_tokenizer(None)),
    "hermes": ChatTemplate(byte_tokenizer(HERMES)),
    "llama": ChatTemplate(byte_tokenizer(LLAMA)),
    "mistral": ChatTemplate(with_markers(MISTRAL)),
}


@pytest.fixture(params=list(TEMPLATES))
def template(request) -> ChatTemplate:
    return TEMPLATES[request.param]


@pytest.fixture(scope="module")
def engines() -> dict[str, HFEngine]:
    return {name: HFEngine(tiny_model(vocab_size=264), t.tokenizer) for name, t in TEMPLATES.items()}


def test_the_format_is_read_from_the_template():
    formats = {name: call_format(template) for name, template in TEMPLATES.items()}
    assert formats["plain"] is formats["none"] is _PLAIN
    hermes, llama, mistral = formats["hermes"], formats["llama"], formats["mistral"]
    assert (hermes.opening, hermes.closing) == ("<tool_call>\n", "\n</tool_call>")
    assert hermes.separator == "\n</tool_call>\n<tool_call>\n"
    assert (llama.opening, llama.closing, llama.separator) == ("", "", None)
    assert llama.keys == ("name", "parameters")
    assert (mistral.opening, mistral.closing, mistral.separator) == ("[", "]", ", ")
    assert mistral.marker_id == TEMPLATES["mistral"].tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("choice", ["any", "weather"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_forced_call_is_always_valid(engines, name, choice, seed):
    engine = engines[name]
    spec = tool_spec(engine.template, TOOLS, choice)
    prompt = engine.template.prompt(spec.messages(ASK), tools=spec.tools)
    sampling = engine.sampling(max_new_tokens=150, temperature=1.0, seed=seed)
    text = "".join(chunk.text for chunk in engine.stream(prompt, sampling, constraint=spec.constraint))
    parsed = spec.parse(text)
    assert parsed.content == ""
    assert parsed.invalid_calls == ()
    assert parsed.calls
    for call in parsed.calls:
        assert call.name == "weather" if choice == "weather" else call.name in ("weather", "stop")
        if call.name == "weather":
            jsonschema.validate(call.arguments, {**WEATHER["parameters"], "additionalProperties": False})
    if choice == "weather":
        assert len(parsed.calls) == 1


def test_the_model_writes_calls_as_the_template_does(template):
    """A call in the history is rendered in the format that the model uses."""
    spec = tool_spec(template, TOOLS, "any")
    turn = {"role": "assistant", "content": "", "tool_calls": SEVEN_CALLS}
    history = template.render(spec.messages([*ASK, turn]), tools=spec.tools, add_generation_prompt=False)
    parsed = spec.parse(history[history.rfind(spec.format.opening + spec.format.before_name) :])
    assert [(call.name, call.arguments) for call in parsed.calls] == [("weather", {"city": "Köln"})]


def test_every_template_renders_tools_calls_and_results(template):
    spec = tool_spec(template, TOOLS)
    messages = [
        *ASK,
        {"role": "assistant", "content": "", "tool_calls": SEVEN_CALLS},
        {"role": "tool", "content": "seventeen degrees", "name": "weather", "tool_call_id": "abcdef123"},
    ]
    text = template.render(spec.messages(messages), tools=spec.tools)
    for shown in ("Looks out of the window.", '"city"', "seventeen degrees"):
        assert shown in text
    assert "17" not in text
    assert "seventeen degrees" in template.render(tool_messages(template, messages))


def test_the_instruction_follows_the_system_message_and_its_documents():
    spec = tool_spec(TEMPLATES["plain"], TOOLS)
    documents = [{"role": "system", "content": ["Read: ", Document("fact")]}, *ASK]
    prompt = TEMPLATES["plain"].prompt(spec.messages(documents))
    without = TEMPLATES["plain"].prompt(documents)
    assert prompt.head_ids == without.head_ids, "documents are cached independently of the tools"
    assert prompt.document_ids == without.document_ids
    assert spec.messages([{"role": "system", "content": "Be brief."}])[0]["content"].startswith("Be brief.\n\nThese")


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_auto_is_text_or_a_valid_call(engines, name):
    engine = engines[name]
    spec = tool_spec(engine.template, TOOLS)
    form = spec.format
    good = form.opening + form.write("weather", {"city": "Rome", "days": 3}).replace('": 3', '":3') + form.closing
    good = good.replace('{"city": "Rome", ', '{"city":"Rome",')
    wrong = good.replace("Rome", "Pisa")
    encode = engine.template.encode
    marker = (form.marker_id,) if form.marker_id is not None else ()
    for text, ends in (("It rains.", True), (good, True), (wrong, False)):
        ids = [*(marker if "{" in text else ()), *encode(text)]
        matcher = engine.constrain(spec.constraint, 300)._matcher.deep_copy()
        taken = matcher.try_consume_tokens(ids)
        assert (taken == len(ids) and matcher.is_accepting()) is ends, (text, taken)


def test_parse_separates_text_from_calls():
    spec = tool_spec(TEMPLATES["hermes"], TOOLS)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    parsed = spec.parse(f"Let me see.\n{call}\n{call.replace('weather', 'stop')}\n")
    assert parsed.content == "Let me see."
    assert [call.name for call in parsed.calls] == ["weather", "stop"]
    assert len({call.id for call in parsed.calls}) == 2
    assert spec.parse("no < call > here ").content == "no < call > here "
    plain = tool_spec(TEMPLATES["plain"], TOOLS)
    assert plain.parse('{"name": "stop", "arguments": {}}\n{"name": "stop", "arguments": {}}').calls[1].name == "stop"
    assert plain.parse("text").content == "text"


@pytest.mark.parametrize(
    ("text", "error", "name"),
    [
        ('{"name": "weather", "arguments": {"city": "K', "not JSON", "weather"),
        ('{"name": "wether", "arguments": {}}', "no tool has the name 'wether'", "wether"),
        ('{"name": "weather", "arguments": [1]}', "not a JSON object", "weather"),
        ('{"name": "weather", "arguments": "{"}', "not JSON", "weather"),
        ('{"name": 3}', "no tool has the name 3", None),
        ("{", "not JSON", None),
    ],
)
def test_a_cut_or_malformed_call_is_an_invalid_call(text, error, name):
    for template, opening in (("plain", ""), ("hermes", "<tool_call>\n")):
        parsed = tool_spec(TEMPLATES[template], TOOLS).parse(opening + text)
        assert parsed.calls == ()
        assert error in parsed.invalid_calls[0].error
        assert parsed.invalid_calls[0].name == name
        assert parsed.invalid_calls[0].text.strip() == text


@given(st.text(alphabet='<tool_ca>/{}"\n x', max_size=60), st.integers(1, 7))
def test_parsing_in_pieces_equals_parsing_at_once(text, size):
    for name in ("hermes", "plain", "mistral"):
        spec = tool_spec(TEMPLATES[name], TOOLS)
        parser = spec.parser()
        given = [parser.push(text[i : i + size]) for i in range(0, len(text), size)]
        parsed = parser.close()
        assert parsed.content == spec.parse(text).content
        assert "".join(given) + parser.rest == parsed.content


def test_choices_are_checked():
    template = TEMPLATES["plain"]
    assert tool_spec(template, TOOLS, "none") is None
    assert tool_spec(template, []) is None
    assert tool_spec(template, TOOLS, "required").forced
    for tools, choice in (
        (TOOLS, "wether"),
        ([], "weather"),
        ([WEATHER, WEATHER], "auto"),
        ([{"description": "nameless"}], "auto"),
        ([{"name": "x", "parameters": {"type": "string"}}], "auto"),
        (["weather"], "auto"),
    ):
        with pytest.raises(InvalidInputError):
            tool_spec(template, tools, choice)


def test_arguments_in_a_history_may_be_json_text():
    call = {"function": {"name": "stop", "arguments": json.dumps({"a": 1})}}
    shown = tool_messages(TEMPLATES["plain"], [{"role": "assistant", "content": "So:", "tool_calls": [call]}])
    assert shown == [{"role": "assistant", "content": 'So:\n{"name": "stop", "arguments": {"a": 1}}'}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_result_has_its_tools_name_and_ids_change_no_prompt(name):
    """An agent read that it was handed off to "1by2npxu1", and every run had another prompt."""

    def rendered(first: str, second: str) -> str:
        calls = [
            {"id": id, "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
            for id, city in ((first, "Rome"), (second, "Oslo"))
        ]
        history = [*ASK]
        for call in calls:
            history += [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": call["id"], "content": "dry"},
            ]
        return TEMPLATES[name].render(tool_messages(TEMPLATES[name], history))

    shown = rendered("abc123xyz", "1by2npxu1")
    assert shown == rendered("call_4fRz0dTMMpyTDGWjA9pVb1nN", "")
    assert "1by2npxu1" not in shown
    if call_format(TEMPLATES[name]) is _PLAIN:
        assert shown.count(json.dumps({"name": "weather", "result": "dry"})) == 2
