"""Where documents meet in a prompt: the tokens of the pieces are those of the joined text."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from kvcag import ChatTemplate, Document
from tests.vocabularies import FAMILIES, tokenizer_of

PLAIN = [
    "The tower was completed in 1889 (see below).",
    "It's 330 metres tall;\nits colour: a brown of three shades!",
    "高さは330メートルです。 Naïve façades…",
    "- one\n- two\n\n- three\n",
]
ODD = ["    def height():\n        return 330", "\n\nChapter 2", "ends with spaces   ", "\ttab", ""]
PROMPTS = [
    ("Use the passages.\n\n", ""),
    ("", "\n\nAnswer briefly."),
    ("<context>\n", "\n</context>"),
    ("Passages:\n", " And that is all."),
    ("Context: ", " \nAnswer:"),
    ("(", ")"),
]


def split(before: str, documents: list[str], after: str) -> list[dict[str, Any]]:
    """What `create_cag_documents_chain` makes."""
    shown = [Document(f"{text}\n\n") for text in documents[:-1]] + [Document(documents[-1], "\n\n")]
    return [{"role": "system", "content": [before, *shown, after]}, {"role": "user", "content": "How tall?"}]


def joined(before: str, documents: list[str], after: str) -> list[dict[str, Any]]:
    """What `create_stuff_documents_chain` makes."""
    text = before + "\n\n".join(documents) + after
    return [{"role": "system", "content": text}, {"role": "user", "content": "How tall?"}]


@pytest.fixture(params=FAMILIES)
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    return ChatTemplate(tokenizer_of(request.param))


@pytest.mark.parametrize(("before", "after"), PROMPTS[:4])
def test_documents_on_lines_of_their_own_have_the_tokens_of_the_joined_text(
    template: ChatTemplate, before: str, after: str
) -> None:
    kept = set()
    for documents in permutations(PLAIN, 3):
        made = template.prompt(split(before, list(documents), after), seams="documents")
        assert made.token_ids == template.prompt(joined(before, list(documents), after)).token_ids
        assert made.seams == 0
        kept |= set(made.kept_ids)
    assert kept == {template.encode_text(f"{text}\n\n") for text in PLAIN}  # each is kept once, wherever it stands


@pytest.mark.parametrize(("before", "after"), PROMPTS)
def test_a_prompt_tokenised_as_a_whole_has_the_tokens_of_the_joined_text(
    template: ChatTemplate, before: str, after: str
) -> None:
    for documents in permutations([*PLAIN[:2], *ODD], 2):
        made = template.prompt(split(before, list(documents), after), seams="none")
        assert made.token_ids == template.prompt(joined(before, list(documents), after)).token_ids


@pytest.mark.parametrize(("before", "after"), PROMPTS)
def test_where_the_tokens_are_others_the_prompt_says_at_how_many_places(
    template: ChatTemplate, before: str, after: str
) -> None:
    for documents in permutations([*PLAIN[:2], *ODD], 2):
        made = template.prompt(split(before, list(documents), after), seams="documents")
        same = made.token_ids == template.prompt(joined(before, list(documents), after)).token_ids
        assert same == (made.seams == 0), documents
        assert made.seams <= 2
