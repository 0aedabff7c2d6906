"""Records which model and which texts made a cache. A cache works only with the model that produced it.

Importing this module does not load torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import lru_cache
from itertools import chain
from operator import attrgetter, is_not, methodcaller
from typing import TYPE_CHECKING, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DESCRIPTIVE = {"model_name", "revision"}
"""Fields that are not compared: the same weights under another path or on another machine are the same model."""

_NOT_COMPUTED_WITH = {
    *("transformers_version", "architectures", "dtype", "torch_dtype", "auto_map", "tokenizer_class", "problem_type"),
    *("id2label", "label2id", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
}
"""Configuration settings that do not change keys and values. Private settings and token ids do not either."""


class KVCacheRecords(BaseModel):
    """The texts that a cache was made from. The name and the fields are MemOS's.

    Attributes:
        text_memories: the texts.
        composed_text_memory: the text that was encoded, made of them.
        timestamp: when the record was made, in UTC.
    """

    text_memories: list[str] = Field(default_factory=list)
    composed_text_memory: str = ""
    timestamp: datetime = Field(default_factory=lambda: datetime.now(timezone.utc))


class ModelFingerprint(BaseModel):
    """The properties of a model that must be equal for a cache to be usable. Models match if their `digest` is equal.

    `model_name` and `revision` are for people and are not compared: `weights` identifies the model.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model_name: str
    revision: str | None = None
    architecture: str
    dtype: str
    geometry: str
    """`layers x kv_heads x head_dim` of the decoder."""
    config: str = "{}"
    """The configuration as canonical JSON, without settings that do not change keys and values."""
    adapter: str | None = None
    """The names of the active adapters that are not merged into the weights."""
    weights: str
    """SHA-256 over all weights and persistent buffers, including active adapters."""
    tokenizer: str
    """SHA-256 over the tokenizer (vocabulary, normaliser …) and its special tokens."""
    template: str
    """SHA-256 over the chat template; empty without one."""

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelFingerprint:
        """Compute the fingerprint of a loaded model. Reads every weight once, on the weight's own device."""
        base: Any = getattr(model, "get_base_model", lambda: model)()  # a PEFT model is a wrapper
        config = base.config.get_text_config(decoder=True)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        template = getattr(tokenizer, "chat_template", None) or ""
        adapters = {name for part in base.modules() for name in _active_adapters(part)}
        return cls(
            model_name=getattr(base, "name_or_path", "") or type(base).__name__,
            revision=getattr(config, "_commit_hash", None),
            architecture=type(base).__name__,
            dtype=str(base.dtype).removeprefix("torch."),
            geometry=f"{config.num_hidden_layers}x{kv_heads}x{head_dim}",
            config=_canonical(_computed_with(config.to_dict())),
            adapter=", ".join(sorted(adapters)) or None,
            weights=_weights_digest(model),
            tokenizer=_tokenizer_digest(tokenizer),
            template=_sha256(json.dumps(template, sort_keys=True)) if template else "",
        )

    @property
    def digest(self) -> str:
        """SHA-256, in hex, over all compared fields."""
        return _digest_of(self)

    def matches(self, other: ModelFingerprint) -> bool:
        """Return whether caches made by the model of `other` may be used with this model."""
        return self.digest == other.digest

    def differences(self, other: ModelFingerprint) -> list[str]:
        """Return one line for each compared field in which `other` differs: `dtype: float32, not bfloat16`."""
        mine, theirs = (each.model_dump(exclude=_DESCRIPTIVE) for each in (self, other))
        for fields in (mine, theirs):
            fields |= _settings(fields.pop("config"))
        return [
            f"{field}: {_short(theirs.get(field))}, not {_short(mine.get(field))}"
            for field in {**mine, **theirs}
            if mine.get(field) != theirs.get(field)
        ]


@lru_cache(maxsize=256)
def _digest_of(fingerprint: ModelFingerprint) -> str:
    return _sha256(fingerprint.model_dump_json(exclude=_DESCRIPTIVE))


