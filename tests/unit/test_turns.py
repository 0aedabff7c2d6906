"""Answers first: who has the model, who waits, and what stepping aside costs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from waits import run_together, until

from kvcag import HFEngine
from kvcag.cache.layers import LayerKV
from kvcag.engines.background import encode_in_background
from kvcag.engines.model_lock import Interrupted, ModelLock
from kvcag.testing import byte_tokenizer, tiny_model

HEAD, TEXT = tuple(range(40, 60)), tuple(range(60, 200))


def same(left: list[LayerKV], right: list[LayerKV]) -> bool:
    return all(
        torch.allclose(a, b, atol=1e-5)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("piece_tokens", [1, 7, 64, 4096])
def test_encoding_in_pieces_gives_what_encoding_at_once_gives(piece_tokens: int, tiny_engine: HFEngine) -> None:
    whole = HFEngine(tiny_model(), byte_tokenizer()).encode_after(HEAD, TEXT)
    stop = threading.Event()
    layers, interruptions = encode_in_background(
        tiny_engine, HEAD, TEXT, stop=stop, piece_tokens=piece_tokens, quiet_s=0
    )
    assert same(layers, whole)
    assert interruptions == 0
    assert tiny_engine.prefixes.match(HEAD)[0] == len(HEAD)
    assert tiny_engine.prefixes.match((*HEAD, *TEXT))[0] == len(HEAD)  # the text is an item's, not a recent context


def test_a_piece_that_was_broken_off_between_layers_is_begun_again(tiny_engine: HFEngine) -> None:
    """A question at every layer but the last of several pieces: nothing is lost, doubled or left half."""
    asked = iter([0, 1, 2, 4, 5, 11])
    upcoming, seen = next(asked), -1

    def question() -> None:
        nonlocal upcoming, seen
        seen += 1
        if seen == upcoming:
            upcoming = next(asked, -1)
            tiny_engine.lock.announce()

    tiny_engine.lock.step_aside = before(question, tiny_engine.lock.step_aside)  # type: ignore[method-assign]
    layers, interruptions = encode_in_background(
        tiny_engine, HEAD, TEXT, stop=threading.Event(), piece_tokens=50, quiet_s=0
    )
    assert interruptions == 6
    assert same(layers, HFEngine(tiny_model(), byte_tokenizer()).encode_after(HEAD, TEXT))


def before(first: object, then: object) -> object:
    def both() -> None:
        first()  # type: ignore[operator]
        then()  # type: ignore[operator]

    return both


def test_an_answer_gets_the_model_while_something_is_encoded_ahead(tiny_engine: HFEngine) -> None:
    expected = HFEngine(tiny_model(), byte_tokenizer()).generate("What?", max_new_tokens=20)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(
            encode_in_background, tiny_engine, (), tuple(range(250)) * 8, stop=stop, piece_tokens=2, quiet_s=0.3
        )
        until(lambda: tiny_engine.lock._idle_owner)
        assert tiny_engine.generate("What?", max_new_tokens=20) == expected
        assert not encoding.done()
        assert tiny_engine.lock._idle_owner is None  # it waits until it has been quiet for a while
        stop.set()
        with pytest.raises(Interrupted):
            encoding.result(30)


def test_spare_work_waits_for_a_silence() -> None:
    turns, stop = ModelLock(), threading.Event()
    with turns.acquire():
        pass
    began = time.monotonic()
    with turns.idle(0.2, stop):
        assert time.monotonic() - began >= 0.19
        turns.step_aside()
        turns.announce()
        with pytest.raises(Interrupted):
            turns.step_aside()


def test_spare_work_that_shall_stop_never_gets_the_model() -> None:
    turns, stop = ModelLock(), threading.Event()
    turns.announce()
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Interrupted), turns.idle(60, stop):
        pytest.fail("it was not quiet for a minute")


def test_a_turn_may_be_taken_again_within_it_and_by_others_after_an_error() -> None:
    turns = ModelLock()
    with pytest.raises(ValueError, match="in the middle"), turns.acquire(), turns.acquire():
        raise ValueError("in the middle")
    run_together([threading.Thread(target=lambda: turns.acquire().__enter__())], seconds=1)
