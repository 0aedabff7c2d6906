"""Whatever a server sends, an answer is read from it or an error of ours is raised."""

from __future__ import annotations

import contextlib
import json
import warnings
from typing import Any

import pytest
from hypothesis import strategies as st

from kvcag import KVCAGError
from kvcag.core import Chunk
from tests.fuzzing import SECONDS, changed_bytes, changed_json, fuzz
from tests.unit.engines.vllm.test_vllm_hostile import engine_over

pytestmark = pytest.mark.timeout(SECONDS + 240)

EVENTS: list[Any] = [
    {"id": "1", "choices": [{"index": 0, "text": "one ", "finish_reason": None}]},
    {"id": "1", "choices": [{"index": 0, "text": "two", "finish_reason": "stop"}]},
    {
        "choices": [],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
    },
    {"error": {"message": "out of memory", "type": "InternalError", "code": 500}},
]


def lines(events: Any) -> bytes:
    sent = events if isinstance(events, list) else [events]
    return b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in sent) + b"data: [DONE]\n\n"


@st.composite
def pieces(draw: st.DrawFn) -> list[bytes]:
    """A stream of events, cut anywhere."""
    sound = lines(EVENTS[:3])
    data = draw(
        changed_bytes(sound)
        | changed_bytes(lines(EVENTS))
        | changed_json(EVENTS[:3]).map(lines)
        | changed_json(EVENTS).map(lines)
        | st.binary(max_size=200)
    )
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def test_any_events_are_an_answer_or_an_error_of_ours() -> None:
    sent: list[bytes] = []
    with engine_over(lambda: list(sent)) as engine, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompt = engine.template.prompt([{"role": "user", "content": "?"}])

        def check(given: list[bytes]) -> None:
            sent[:] = given
            chunks: list[Chunk] = []
            with contextlib.suppress(KVCAGError):
                chunks += engine.stream(prompt, engine.sampling(max_new_tokens=8))
            assert all(isinstance(chunk, Chunk) and isinstance(chunk.text, str) for chunk in chunks)
            assert len(chunks) < 30

        fuzz(pieces(), check)
