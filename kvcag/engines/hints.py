"""Texts that a grammar's rules spell out, read off the grammar.

From free text on, nothing shows what will end it: every character is allowed before `THE END`, and after its first
letter as well. What must come was written down by the grammar's author, so it is tried as a whole.
"""

from __future__ import annotations

import json
import re

_MOST = 32
_REGEX = re.compile(r"/((?:\\.|[^/\\\n])+)/")
_STRING = re.compile(r'"(?:\\.|[^"\\\n])*"')
_ATOM = re.compile(
    r"(?:\\(?P<escape>.)|\[(?P<negated>\^?)(?P<set>(?:\\.|[^\]\\])+)\]|(?P<gap>[()|.^$])|(?P<char>[^*+?{]))"
    r"(?P<times>[*+?]|\{\d+(?:,\d*)?\})?\??",
    re.DOTALL,
)
_CLASSES = {"d": "0", "w": "a", "s": " ", "D": "a", "W": "-", "S": "a", "n": "\n", "t": "\t", "r": "\r"}

_FORMATS = {"email": "a@a.aa", "uri": "a:a"}
"""A short text of each format in which no character shows that it leads anywhere."""


def hints(grammar: str) -> list[list[int]]:
    """Bytes of the strings in a grammar's rules, and of what the parts of its regexes and patterns match."""
    if grammar.startswith("{"):
        parts = json.loads(grammar)["grammars"]
        rules = [part["lark_grammar"] for part in parts if part.get("lark_grammar")]
        schemas = [part.get("json_schema") for part in parts]
        texts = [text for schema in schemas for pattern in _said(schema, "pattern") for text in examples(pattern)]
        texts += [_FORMATS[name] for schema in schemas for name in _said(schema, "format") if name in _FORMATS]
    else:
        rules, texts = [grammar], []
    for rule in rules:
        texts += [text for regex in _REGEX.findall(rule) for text in examples(regex)]
        texts += [json.loads(string, strict=False) for string in _STRING.findall(_REGEX.sub("", rule))]
    return [list(text.encode()) for text in dict.fromkeys(texts) if len(text) > 1][:_MOST]


def examples(pattern: str) -> list[str]:
    r"""Short texts that the parts of a regex match, where that is something definite: `a0x` for `.*[a-f]\d+x`."""
    runs = [""]
    for atom in _ATOM.finditer(pattern):
        if atom["gap"]:
            runs.append("")
            continue
        times = atom["times"] or ""
        count = 0 if times in ("*", "?") else int(re.sub(r"\D.*", "", times[1:])) if times[:1] == "{" else 1
        runs[-1] += _character(atom) * min(count, 64)
    return [run for run in runs if run]


def _character(atom: re.Match[str]) -> str:
    if atom["char"]:
        return atom["char"]
    if atom["set"]:
        first = "a" if atom["negated"] else atom["set"]
        return _CLASSES.get(first[1], first[1]) if first[0] == "\\" else first[0]
    return _CLASSES.get(atom["escape"], atom["escape"])


def _said(schema: object, keyword: str) -> list[str]:
    """Every text under a keyword in a JSON schema."""
    if isinstance(schema, list):
        return [text for part in schema for text in _said(part, keyword)]
    if not isinstance(schema, dict):
        return []
    own = [schema[keyword]] if isinstance(schema.get(keyword), str) else []
    return own + [text for part in schema.values() for text in _said(part, keyword)]
