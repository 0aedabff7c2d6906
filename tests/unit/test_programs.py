"""Programs as the frameworks' documentation has them: each prints what is kept beside it.

A program runs in a folder of its own, with a tiny random model in `model`. What it prints is in the file of the same
name that ends in `.txt`; `WRITE_PROGRAMS=1 python -m pytest tests/unit/test_programs.py` writes these files anew.
"""

from __future__ import annotations

import asyncio
import gc
import os
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcag.testing import byte_tokenizer, tiny_model

PROGRAMS = sorted(Path(__file__).parents[1].joinpath("programs").glob("*/*.py"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program") / "model"
    tiny_model(max_position_embeddings=1 << 14).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def _settings_as_they_were() -> Iterator[None]:
    import llama_index.core
    from llama_index.core import Settings

    settings, tokenizer = dict(vars(Settings)), llama_index.core.global_tokenizer
    yield
    vars(Settings).clear()
    vars(Settings).update(settings)
    llama_index.core.global_tokenizer = tokenizer
    asyncio.set_event_loop(None)
    gc.collect()  # core's `Memory` does not close its database, which warns when it is collected


@pytest.mark.usefixtures("_settings_as_they_were")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # agents read what they deprecate themselves
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # langgraph, when it is first imported
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # core's `Memory`, see the fixture
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_program_prints_what_is_kept_beside_it(
    program: Path,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model_folder)
    runpy.run_path(str(program), run_name="__main__")
    printed, kept = capsys.readouterr().out, program.with_suffix(".txt")
    if "WRITE_PROGRAMS" in os.environ:
        kept.write_text(printed)
    assert printed == kept.read_text()


@pytest.mark.parametrize("framework", ["langchain", "llama_index"])
def test_there_are_fifteen_for_each_framework(framework: str) -> None:
    assert len([path for path in PROGRAMS if path.parent.name == framework]) >= 15
