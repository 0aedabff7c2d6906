"""A real vLLM server on 127.0.0.1, with the embedded model in fp32. `make test-vllm` installs and runs it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcag import HFEngine, VLLMEngine
from tests.vllm.vllm_process import PYTHON, Vllm

_FIGURES: list[str] = []


@pytest.fixture
def figures() -> Callable[[str], None]:
    """Prints a figure at the end of the run."""
    return _FIGURES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FIGURES:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(_FIGURES))


@pytest.fixture(scope="session")
def vllm(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    if not PYTHON.exists():
        pytest.fail("there is no .venv-vllm: run `make test-vllm`")
    with Vllm(smollm2_path, tmp_path_factory.mktemp("vllm") / "server.log") as server:
        yield server


@pytest.fixture
def engine(vllm: Vllm, smollm2_path: Path) -> Iterator[VLLMEngine]:
    """An engine with its own salt, so that tests share no cached tokens."""
    with VLLMEngine(vllm.url, tokenizer=smollm2_path, salt_secret=os.urandom(8).hex()) as made:
        yield made


@pytest.fixture
def here(smollm2_engine: HFEngine) -> HFEngine:
    """The same model in this process."""
    return smollm2_engine
