"""Many clients at a service over one model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx

from kvcag import HFEngine, KVCacheMemory
from kvcag.testing import byte_tokenizer, tiny_model
from tests.service import app_of, asked, serving
from tests.waits import until

TEXTS = ["The library opens at nine. " * 8, "It is in Harbour Street. " * 8]


def test_of_sixteen_clients_eight_disconnect_and_the_others_get_their_own_text() -> None:
    engine = HFEngine(tiny_model(), byte_tokenizer())
    memory = KVCacheMemory(engine)
    memory.add(TEXTS)
    settings = {"strategy": "exact", "max_new_tokens": 24}
    questions = [f"What about question {number}?" for number in range(16)]
    expected = [memory.ask(question, **settings).text for question in questions]
    before = {thread.name for thread in threading.enumerate()}
    with serving(app_of(memory, **settings)) as address, ThreadPoolExecutor(16) as clients:
        answers = list(
            clients.map(
                lambda number: asked(address, questions[number], leave_after=number % 3 if number % 2 else None),
                range(16),
            )
        )
        assert answers[::2] == expected[::2]
        assert httpx.get(f"{address}/health").json() == {"ok": True}
        until(lambda: engine.lock._holder is None and not engine.lock._answers)
    until(lambda: {thread.name for thread in threading.enumerate()} <= before)
    assert memory.ask(questions[1], **settings).text == expected[1]
