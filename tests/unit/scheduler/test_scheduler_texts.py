"""Each use is counted once, and the form of texts in prompts is learnt from prompts."""

from __future__ import annotations

from kvcag.chat_template import Prompt
from kvcag.scheduler.texts import Texts, digest_of


def prompt(*texts: str) -> Prompt:
    return Prompt((1, 2), tuple(tuple(text.encode()) for text in texts), (9,), documents=texts)


def count(texts: Texts, text: str) -> int:
    return texts.stats(digest_of(text)).count


def test_a_text_that_is_retrieved_and_then_asked_has_one_use() -> None:
    texts = Texts(None, "model")
    texts.retrieved("one")
    texts.retrieved("two")
    texts.asked(prompt("one\n\n", "two\n\n"))
    assert count(texts, "one") == count(texts, "two") == 1
    texts.asked(prompt("one\n\n"))
    assert count(texts, "one") == 2


def test_two_questions_at_once_are_two_uses() -> None:
    texts = Texts(None, "model")
    for _ in range(2):
        texts.retrieved("one")
    for _ in range(2):
        texts.asked(prompt("one\n\n"))
    assert count(texts, "one") == 2


def test_the_ending_of_a_text_is_learnt_from_the_prompt() -> None:
    texts = Texts(None, "model")
    texts.retrieved("one\n")
    texts.retrieved("two")
    texts.asked(prompt("one\n\n\n"))
    assert (texts.head_ids, texts.ending) == ((1, 2), "\n\n")


def test_a_text_that_prompts_show_in_another_form_is_counted_in_that_form() -> None:
    texts = Texts(None, "model")
    texts.retrieved("The tower is tall.", identity="chunk-1")
    texts.asked(prompt("Source: a\nThe tower is tall.\n\n"))
    shown = digest_of("Source: a\nThe tower is tall.")
    assert texts.known.keys() == {shown}
    assert texts._identities == {"chunk-1": shown}
    texts.retrieved("The tower is tall.")
    texts.asked(prompt("Source: a\nThe tower is tall.\n\n"))
    assert texts.known.keys() == {shown}
    assert texts.stats(shown).count == 2
    assert texts.ending is None  # how another text will stand is not known, so it is not encoded ahead


def test_another_text_under_the_same_identity_replaces_it() -> None:
    texts = Texts(None, "model")
    texts.retrieved("old", identity="a")
    texts.retrieved("old", identity="b")
    texts.retrieved("new", identity="a")
    assert texts.known.keys() == {digest_of("old"), digest_of("new")}  # b still stands for it
    texts.retrieved("new", identity="b")
    assert texts.known.keys() == {digest_of("new")}


def test_nothing_ages_without_questions_and_a_round_is_as_many_uses_as_texts() -> None:
    texts = Texts(None, "model")
    for number in range(50):
        texts.retrieved(f"text {number}")
    begin = texts.now
    for number in range(50):
        texts.retrieved(f"text {number}")
    assert abs(texts.now - begin - 1) < 1e-9


def test_a_text_that_was_purged_while_it_was_asked_is_no_error() -> None:
    texts = Texts(None, "model")
    texts.retrieved("one")
    texts.forget({digest_of("one")})
    texts.asked(prompt("one\n\n"))
    assert count(texts, "one") == 1
