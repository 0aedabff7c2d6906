"""The demonstration's corpus: topics of Python's language reference, which is part of every CPython."""

import pydoc_data.topics
from collections.abc import Iterable
from dataclasses import dataclass

from kvcag.errors import InvalidInputError

DEFAULT_TOPICS = (
    "break",
    "pass",
    "continue",
    "while",
    "return",
    "yield",
    "lists",
    "imaginary",
    "numbers",
    "del",
    "nonlocal",
    "power",
)
"""Twelve topics that every CPython since 3.10 has: about 2,100 tokens. `DEFAULT_QUESTIONS` ask about the last topics,
since a small model answers best from the end of its context."""

DEFAULT_QUESTIONS = (
    "What happens when 0.0 is raised to a negative power?",
    "What exception is raised if the name is unbound?",
    "What does an imaginary literal yield?",
    'What is the "while" statement used for?',
)
"""Questions that a model of 135M parameters can answer from the default topics."""

GENERAL_QUESTIONS = (
    "What is this text about? Answer in one sentence.",
    "What is the most important thing to know?",
    "Which names are mentioned?",
)
"""Questions about any other corpus."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One text of a corpus.

    Attributes:
        title: the name of the topic or the file, or the title in a JSON object.
        text: the text, which is never blank.
    """

    title: str
    text: str


def python_topics(names: Iterable[str] = DEFAULT_TOPICS) -> list[Topic]:
    """Return topics of the running Python's language reference (`pydoc_data.topics`), in the given order.

    Raises:
        InvalidInputError: this Python has no topic with a given name.
    """
    topics: dict[str, str] = pydoc_data.topics.topics
    names = list(names)
    if unknown := [name for name in names if name not in topics]:
        raise InvalidInputError(
            f"this Python's reference has no topic {', '.join(map(repr, unknown))}. `help('topics')` lists them."
        )
    return [Topic(name, topics[name].strip()) for name in names]
