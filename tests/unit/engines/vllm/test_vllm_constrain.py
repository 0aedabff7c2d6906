"""Constraints are sent in a form that the server enforces, and refused if it would ignore them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from kvcag import Choices, Grammar, HFEngine, JsonSchema, Regex
from kvcag.engines.vllm.constraints import server_constraint
from kvcag.engines.vllm.engine import VLLMEngine
from kvcag.errors import ConstraintError, ServerUnavailableError
from kvcag.testing import byte_tokenizer, tiny_model
from tests.wire_server import WireServer


class Answer(BaseModel):
    city: str
    year: int


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
CONSTRAINTS = [Answer, SCHEMA, JsonSchema(SCHEMA, closed=True), Regex("[a-c]{3}/[0-9]{2}"), Choices(["yes", "no"])]
IDS = ["pydantic", "schema", "closed", "regex", "choices"]


@pytest.fixture
def engine(server: WireServer) -> Iterator[VLLMEngine]:
    with VLLMEngine(server.url, tokenizer=byte_tokenizer()) as made:
        yield made


@pytest.mark.parametrize("constraint", [*CONSTRAINTS, Grammar('start: "a" /[0-9]+/ "z"')], ids=[*IDS, "grammar"])
def test_a_constrained_answer_is_that_of_an_hf_engine(engine: VLLMEngine, constraint) -> None:
    here = HFEngine(tiny_model(), byte_tokenizer())
    answers = {each.generate("?", constraint=constraint, max_new_tokens=60) for each in (engine, here)}
    assert len(answers) == 1


def test_what_a_server_can_do_is_asked_once(server: WireServer, engine: VLLMEngine) -> None:
    for _ in range(2):
        engine.generate("?", constraint=Choices(["yes"]), max_new_tokens=9)
    assert len(server.prompts()) == 3
    grammar = server.bodies[-1][1]["structured_outputs"]["grammar"]
    assert grammar == '%llguidance {}\nstart: "yes"'  # otherwise vLLM may use a backend that enforces less


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=IDS)
def test_a_server_that_takes_no_grammar_is_sent_the_rest(server: WireServer, engine: VLLMEngine, constraint) -> None:
    server.constrains = "json"
    answer = engine.generate("?", constraint=constraint, max_new_tokens=80)
    assert "grammar" not in server.bodies[-1][1]["structured_outputs"]
    if isinstance(constraint, Regex | Choices):
        assert answer in ("yes", "no") or re.fullmatch("[a-c]{3}/[0-9]{2}", answer)
    else:
        assert json.loads(answer)


def test_a_grammar_for_a_server_that_takes_none_is_refused(server: WireServer, engine: VLLMEngine) -> None:
    server.constrains = "json"
    with pytest.raises(ConstraintError, match="auto or guidance"):
        engine.generate("?", constraint=Grammar('start: "a"'))


def test_a_server_of_the_api_alone_is_sent_a_response_format(tiny_engine: HFEngine) -> None:
    with (
        WireServer(tiny_engine, flavour="openai", constrains="response_format") as server,
        VLLMEngine(server.url, tokenizer=byte_tokenizer(), context_length=2048) as engine,
    ):
        with pytest.warns(UserWarning, match="tokenize"):
            answer = engine.generate("?", constraint=SCHEMA, max_new_tokens=60)
        assert isinstance(json.loads(answer)["n"], int)
        assert server.bodies[-1][1]["response_format"]["type"] == "json_schema"
        with pytest.raises(ConstraintError, match="regex"):
            engine.generate("?", constraint=Regex("a"))


def test_a_server_that_would_ignore_a_constraint_is_not_asked(server: WireServer, engine: VLLMEngine) -> None:
    """vLLM ignores `guided_json`, for example: the answer would be free and look constrained."""
    server.constrains = None
    with pytest.raises(ConstraintError, match="none"):
        engine.generate("?", constraint=SCHEMA)
    assert len(server.prompts()) == 3  # one for each form of constraint


def test_a_constraint_that_the_server_refuses_says_why(engine: VLLMEngine) -> None:
    with pytest.raises(ConstraintError, match="regex parse error"):
        engine.generate("?", constraint=Regex("(unclosed"))
    with pytest.raises(ConstraintError, match="Grammar error"):
        engine.generate("?", constraint={"type": "nonsense"})


@pytest.mark.parametrize(
    "wrong", [7, Choices([]), Choices([""]), {"a": object()}], ids=["7", "none", "empty", "no JSON"]
)
def test_what_is_no_constraint_is_refused_here(server: WireServer, engine: VLLMEngine, wrong) -> None:
    engine.generate("?", constraint=Choices(["yes"]), max_new_tokens=9)
    sent = len(server.prompts())
    with pytest.raises(ConstraintError):
        engine.generate("?", constraint=wrong)
    assert len(server.prompts()) == sent


def test_a_server_that_is_down_is_not_taken_for_one_that_can_do_nothing(server: WireServer) -> None:
    with VLLMEngine(server.url, tokenizer=byte_tokenizer(), retry_wait=0.01) as engine:
        engine.check_server()
        server.stop()
        with pytest.raises(ServerUnavailableError):
            engine.generate("?", constraint=SCHEMA, max_new_tokens=60)
        server.start()
        assert json.loads(engine.generate("?", constraint=SCHEMA, max_new_tokens=60))


def test_an_answer_that_begins_with_thinking_is_not_constrained() -> None:
    with pytest.raises(ConstraintError, match="enable_thinking"):
        server_constraint(Choices(["yes"]), "lark", thinking=True)


@pytest.mark.parametrize("pattern", ["a/b", r"a\/b", r"a\\/b", "a\nb", "/"])
def test_slashes_and_line_breaks_in_an_expression_end_nothing(pattern: str) -> None:
    here = HFEngine(tiny_model(), byte_tokenizer())
    grammar = server_constraint(Regex(pattern), "lark", thinking=False).fields["structured_outputs"]["grammar"]
    assert here.constrain(Grammar(grammar), 40).shortest == here.constrain(Regex(pattern), 40).shortest
