"""Which model made a cache: keys and values mean something to the weights that made them, and to nothing else."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLES_PER_TENSOR = 256
"""Weights are hashed by an even sample of each tensor: a fine-tune or an adapter touches all of them, and reading
every byte of an 8B model would take longer than loading a cache saves."""

_DESCRIPTIVE = {"model_name", "revision"}
"""Fields for people: the same weights under another path, or copied to another machine, are the same model."""


class ModelFingerprint(BaseModel):
    """What must be equal for a cache to be usable. Two fingerprints match when their `digest` is equal.

    `model_name` and `revision` are written down for people and not compared: `weights` says it better.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model_name: str
    revision: str | None = None
    architecture: str
    dtype: str
    geometry: str
    """`layers x kv_heads x head_dim` of the decoder."""
    rope: str
    """The RoPE parameters, as canonical JSON."""
    adapter: str | None = None
    """The active adapter's name, where one is loaded and not merged into the weights."""
    weights: str
    """SHA-256 over an even sample of every parameter."""
    tokenizer: str
    """SHA-256 over the vocabulary, the special tokens and the normaliser."""
    template: str
    """SHA-256 over the chat template; empty without one."""

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelFingerprint:
        """Take the fingerprint of live objects. Reads 256 values of each parameter, on whatever device they are."""
        config = model.config.get_text_config(decoder=True)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {
            "rope_theta": getattr(config, "rope_theta", None),
            "rope_scaling": getattr(config, "rope_scaling", None),
        }
        adapter = getattr(model, "active_adapter", None) if hasattr(model, "peft_config") else None
        template = getattr(tokenizer, "chat_template", None) or ""
        return cls(
            model_name=getattr(model, "name_or_path", "") or type(model).__name__,
            revision=getattr(config, "_commit_hash", None),
            architecture=type(model).__name__,
            dtype=str(model.dtype).removeprefix("torch."),
            geometry=f"{config.num_hidden_layers}x{kv_heads}x{head_dim}",
            rope=json.dumps(rope, sort_keys=True, default=str),
            adapter=str(adapter) if adapter is not None else None,
            weights=_weights_digest(model),
            tokenizer=_tokenizer_digest(tokenizer),
            template=_sha256(json.dumps(template, sort_keys=True)) if template else "",
        )

    @property
    def digest(self) -> str:
        """SHA-256, in hex, over everything that must be equal."""
        return _sha256(self.model_dump_json(exclude=_DESCRIPTIVE))

    def matches(self, other: ModelFingerprint) -> bool:
        """Whether a cache made under `other` may be used under this one."""
        return self.digest == other.digest

    def differences(self, other: ModelFingerprint) -> list[str]:
        """One line for each compared field in which `other` differs: `dtype: float32, not bfloat16`."""
        mine, theirs = self.model_dump(exclude=_DESCRIPTIVE), other.model_dump(exclude=_DESCRIPTIVE)
        return [
            f"{field}: {_short(theirs[field])}, not {_short(mine[field])}"
            for field in mine
            if mine[field] != theirs[field]
        ]


def _weights_digest(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if not parameter.is_meta:  # offloaded to disk: name and shape are all there is to read
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLES_PER_TENSOR)].contiguous().cpu()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described: Any = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return _sha256(json.dumps([described, sorted(tokenizer.all_special_tokens)]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text  # a digest
