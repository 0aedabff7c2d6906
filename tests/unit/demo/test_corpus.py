"""The demonstration's corpus: Python's own topics."""

import pytest

from kvcag.demo.corpus import DEFAULT_QUESTIONS, DEFAULT_TOPICS, python_topics
from kvcag.errors import InvalidInputError


def test_a_dozen_topics_of_the_running_python():
    documents = python_topics()
    assert [document.title for document in documents] == list(DEFAULT_TOPICS)
    assert len(set(DEFAULT_TOPICS)) == 12
    assert 4_000 < sum(len(document.text) for document in documents) < 12_000


def test_the_default_topics_answer_the_default_questions():
    text = " ".join(" ".join(document.text.split()) for document in python_topics())
    assert len(DEFAULT_QUESTIONS) == 4
    for answer in ('results in a "ZeroDivisionError"', '"NameError" exception will be raised', "real part of 0.0"):
        assert answer in text
    assert 'The "while" statement is used for repeated execution as long as an expression is true' in text


def test_an_unknown_topic_is_named():
    with pytest.raises(InvalidInputError, match="'no-such-topic'"):
        python_topics(["break", "no-such-topic"])
