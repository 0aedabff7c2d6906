"""What needs vLLM and no server: programs that its own Python runs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.vllm.vllm_process import ENVIRONMENT, PYTHON, ROOT

REFUSED = {
    "no store": ("InvalidInputError", "names no store"),
    "a store that cannot be opened": ("StoreUnavailableError", "Not a directory"),
    "failed loads fail": ("InvalidInputError", "kv_load_failure_policy"),
    "asynchronous scheduling": ("InvalidInputError", "--no-async-scheduling"),
    "several GPUs": ("UnsupportedModelError", "one GPU per server"),
    "a draft model": ("UnsupportedModelError", "without speculative decoding"),
    "a sliding window": ("UnsupportedModelError", "all have full attention"),
    "a window within full attention": ("UnsupportedModelError", "layers with a window"),
    "windows beside full attention": ("UnsupportedModelError", "all have full attention"),
    "recurrent layers": ("UnsupportedModelError", "all have full attention"),
    "values of another size": ("UnsupportedModelError", "values of another size"),
    "a quantised cache": ("UnsupportedModelError", "--kv-cache-dtype auto"),
    "another attention backend": ("UnsupportedModelError", "--attention-backend FLASH_ATTN"),
    "blocks that attention splits": ("UnsupportedModelError", "--block-size 16"),
}


def said_by(module: str, *arguments: str) -> str:
    """The last line that a program prints which vLLM's Python runs."""
    if not PYTHON.exists():
        pytest.fail("there is no .venv-vllm: run `make test-vllm`")
    command = [str(PYTHON), "-m", f"tests.vllm.{module}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_flash_attentions_own_writer_and_our_layout_agree_in_every_order_of_memory() -> None:
    assert said_by("flash_attention_blocks") == "6 orders agree"


def test_what_cannot_be_loaded_right_is_refused_at_start(smollm2_path: Path, tmp_path: Path) -> None:
    said = json.loads(said_by("refusals", str(smollm2_path), str(tmp_path)))
    assert [said.pop(setting) for setting in ("nothing", "FlashAttention")] == [None, None]
    for setting, (error, words) in REFUSED.items():
        assert said[setting] is not None, setting
        assert said[setting][0] == error, setting
        assert words in said[setting][1], setting
    assert said.keys() == REFUSED.keys()
