"""The demonstration's corpus: topics of Python's language reference, which every CPython contains."""

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
"""Twelve topics of every CPython since 3.10, about 2,100 tokens. `DEFAULT_QUESTIONS` ask about the last ones, where a
small model finds the answers."""

DEFAULT_QUESTIONS = (
    "What happens when 0.0 is raised to a negative power?",
    "What exception is raised if the name is unbound?",
    "What does an imaginary literal yield?",
    'What is the "while" statement used for?',
)
"""Questions that a model of 135M parameters answers from the default topics."""

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
        title: its name: a topic's, a file's, or the title in a JSON object.
        text: never blank.
    """

    title: str
    text: str


def python_topics(names: Iterable[str] = DEFAULT_TOPICS) -> list[Topic]:
    """Return topics of the running Python's language reference (`pydoc_data.topics`), in the order given.

    Raises:
        InvalidInputError: this Python has no topic of that name.
    """
    topics: dict[str, str] = pydoc_data.topics.topics
    names = list(names)
    if unknown := [name for name in names if name not in topics]:
        raise InvalidInputError(
            f"this Python's reference has no topic {', '.join(map(repr, unknown))}. `help('topics')` lists them."
        )
    return [Topic(name, topics[name].strip()) for name in names]
