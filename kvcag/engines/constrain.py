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
    """

    schema: Mapping[str, Any]
    whitespace: bool = False


ConstraintLike: TypeAlias = "type[BaseModel] | Mapping[str, Any] | JsonSchema | Regex | Choices | Grammar | Constraint"
"""What `constraint=` takes. A mapping is a JSON schema."""


def lark_literal(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)
