"""A model for a command: loaded where a command needs its weights, with one message where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvcag.cli import output
from kvcag.errors import InvalidInputError, KVCAGError

if TYPE_CHECKING:
    from kvcag.engines.hf import HFEngine


def resolve(model: str | None) -> tuple[str, str]:
    """The name of a model and where to load it from: as given, or the embedded one, fetched if it is not there."""
    console = output.stderr()
    with console.status("importing torch and transformers"):
        import transformers

        from kvcag.demo.model import SMOLLM2, embedded_model
    transformers.utils.logging.disable_progress_bar()  # its bars would cut through ours
    if model:
        return model, model
    return SMOLLM2.name, str(embedded_model(say=console.print))


def load_engine(model: str | None, **settings: Any) -> HFEngine:
    """A model and its tokenizer.

    Raises:
        InvalidInputError: there is no such model, or transformers cannot load it.
    """
    name, folder = resolve(model)
    with loading(name):
        from kvcag.engines.hf import HFEngine

        return HFEngine.from_pretrained(folder, **settings)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Say that a model is loaded, and what to do where transformers refuses it.

    Raises:
        InvalidInputError: there is no such model, or transformers cannot load it.
    """
    try:
        with output.stderr().status(f"loading {name}"):
            yield
    except KVCAGError:
        raise
    except (OSError, ValueError) as refused:
        reason = next(iter(str(refused).strip().splitlines()), type(refused).__name__)
        raise InvalidInputError(
            f"the model {name!r} could not be loaded: {reason} Name a folder that save_pretrained wrote, or a hub id."
        ) from refused
