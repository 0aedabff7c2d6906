"""Converts constraints to fields of a request, and finds out which constraints a server enforces."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from kvcag.engines.constrain import (
    Choices,
    Grammar,
    JsonSchema,
    Regex,
    ServerConstraint,
    as_json_schema,
    close_objects,
    to_lark,
)
from kvcag.errors import (
    ConstraintError,
    EngineError,
    PromptError,
    ServerTimeoutError,
    ServerUnavailableError,
)

ConstraintSupport: TypeAlias = Literal["lark", "structured_outputs", "response_format", "none"]
"""The constraints that a server enforces: `lark`: any grammar; `structured_outputs`: JSON schemas, regular expressions
and choices; `response_format`: JSON schemas; `none`."""

_GUIDANCE = "%llguidance {}\n"
"""Only llguidance accepts this first line. vLLM's other backends accept some Lark too and enforce less of it; vLLM
uses llguidance if its first choice refuses a grammar."""


def constraint_support(complete: Callable[[Mapping[str, Any]], str]) -> ConstraintSupport:
    """Find out what a server enforces, by requests for an answer that a model gives only if it is forced to.

    A server ignores unknown fields, so nothing would show that a constraint is not enforced.

    Args:
        complete: returns a short greedy answer to a request with the given fields.
    """
    probe = JsonSchema(
        {"type": "object", "properties": {"word": {"enum": ["kvcag"]}}, "required": ["word"]}, closed=True
    )
    supports: tuple[ConstraintSupport, ...] = ("lark", "structured_outputs", "response_format")
    for support in supports:
        try:
            if json.loads(complete(server_constraint(probe, support, False).fields)) == {"word": "kvcag"}:
                return support
        except (ServerUnavailableError, ServerTimeoutError):
            raise
        except (EngineError, PromptError, ValueError):  # refused, or a free answer that is not JSON
            continue
    return "none"


def server_constraint(constraint: Any, support: ConstraintSupport, thinking: bool) -> ServerConstraint:
    """Convert a constraint to fields of a request. vLLM compiles the same llguidance grammar as `HFEngine`.

    Args:
        constraint: as for `Engine.stream`.
        support: what the server enforces.
        thinking: the answer begins within a thinking block.

    Raises:
        ConstraintError: the value is not a constraint or malformed, or the server cannot enforce it.
    """
    if isinstance(constraint, ServerConstraint):
        return constraint
    constraint = as_json_schema(constraint)
    lark = to_lark(constraint)
    if thinking:
        raise ConstraintError(
            "the answer begins within a thinking block, and a server would apply the constraint to the thinking. "
            "Switch thinking off, for example with template_variables={'enable_thinking': False}."
        )
    if support == "lark":
        return ServerConstraint({"structured_outputs": {"grammar": _GUIDANCE + lark}})
    fields = _without_lark(constraint)
    if support == "structured_outputs" and fields:
        return ServerConstraint({"structured_outputs": fields})
    if support == "response_format" and "json" in fields:
        schema = {"name": "answer", "schema": fields["json"]}
        return ServerConstraint({"response_format": {"type": "json_schema", "json_schema": schema}})
    raise ConstraintError(
        f"the server cannot enforce a constraint of this kind ({next(iter(fields), 'grammar')}); it supports: "
        f"{support}. vLLM enforces every kind if the backend in --structured-outputs-config is auto or guidance."
    )


def _without_lark(constraint: JsonSchema | Regex | Choices | Grammar) -> dict[str, Any]:
    """Convert a constraint to vLLM's `structured_outputs` without Lark; empty for a grammar."""
    if isinstance(constraint, Grammar):
        return {}
    if isinstance(constraint, Regex):
        return {"regex": constraint.pattern}
    if isinstance(constraint, Choices):
        return {"choice": list(dict.fromkeys(constraint.options))}
    return {"json": dict(close_objects(constraint.schema) if constraint.closed else constraint.schema)}
