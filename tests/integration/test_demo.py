"""`kvcag demo` as its user meets it: a process, its exit code, what it prints and writes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from kvcag import __version__
from kvcag.cli import main
from kvcag.testing import byte_tokenizer, tiny_model


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def kvcag(monkeypatch, capsys) -> Callable[..., Done]:
    """Runs the command in this process, where torch is loaded already."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["kvcag", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(eos_token_id=None).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    file = tmp_path / "notes.jsonl"
    texts = ["The lighthouse of Varn is painted green.", "Its keeper is called Ode.", "The harbour opens at five."]
    file.write_text("".join(json.dumps({"title": f"[b]{text[:9]}", "text": text}) + "\n" for text in texts))
    return file


def test_the_embedded_model_answers_the_same_from_caches(kvcag, smollm2_path, corpus):
    question = "Who keeps the lighthouse?"
    done = kvcag("demo", "--corpus", corpus, "--question", question, "--json", "--max-new-tokens", 16)
    assert done.code == 0, done.err
    written = json.loads(done.out)
    assert written["model"] == "SmolLM2-135M-Instruct"
    assert written["encode_s"] > 0
    assert written["cache_bytes"] == written["corpus_tokens"] * 2 * 30 * 3 * 64 * 4  # layers, KV heads, head_dim, fp32
    (row,) = written["questions"]
    assert row["question"] == "Who keeps the lighthouse?"
    assert row["same_answer"] is True
    assert row["answer"] == row["answer_full"] != ""
    assert (row["encoded_tokens"], row["recomputed_tokens"]) == (0, 0)
    assert row["context_tokens"] == row["reused_tokens"] == written["corpus_tokens"]
    assert row["ttft_cached_s"] > 0
    assert row["ttft_full_s"] > 0
    for shown in (
        "1. Who keeps the lighthouse?",
        "reads everything:",
        "from the cache:",
        "to the first word",
        "the same answer",
    ):
        assert shown in done.err  # stdout is the JSON alone
    assert row["answer"].split()[0] in done.err


@pytest.fixture(scope="module")
def int8_folder(smollm2_path, tmp_path_factory) -> Path:
    """A checkpoint with int8 weights, as people save and load them."""
    torchao = pytest.importorskip("torchao.quantization")
    folder = tmp_path_factory.mktemp("int8")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(smollm2_path, quantization_config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_path).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strategy", ["exact", "rotate", "query"])
def test_the_embedded_model_with_int8_weights_of_torchao_does_the_demo(kvcag, int8_folder, corpus, strategy):
    arguments = ["--model", int8_folder, "--corpus", corpus, "--max-new-tokens", 16, "--json"]
    done = kvcag("demo", *arguments, "--strategy", strategy, "--question", "Who keeps the lighthouse?")
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)["questions"]
    assert row["encoded_tokens"] == 0
    assert row["answer"] != ""
    assert row["same_answer"] or strategy != "exact"


@pytest.mark.parametrize(("strategy", "recomputes"), [("exact", False), ("rotate", False), ("query", True)])
def test_strategies_account_for_every_token(kvcag, tiny_folder, corpus, strategy, recomputes):
    arguments = ["--model", tiny_folder, "--corpus", corpus, "--max-new-tokens", 4, "--json"]
    done = kvcag("demo", *arguments, "--strategy", strategy, "--question", "one?", "--question", "two?")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["questions"]
    assert [row["question"] for row in rows] == ["one?", "two?"]
    for row in rows:
        assert row["encoded_tokens"] == 0
        assert row["reused_tokens"] + row["recomputed_tokens"] == row["context_tokens"]
        assert (row["recomputed_tokens"] > 0) is recomputes


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--corpus", "nowhere"], "nowhere: no such file or folder"),
        (["--model", "/nowhere/at/all"], "the model '/nowhere/at/all' could not be loaded"),
        (["--strategy", "sideways"], "sideways"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--max-new-tokens", "9000"], "--max-new-tokens 9,000"),
    ],
)
def test_what_cannot_work_is_one_message_and_exit_code_2(kvcag, tiny_folder, arguments, complaint):
    done = kvcag("demo", "--model", tiny_folder, *arguments)
    assert done.code == 2
    assert complaint in done.err
    assert "Traceback" not in done.err
    assert "encoding" not in done.out


def test_control_c_ends_it_with_130_and_no_traceback(tiny_folder, corpus):
    arguments = ["--model", tiny_folder, "--corpus", corpus, "--max-new-tokens", 1500]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvcag", "demo", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(r"1\. ", line):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("interrupted\n")
    assert "Traceback" not in out + err


def test_the_version_is_the_package_s(kvcag):
    assert kvcag("--version") == (0, f"kvcag {__version__}\n", "")
