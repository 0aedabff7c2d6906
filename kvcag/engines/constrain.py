"""What an answer may be held to: JSON schemas, regular expressions, choices, grammars."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel

if TYPE_CHECKING:
    from kvcag.engines.enforce import Constraint


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that matches a regular expression as a whole (Rust's syntax: no look-around, no back-references)."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Choices:
    """One of several texts."""

    options: Sequence[str]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A context-free grammar in Lark's syntax, as llguidance takes it; its rule `start` is the whole answer."""

    lark: str


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that is valid under a schema.

    Attributes:
        schema: the schema.
        whitespace: let the model place white space; by default there is none, which saves about 40% of the tokens.
        closed: objects have no other properties than those named. A pydantic model's are; a plain JSON schema lets
            the model add what it likes, unless `additionalProperties` is false.
    """

    schema: Mapping[str, Any]
    whitespace: bool = False
    closed: bool = False


@dataclass(frozen=True, slots=True)
class ServerConstraint:
    """A constraint as fields of a request. Made by `VLLMEngine.constrain`, and enforced by the server."""

    fields: Mapping[str, Any]


ConstraintLike: TypeAlias = (
    "type[BaseModel] | Mapping[str, Any] | JsonSchema | Regex | Choices | Grammar | Constraint | ServerConstraint"
)
"""What `constraint=` takes. A mapping is a JSON schema."""


def lark_literal(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def close_objects(schema: Any) -> Any:
    """The schema with `additionalProperties: false` in every object that names its properties and is silent on others.

    What stands under `allOf` is left as it is: there, one branch would forbid the properties of the next.
    """
    if not isinstance(schema, Mapping):
        return schema
    closed: dict[str, Any] = dict(schema)
    for key in ("properties", "$defs", "definitions", "patternProperties"):
        if isinstance(schema.get(key), Mapping):
            closed[key] = {name: close_objects(part) for name, part in schema[key].items()}
    for key in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(schema.get(key), list):
            closed[key] = [close_objects(part) for part in schema[key]]
    for key in ("items", "additionalProperties"):
        if key in schema:
            closed[key] = close_objects(schema[key])
    if "properties" in schema and "allOf" not in schema:
        closed.setdefault("additionalProperties", False)
    return closed
