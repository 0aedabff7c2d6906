"""One use is counted once, however many places show it; and what stands for what is found out by looking."""

from __future__ import annotations

from kvcag.chat_template import Prompt
from kvcag.scheduler.counters import Counters, digest_of


def prompt(*texts: str, head: tuple[int, ...] = (1, 2)) -> Prompt:
    return Prompt(head, tuple(tuple(text.encode()) for text in texts), (9,), documents=texts)


def count(counters: Counters, text: str) -> int:
    return counters.use_of(digest_of(text)).count


def test_what_is_retrieved_and_then_asked_is_one_use() -> None:
    counters = Counters()
    counters.retrieved("one")
    counters.retrieved("two")
    counters.asked(prompt("one\n\n", "two\n\n"))
    assert count(counters, "one") == count(counters, "two") == 1
    counters.asked(prompt("one\n\n"))
    assert count(counters, "one") == 2


def test_two_questions_at_once_are_two_uses() -> None:
    counters = Counters()
    for _ in range(2):
        counters.retrieved("one")
    for _ in range(2):
        counters.asked(prompt("one\n\n"))
    assert count(counters, "one") == 2


def test_what_stands_after_a_text_is_learnt_from_the_prompt() -> None:
    counters = Counters()
    counters.retrieved("one\n")
    counters.retrieved("two")
    counters.asked(prompt("one\n\n\n"))
    place = counters.place_for(counters.known[digest_of("two")])
    assert place is not None
    assert (place.head_ids, place.ending) == ((1, 2), "\n\n")


def test_a_text_that_prompts_show_in_another_form_is_counted_in_that_form() -> None:
    counters = Counters()
    counters.retrieved("The tower is tall.", identity="chunk-1")
    counters.asked(prompt("Source: a\nThe tower is tall.\n\n"))
    shown = digest_of("Source: a\nThe tower is tall.")
    assert counters.known.keys() == {shown}
    assert counters.identities == {"chunk-1": shown}
    counters.retrieved("The tower is tall.")
    counters.asked(prompt("Source: a\nThe tower is tall.\n\n"))
    assert counters.known.keys() == {shown}
    assert counters.use_of(shown).count == 2
    counters.retrieved("It is red.")  # how that will stand is not known, so nothing is encoded for it ahead
    assert counters.place_for(counters.known[digest_of("It is red.")]) is None


def test_another_text_under_the_same_identity_replaces_it() -> None:
    counters = Counters()
    counters.retrieved("old", identity="a")
    counters.retrieved("old", identity="b")
    counters.retrieved("new", identity="a")
    assert counters.changed == []  # b still stands for it
    counters.retrieved("new", identity="b")
    assert counters.changed == [digest_of("old")]


def test_nothing_ages_while_nobody_asks_and_a_round_is_as_many_uses_as_texts() -> None:
    counters = Counters()
    for number in range(50):
        counters.retrieved(f"text {number}")
    begin = counters.now
    for number in range(50):
        counters.retrieved(f"text {number}")
    assert abs(counters.now - begin - 1) < 1e-9


def test_a_text_that_was_purged_while_it_was_asked_is_no_error() -> None:
    counters = Counters()
    counters.retrieved("one")
    counters.forget(digest_of("one"))
    counters.asked(prompt("one\n\n"))
    assert count(counters, "one") == 1


def test_prompts_with_a_head_of_their_own_each_do_not_pile_up() -> None:
    counters = Counters()
    for number in range(200):
        counters.asked(prompt("one", head=(number,)))
    assert len(counters.places) == 64
