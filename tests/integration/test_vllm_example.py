"""The example in which one line differs between a process and a server, over the real model on either side.

`make test-vllm` runs all of it over a real server; here the LangChain half, over the server of the test suite.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from kvcag import HFEngine, VLLMEngine
from tests.wire_server import WireServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm_server.py"


def test_the_example_answers_alike_in_a_process_and_on_a_server(smollm2_engine: HFEngine, smollm2_path: Path) -> None:
    ask = runpy.run_path(str(EXAMPLE))["ask_langchain"]
    ours = ask(smollm2_engine)
    served = HFEngine(smollm2_engine.model, smollm2_engine.tokenizer)
    with WireServer(served, "smollm2") as server, VLLMEngine(server.url, tokenizer=smollm2_path) as engine:
        theirs = ask(engine)
    assert [answer["text"] for answer in theirs] == [answer["text"] for answer in ours]
    assert [answer["prompt_tokens"] for answer in theirs] == [answer["prompt_tokens"] for answer in ours]
    assert theirs[0]["prompt_tokens"] >= 1400
    assert theirs[1]["cached_tokens"] >= 1300
