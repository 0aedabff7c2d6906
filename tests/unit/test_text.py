from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvcag.engines.decode import Detokenizer, StopStrings, ThinkingFilter
from kvcag.testing import byte_tokenizer

TOKENIZER = byte_tokenizer()


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


@given(st.text())
def test_the_pieces_join_to_the_text(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    token_ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    out = [detokenizer.push(token) for token in token_ids]
    assert "".join(out) + detokenizer.flush() == TOKENIZER.decode(token_ids, skip_special_tokens=True)


def test_a_character_is_given_out_whole() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    out = [detokenizer.push(token) for token in TOKENIZER("a🙂é", add_special_tokens=False)["input_ids"]]
    assert out == ["a", "", "", "", "🙂", "", "é"]


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    first = TOKENIZER("🙂", add_special_tokens=False)["input_ids"][0]
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "\ufffd"


@given(
    st.text(alphabet="abc", max_size=40),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 40), max_size=10),
)
def test_a_stop_string_is_never_partly_given_out(text: str, stops: list[str], cuts: list[int]) -> None:
    stop, out = StopStrings(stops), ""
    for piece in pieces(text, cuts):
        out += stop.push(piece)
        assert not any(s in out for s in stops)
        if stop.found:
            break
    else:
        out += stop.flush()
    first = min((text.find(s) for s in stops if s in text), default=None)
    assert stop.found == (first is not None)
    # A longer stop string may have to be waited for, so the cut is at the first one that was completed.
    assert text.startswith(out)
    assert out == text if first is None else len(out) >= first


def test_a_stop_string_that_spans_pieces_is_cut() -> None:
    stop = StopStrings(["\nUser:"])
    assert [stop.push(piece) for piece in ("fine.\n", "Us", "er", ": more")] == ["fine.", "", "", ""]
    assert stop.found


def test_what_only_began_like_a_stop_string_is_given_out() -> None:
    stop = StopStrings(["\nUser:"])
    assert stop.push("a\nUs") + stop.push("ed") + stop.flush() == "a\nUsed"


@given(st.lists(st.integers(0, 60), max_size=12))
def test_thinking_is_left_out_wherever_it_is_cut(cuts: list[int]) -> None:
    text = "Before.<think>let me\nsee</think>\n\nThe answer <thin is 4."
    thinking = ThinkingFilter(thinking=False)
    out = "".join(thinking.push(piece) for piece in pieces(text, cuts)) + thinking.flush()
    assert out == "Before.The answer <thin is 4."


def test_thinking_that_the_prompt_opened_is_left_out() -> None:
    thinking = ThinkingFilter(thinking=True)
    assert thinking.push("I wonder</th") + thinking.push("ink>\n\n42") + thinking.flush() == "42"


def test_thinking_that_never_ends_leaves_nothing() -> None:
    thinking = ThinkingFilter(thinking=False)
    assert thinking.push("<think>on and on") + thinking.flush() == ""
