"""A model and its tokenizer, from a hub id or a folder, onto the best device."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

_HUB = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")


def load(
    name: str, dtype: str | torch.dtype, device: str | torch.device, settings: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load both. `settings` go to the model; what concerns the hub goes to the tokenizer too."""
    tokenizer = AutoTokenizer.from_pretrained(name, **{key: settings[key] for key in _HUB if key in settings})
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **settings)
    if "device_map" not in settings:
        torch.nn.Module.to(model, _best_device() if device == "auto" else torch.device(device))
    return model, tokenizer


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
