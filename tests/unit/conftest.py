from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.commands import Kvcag, saved_model, write


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A tiny model is slower on two threads than on one, most of all where other processes want them too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _what_is_learned_stays_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What an engine learns about a random model is nothing to keep for the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVCAG_CACHE", str(tmp_path_factory.mktemp("kvcag")))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer, saved."""
    return saved_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def kvcag(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Kvcag:
    """The command, with a tiny model, a store of its own, and `notes/` to encode in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVCAG_DEBUG", raising=False)
    write(tmp_path / "notes" / "a.md", "The lighthouse of Varn is painted green.\n")
    write(tmp_path / "notes" / "sub" / "b.txt", "Its keeper is called Ode.\n\nShe has a dog.\n")
    return Kvcag(tmp_path, tiny_folder)