def _settings(config: str) -> dict[str, Any]:
    """Return the settings by name. The text may come from a file, and may not be JSON."""
    try:
        return {f"config.{name}": value for name, value in json.loads(config).items()}
    except (ValueError, AttributeError, RecursionError):
        return {"config": config}


def _computed_with(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that may change keys and values, which includes all unknown settings."""
    return {
        name: _computed_with(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if isinstance(name, str)
        and not (name.startswith("_") or name.endswith("_token_id") or name in _NOT_COMPUTED_WITH)
    }


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


# --- weights -------------------------------------------------------------------------------------------------------

_ROW, _ROWS = 64, {"cpu": 1 << 13}
"""The number of 8-byte words that are summed as one row, and how many rows are summed at a time. On a CPU, so many rows
fit into the CPU's cache."""

_MASK = hashlib.shake_256(b"kvcag").digest(8 * _ROW)
"""Each word of a row is XORed with the mask's word at the same place, so that swapping two words changes the sum."""


_ADAPTERS = {"_active_adapter", "merged_adapters"}
"""Attributes by which PEFT's wrapper layers are recognised."""
_WRAPPED = {"base_layer", "original_module", ""}
"""The attribute names under which a wrapper layer has the model's original layer."""


_VERSION, _ADDRESS = attrgetter("_version"), methodcaller("data_ptr")


class WeightsWatch:
    """Detects whether weights were replaced or edited, or adapters were loaded, switched, merged or unloaded.

    The state of the model is recorded in the constructor and compared by `sees_change`, which every question calls. It
    takes 0.1 ms for a model of 36 layers, which matters on a GPU.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        modules = [module.__dict__ for module in model.modules()]
        self._parents = [parts for parts in modules if parts["_modules"]]
        self._owners = [parts for parts in modules if parts["_parameters"]]
        self._objects, self._state = self._now()

    def sees_change(self) -> bool:
        """Whether the model changed since this object was made."""
        objects, state = self._now()
        return len(objects) != len(self._objects) or any(map(is_not, objects, self._objects)) or state != self._state

    def _now(self) -> tuple[list[object], list[object]]:
        """Return modules and tensors, to be compared by identity, and a state, to be compared by equality."""
        children = chain.from_iterable([parts["_modules"].values() for parts in self._parents])
        weights = [
            parts["_parameters"].values()
            for parts in self._owners
            # accelerate's offloading makes new tensors in each pass
            if "_hf_hook" not in parts or not getattr(parts["_hf_hook"], "offload", False)
        ]
        tensors = [tensor for tensor in chain.from_iterable(weights) if tensor is not None]
        state: list[object] = [[*map(_VERSION, tensors)], [*map(_ADDRESS, tensors)]]
        for parts in [parts for parts in self._parents if "_active_adapter" in parts or "merged_adapters" in parts]:
            names = ("_active_adapter", "_disable_adapters", "merged_adapters")
            state.append([[str(parts.get(name)) for name in names], dict(parts.get("scaling", {}))])
        if "peft" in sys.modules:  # PEFT merges through `.data`, which does not change a tensor's `_version`
            state.append(_middles(tensors))
        return [*children, *tensors], state


def _middles(tensors: Iterable[Any]) -> list[list[float]]:
    """Return one value of each weight, all of which change when an adapter is merged."""
    import torch  # not above, because commands that only list items read fingerprints and need no torch

    values: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.ndim == 2 and tensor.numel() and not tensor.is_meta and not hasattr(tensor, "__tensor_flatten__"):
            middle = tensor.detach()[tensor.shape[0] // 2, tensor.shape[1] // 2]
            values.setdefault(tensor.device, []).append(middle.float())
    return [torch.stack(each).tolist() for each in values.values()]


def _active_adapters(module: torch.nn.Module) -> list[str]:
    """Return the names of a PEFT layer's active adapters; none if they are disabled or merged into the weights."""
    merged, disabled = getattr(module, "merged_adapters", ()), getattr(module, "_disable_adapters", False)
    if not _ADAPTERS & module.__dict__.keys() or disabled or merged:
        return []
    active = module._active_adapter
    return [active] if isinstance(active, str) else list(active)  # type: ignore[arg-type]


def _weights_digest(model: torch.nn.Module) -> str:
    """Return the SHA-256 over every weight that the model computes with.

    An inactive or merged adapter does not count, so that the digest is the same again after switching adapters back.
    """
    lines: list[str] = []
    scratch: dict[torch.device, torch.Tensor] = {}
    for path, module in model.named_modules():
        adapters = {name: getattr(module, "scaling", {}).get(name) for name in _active_adapters(module)}
        name = ".".join(part for part in path.removeprefix("base_model.model").split(".") if part not in _WRAPPED)
        if adapters:
            lines.append(f"{name} {sorted(adapters.items())}")
        buffers = {n: each for n, each in module._buffers.items() if n not in module._non_persistent_buffers_set}
        offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)  # by accelerate, to CPU or disk
        for own, tensor in {**module._parameters, **buffers, **_scales(module)}.items():
            if tensor is not None and tensor.is_meta and offloaded is not None:
                tensor = offloaded[own]
            if tensor is not None and _is_used(model, path, own):
                lines.append(
                    f"{name}.{own} {tuple(tensor.shape)} {tensor.dtype} {_tensor_digest(tensor.detach(), scratch)}"
                )
    return _sha256("\n".join(sorted(lines)))


