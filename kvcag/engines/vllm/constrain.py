"""Constraints in a server's own words: it compiles and enforces them, and what it can enforce is found out once.

vLLM's `structured_outputs` takes llguidance's Lark, which is what `HFEngine` compiles, so both hold an answer to the
same grammar. A server that takes less of it is given what it takes, or the constraint is refused: a field that a server
does not know is ignored without a word, and an answer would be free and nobody would know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

from kvcag.engines.constrain import Choices, Grammar, JsonSchema, Regex, ServerConstraint, close_objects, lark_literal
from kvcag.errors import ConstraintError, EngineError, InvalidInputError, ServerTimeoutError, ServerUnavailableError

Ability: TypeAlias = Literal["lark", "structured_outputs", "response_format", "none"]
"""What a server can hold an answer to: any grammar; JSON schemas, expressions and choices; JSON schemas; nothing."""

_SCHEMA = {
    "type": "object",
    "properties": {"word": {"enum": ["kvcag"]}},
    "required": ["word"],
    "additionalProperties": False,
}
_GUIDANCE = "%llguidance {}\n"
"""Llguidance alone knows this first line. Other backends take some Lark too, and hold answers to less than it says:
vLLM falls back to llguidance where its first choice refuses a grammar."""

_PROBES: dict[Ability, dict[str, Any]] = {
    "lark": {"structured_outputs": {"grammar": f"{_GUIDANCE}start: %json {json.dumps(_SCHEMA)}"}},
    "structured_outputs": {"structured_outputs": {"json": _SCHEMA}},
    "response_format": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "probe", "schema": _SCHEMA}}
    },
}
_ADVICE = (
    "vLLM holds answers to anything; where --structured-outputs-config names a backend, let it be auto or guidance."
)


def ability(complete: Callable[[Mapping[str, Any]], str]) -> Ability:
    """Find out what a server can enforce, by asking for an answer that nobody would give of his own accord.

    Args:
        complete: a short greedy answer under some fields of a request.
    """
    for tried, fields in _PROBES.items():
        try:
            if json.loads(complete(fields)) == {"word": "kvcag"}:
                return tried
        except (ServerUnavailableError, ServerTimeoutError):
            raise
        except (EngineError, InvalidInputError, ValueError):  # refused; or the answer is free, and no JSON
            continue
    return "none"


def server_constraint(constraint: Any, can: Ability, thinking: bool) -> ServerConstraint:
    """A constraint in the words of a server that can enforce as much.

    Args:
        constraint: as `constraint=` takes it.
        can: what the server enforces.
        thinking: the answer begins within a thinking block.

    Raises:
        ConstraintError: it is none, or not well formed, or the server cannot enforce it.
    """
    if isinstance(constraint, ServerConstraint):
        return constraint
    constraint = _normal(constraint)
    if thinking:
        raise ConstraintError(
            "the answer begins within a thinking block, and a server would hold the thinking to the constraint: switch "
            "it off for this model, as with template_variables={'enable_thinking': False}"
        )
    if can == "lark":
        lark = _lark(constraint)
        return ServerConstraint({"structured_outputs": {"grammar": _GUIDANCE + lark}})
    if can == "structured_outputs" and not isinstance(constraint, Grammar):
        return ServerConstraint({"structured_outputs": _structured(constraint)})
    if can == "response_format" and isinstance(constraint, JsonSchema):
        schema = {"name": "answer", "schema": _schema(constraint)}
        return ServerConstraint({"response_format": {"type": "json_schema", "json_schema": schema}})
    what = type(constraint).__name__
    raise ConstraintError(f"the server cannot hold an answer to a {what} (it can do: {can}). {_ADVICE}")


def _normal(constraint: Any) -> JsonSchema | Regex | Choices | Grammar:
    if isinstance(constraint, type) and issubclass(constraint, BaseModel):
        return JsonSchema(constraint.model_json_schema(), closed=True)
    if isinstance(constraint, Mapping):
        return JsonSchema(constraint)
    if isinstance(constraint, Choices):
        _check_options(constraint.options)
    if isinstance(constraint, JsonSchema | Regex | Choices | Grammar):
        return constraint
    raise ConstraintError(
        "a constraint is a pydantic model class, a JSON schema, Regex(…), Choices([…]) or Grammar(…), "
        f"not {constraint!r:.80}"
    )


def _check_options(options: Sequence[str]) -> None:
    if not options or not all(isinstance(option, str) and option for option in options):
        raise ConstraintError(f"choices are non-empty strings, at least one, not {options!r}")


def _lark(constraint: JsonSchema | Regex | Choices | Grammar) -> str:
    """The constraint in llguidance's Lark, as `kvcag.engines.enforce` compiles it."""
    if isinstance(constraint, Grammar):
        return constraint.lark
    if isinstance(constraint, Choices):
        return "start: " + " | ".join(lark_literal(option) for option in dict.fromkeys(constraint.options))
    if isinstance(constraint, Regex):
        return f"start: /{_SLASH.sub(_escaped, constraint.pattern)}/"
    spaced = {"x-guidance": {"whitespace_flexible": constraint.whitespace}}
    return f"start: %json {json.dumps({**_schema(constraint), **spaced}, ensure_ascii=False)}"


_SLASH = re.compile(r"\\.|/|\n", re.DOTALL)


def _escaped(found: re.Match[str]) -> str:
    """What would end a Lark regex, escaped; an escape as it is."""
    return {"/": "\\/", "\n": "\\n"}.get(found[0], found[0])


def _structured(constraint: JsonSchema | Regex | Choices) -> dict[str, Any]:
    if isinstance(constraint, Regex):
        return {"regex": constraint.pattern}
    if isinstance(constraint, Choices):
        return {"choice": list(dict.fromkeys(constraint.options))}
    return {"json": _schema(constraint)}


def _schema(constraint: JsonSchema) -> dict[str, Any]:
    schema = close_objects(constraint.schema) if constraint.closed else dict(constraint.schema)
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as malformed:
        raise ConstraintError(f"the schema is not JSON: {malformed}") from malformed
    return dict(schema)
