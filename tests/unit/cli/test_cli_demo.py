"""`kvcag demo`: the clocks of both sides, and the output of a terminal without room for two columns."""

from __future__ import annotations

import io
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from kvcag.cli import common
from kvcag.cli.demo import _watched
from kvcag.core import Chunk, Usage
from kvcag.demo.corpus import Topic
from kvcag.demo.run import Demonstration, Runner
from tests.commands import Kvcag

ASKED = ["demo", "--corpus", "notes", "--question", "Who?", "--max-new-tokens", 6]


def test_a_clock_runs_during_its_own_turn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    waiting, side = Runner("waiting"), Runner("runs")
    usage = Usage(1, 0, 1, 2, 0.0, 0.0)
    shown: list[tuple[float | None, float | None]] = []

    def chunks() -> Iterator[Chunk]:
        yield Chunk("\n")
        yield Chunk("word")
        yield Chunk("", finish_reason="stop", usage=usage)

    answer = side.run(chunks(), lambda of, chunk: shown.append((of.first_s, of.total_s)))
    assert str(answer) == side.text == "\nword"
    assert shown == [(None, None), (1.0, None), (1.0, 2.0)]
    assert (side.clock_s, waiting.clock_s) == (2.0, 0.0)


def test_one_side_answers_and_then_the_other_with_the_same_model_and_tokens(tiny_folder: Path) -> None:
    demonstration = Demonstration(tiny_folder, [Topic("a", "One text."), Topic("b", "Another.")], max_new_tokens=5)
    list(demonstration.encode())
    full, cached = Runner("full"), Runner("cached")
    turns: list[tuple[str, float, float]] = []
    row = demonstration.ask(
        "Who?", full, cached, lambda side, chunk: turns.append((side.name, full.clock_s, cached.clock_s))
    )
    names = [name for name, _, _ in turns]
    assert names == sorted(names, reverse=True)
    assert {"full", "cached"} == set(names)
    assert {of_cached for name, _, of_cached in turns if name == "full"} == {0.0}
    assert {of_full for name, of_full, _ in turns if name == "cached"} == {full.total_s}
    assert demonstration.uncached.model is demonstration.cached.model
    assert row.same_answer
    assert (row.ttft_full_s, row.ttft_cached_s) == (full.first_s, cached.first_s)
    assert row.reused_tokens == row.context_tokens


def test_in_a_terminal_both_stand_side_by_side_and_one_clock_runs_at_a_time() -> None:
    usage = Usage(1, 0, 1, 2, 0.0, 0.0)
    shown = io.StringIO()
    console = Console(
        file=shown,
        force_terminal=True,
        color_system=None,
        no_color=False,
        width=90,
    )

    def chunks(word: str) -> Iterator[Chunk]:
        for _ in range(3):
            time.sleep(0.25)  # the clocks are drawn ten times a second
            yield Chunk(f"{word} ")
        yield Chunk("", finish_reason="stop", usage=usage)

    full, cached = Runner("reads everything"), Runner("from the cache")
    with _watched(console, (full, cached)) as on_piece:
        full.run(chunks("slow"), on_piece)
        cached.run(chunks("fast"), on_piece)
    frames = re.split(r"reads everything +from the cache", shown.getvalue())[1:]
    clocks = [re.split(r" {3,}", frame.splitlines()[1].strip()) for frame in frames]
    runs = r"(first word 0\.\d\d s, )?0\.\d s"
    left = [second for first, second in clocks if re.fullmatch(runs, first)]
    right = [first for first, second in clocks if re.fullmatch(runs, second)]
    assert len(left) > 2
    assert set(left) == {"waits for its turn"}
    assert len(right) > 2
    assert len(set(right)) == 1, "the first clock stands while the second runs"
    assert re.fullmatch(r"first word 0\.\d\d s, all 0\.\d\d s", right[0])
    assert re.search(r"slow slow slow +fast fast fast", frames[-1])


def test_in_a_pipe_one_side_stands_behind_the_other(kvcag: Kvcag) -> None:
    done = kvcag(*ASKED)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err
    clock = r"first word \d+\.\d\d s, all \d+\.\d\d s"
    told = rf"1\. Who\?.+reads everything:\n.+\n{clock}\n\nfrom the cache:\n.+\n{clock}\n\n.+to the first word instead"
    assert re.search(told, done.out, re.DOTALL), done.out
    assert "174 of 174 tokens reused; the same answer" in done.out
    assert done.err.endswith('next: kvcag ask notes "Your question?"\n')


def test_sixty_columns_are_enough(kvcag: Kvcag, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "terminal_width", lambda stream: 60)
    kvcag.environment |= {"COLUMNS": "60", "NO_COLOR": "1"}
    done = kvcag(*ASKED)
    assert done.code == 0, done.err
    assert max(map(len, (done.out + done.err).splitlines())) <= 60
    assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize(
    ("full", "cached", "said"),
    [(10.0, 0.1, "100 × faster"), (1.0, 0.1, "10 × faster"), (1.4, 1.0, "1.4 × faster"), (0.5, 1.0, "no faster")],
)
def test_the_speed_up_is_reported_truthfully(full: float, cached: float, said: str) -> None:
    assert common.faster(full, cached) == said
