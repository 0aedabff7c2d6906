"""Random JSON schemas with every keyword that constraints support."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
from hypothesis import strategies as st

from kvcag import HFEngine
from kvcag.errors import ConstraintBudgetError

Schema = dict[str, Any]

_names = st.sampled_from(["a", "b", "größe", 'q"', "n\\", "日本", "with space"])
_values = st.sampled_from([None, True, 0, -3, 2.5, "", "x", 'say "hi"', "größer", "日本語", [1], {"k": None}])


def _bounds(low: str, high: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Schema]:
    """No bound, one, or both in order."""
    pairs = st.tuples(values, values).map(sorted)
    both = pairs.map(lambda pair: {low: pair[0], high: pair[1]})
    return st.just({}) | values.map(lambda value: {low: value}) | values.map(lambda value: {high: value}) | both


_integers = _bounds("minimum", "maximum", st.integers(-200, 2000)).map(lambda b: {"type": "integer", **b})
_numbers = _bounds("minimum", "maximum", st.sampled_from([-7.5, 0, 0.25, 3, 1000])).map(
    lambda b: {"type": "number", **b}
)
_lengths = _bounds("minLength", "maxLength", st.integers(0, 6)).map(lambda b: {"type": "string", **b})
_patterns = st.sampled_from(["^[a-c]{2}$", "^(ab)*c$", "\\d+x", '^[^"]{3}$', "^(yes|nein|да)$"])
_formats = st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "email"])
_scalars = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    _integers,
    _numbers,
    _lengths,
    _patterns.map(lambda pattern: {"type": "string", "pattern": pattern}),
    _formats.map(lambda name: {"type": "string", "format": name}),
    _values.map(lambda value: {"const": value}),
    st.lists(_values, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    st.just({"type": ["string", "null"]}),
    st.just({"$ref": "#/$defs/shared"}),
)


def _objects(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def made(properties: dict[str, Schema], chosen: list[bool], open: bool) -> Schema:
        required = [name for name, needed in zip(properties, chosen, strict=False) if needed]
        more = {} if open else {"additionalProperties": False}
        return {"type": "object", "properties": properties, "required": required, **more}

    properties = st.dictionaries(_names, inner, max_size=3)
    return st.builds(made, properties, st.lists(st.booleans(), min_size=3, max_size=3), st.booleans())


def _arrays(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    sized = st.builds(
        lambda items, bounds: {"type": "array", "items": items, **bounds},
        inner,
        _bounds("minItems", "maxItems", st.integers(0, 3)),
    )
    tuples = st.lists(inner, min_size=1, max_size=2).map(
        lambda parts: {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    )
    return sized | tuples


def _either(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})


_bodies = st.recursive(_scalars, lambda inner: _objects(inner) | _arrays(inner) | _either(inner), max_leaves=5)
schemas: st.SearchStrategy[Schema] = _bodies.map(
    lambda body: {
        "$defs": {
            "shared": {"type": "array", "items": {"$ref": "#/$defs/word"}, "maxItems": 2},
            "word": {"enum": ["ja", "nein"]},
        },
        **body,
    }
)


def check_holds(engine: HFEngine, schema: Schema, budget: int, **sampling: Any) -> None:
    """Check that an answer is valid and within its budget, or within the budget that the error names."""
    try:
        engine.constrain(schema, budget)
    except ConstraintBudgetError as refused:
        if refused.needed_tokens <= budget:
            raise AssertionError("refused, although the shortest answer fits") from refused
        budget = refused.needed_tokens
    settings = engine.sampling(max_new_tokens=budget, **sampling)
    chunks = list(engine.stream(engine.build_prompt("Say something."), settings, constraint=schema))
    jsonschema.validate(json.loads("".join(chunk.text for chunk in chunks)), schema)
    assert chunks[-1].usage.completion_tokens <= budget