def _scales(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the scales of a bitsandbytes layer, which are neither parameters nor buffers."""
    weight = module._parameters.get("weight")
    of_4_bits, of_8_bits = getattr(weight, "quant_state", None), getattr(module, "state", None)
    scale = getattr(weight, "SCB", None)  # int8: the first pass moves the scale to the module
    return {
        "weight.scale": getattr(of_8_bits, "SCB", None) if scale is None else scale,
        "weight.absmax": getattr(of_4_bits, "absmax", None),
        "weight.offset": getattr(of_4_bits, "offset", None),
        "weight.absmax.absmax": getattr(getattr(of_4_bits, "state2", None), "absmax", None),
    }


def _is_used(model: torch.nn.Module, path: str, name: str) -> bool:
    """Whether the model computes with a parameter: not if the parameter belongs to an inactive adapter."""
    above, parts = model, [*path.split("."), name] if path else [name]
    for depth, part in enumerate(parts[:-1]):
        if _ADAPTERS & above.__dict__.keys() and part not in _WRAPPED:
            return bool(set(parts[depth:]) & set(_active_adapters(above)))
        above = getattr(above, part)
    return not _ADAPTERS & above.__dict__.keys()


def _tensor_digest(tensor: torch.Tensor, scratch: dict[torch.device, torch.Tensor]) -> str:
    """Return the XXH3-128 over the sums of rows of 512 bytes: equal on all devices, and as fast as reading memory."""
    import torch

    if tensor.is_meta:  # the tensor has no values
        return ""
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised tensor, made of other tensors
        return " ".join(_tensor_digest(getattr(tensor, part), scratch) for part in tensor.__tensor_flatten__()[0])
    data: Any = tensor.reshape(-1)
    data = (data if data.storage_offset() == 0 else data.clone()).view(torch.uint8)
    whole = len(data) // (8 * _ROW) * 8 * _ROW
    digest = xxhash.xxh3_128(data[whole:].cpu().numpy().data)
    words = data[:whole].view(torch.int64).view(-1, _ROW)
    most = _ROWS.get(data.device.type, 1 << 20)
    mask = torch.frombuffer(bytearray(_MASK), dtype=torch.int64).to(data.device)
    masked = scratch.get(data.device)  # reused, since allocating memory takes longer than the sums
    if masked is None:
        masked = scratch[data.device] = torch.empty((most, _ROW), dtype=torch.int64, device=data.device)
    for rows in words.split(most):
        digest.update(torch.bitwise_xor(rows, mask, out=masked[: len(rows)]).sum(1).cpu().numpy().data)
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
