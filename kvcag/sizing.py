"""Computes the memory of keys and values, and when loading them is faster than encoding, from the configuration only.

KV heads are counted, not query heads: with grouped-query attention, several query heads share one KV head. Layers with
a sliding window count in full, because caches that are cut, moved and merged have every token in every layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from kvcag.errors import InvalidInputError, UnsupportedModelError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes per number, for each dtype of keys and values."""

_SCALE_BYTES = 2
"""int8 at rest: one bfloat16 scale per token and head, for keys and for values (`kvcag.cache.int8`)."""


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """The shape of one token's keys `(kv_heads, key_dim)` and values `(kv_heads, value_dim)` in one layer.

    Attributes:
        kv_heads: the number of KV heads.
        key_dim: numbers per key.
        value_dim: numbers per value.
        window: how many tokens the layer attends to; None: all. The cache has all tokens in either case.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def numbers(self) -> int:
        """Numbers per token, keys and values together."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of one token's keys and values in a model. Made by `kv_geometry`.

    Attributes:
        model: the model's name, for messages.
        layers: one for each layer that has its own keys and values.
        state_bytes: bytes of the recurrent layers' states at one position, from which a prompt can continue; 0 without
            such layers. Convolution states are counted in bfloat16.
        map_bytes: bytes of a document's maps of these states (`kvcag.cache.states`), which are stored with its item.
        attention_heads: query heads; `attention_heads / kv_heads` of them share one KV head.
        dtype: the checkpoint's, such as `"bfloat16"`; None if the configuration names none.
        context_length: the most tokens, prompt and answer together; None if the configuration names none.
    """

    model: str
    layers: tuple[LayerGeometry, ...]
    attention_heads: int
    dtype: str | None
    context_length: int | None
    state_bytes: int = 0
    map_bytes: int = 0

    @property
    def sliding_layers(self) -> int:
        """The number of layers with a sliding window."""
        return sum(layer.window is not None for layer in self.layers)

    def bytes_per_token(self, dtype: str = "auto", *, int8: bool = False) -> int:
        """Return the bytes of one token's keys and values, over all layers.

        Args:
            dtype: `"float32"`, `"float16"` or `"bfloat16"`; `"auto"` is the checkpoint's own.
            int8: count the bytes in a store with `quantize="int8"`: one byte per number, and the scales. Loading
                converts them back to `dtype`.

        Raises:
            InvalidInputError: another dtype, or `"auto"` if the configuration names none.
        """
        size = DTYPE_BYTES[self.check_dtype(dtype)]
        if int8:
            return sum(layer.numbers + 2 * layer.kv_heads * _SCALE_BYTES for layer in self.layers)
        return sum(layer.numbers * size for layer in self.layers)

    def check_dtype(self, dtype: str) -> str:
        """Return the name of a dtype; `"auto"` is the checkpoint's. Raises as `bytes_per_token`."""
        named = self.dtype if dtype == "auto" else dtype
        if named is None:
            raise InvalidInputError(
                f"the configuration of {self.model} names no dtype. Pass one, such as dtype='bfloat16'."
            )
        if named not in DTYPE_BYTES:
            raise InvalidInputError(f"dtype {named!r} is not one of {', '.join(DTYPE_BYTES)}. Pass one of these.")
        return named


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Compares loading with encoding, for one document.

    Attributes:
        load_s: seconds to load its keys and values.
        encode_s: seconds to encode its tokens again.
        even_tokens: the length from which loading is faster; infinite if it never is.
        even_bytes_per_s: the speed of loading at which both take the same time for this document, latency included;
            infinite if the latency alone takes longer than encoding.
    """

    load_s: float
    encode_s: float
    even_tokens: float
    even_bytes_per_s: float

    @property
    def load(self) -> bool:
        """Whether loading is at least as fast as encoding."""
        return self.load_s <= self.encode_s


def break_even(
    tokens: int, bytes_per_token: int, prefill_tokens_per_s: float, load_bytes_per_s: float, latency_s: float = 0.0
) -> BreakEven:
    """Compare loading with encoding, for a document.

    Args:
        tokens: the document's length.
        bytes_per_token: from `KVGeometry.bytes_per_token`; with int8 if the store writes int8.
        prefill_tokens_per_s: the speed of a full prefill, as `kvcag bench` measures it.
        load_bytes_per_s: the speed of the store.
        latency_s: the seconds before the store's first byte.

    Raises:
        InvalidInputError: a number that is not positive (the latency may be 0).
    """
    given = {"tokens": tokens, "bytes_per_token": bytes_per_token}
    given |= {"prefill_tokens_per_s": prefill_tokens_per_s, "load_bytes_per_s": load_bytes_per_s}  # type: ignore[dict-item]
    for name, value in given.items():
        if not value > 0:
            raise InvalidInputError(f"{name} is {value}; it must be more than 0")
    if not latency_s >= 0:
        raise InvalidInputError(f"latency_s is {latency_s}; it must be 0 or more")
    encode_s = tokens / prefill_tokens_per_s
    saved_per_token = 1 / prefill_tokens_per_s - bytes_per_token / load_bytes_per_s
    even_tokens = latency_s / saved_per_token if saved_per_token > 0 else math.inf
    left_s = encode_s - latency_s
    return BreakEven(
        load_s=latency_s + tokens * bytes_per_token / load_bytes_per_s,
        encode_s=encode_s,
        even_tokens=even_tokens,
        even_bytes_per_s=tokens * bytes_per_token / left_s if left_s > 0 else math.inf,
    )


def kv_geometry(model: str | PathLike[str] | Mapping[str, Any] | Any) -> KVGeometry:
    """Read the shape of one token's keys and values from a model's configuration. Loads no weights.

    Args:
        model: a folder with a `config.json`, that file, its content as a dict, a `PreTrainedConfig`, or a hub id, whose
            configuration is downloaded.

    Raises:
        InvalidInputError: there is no configuration, or it is not a decoder's.
        UnsupportedModelError: the model caches neither keys and values per token nor states.
    """
    config = _config(model)
    name = getattr(config, "_name_or_path", "") or getattr(config, "model_type", "") or type(config).__name__
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder, whose caches cannot be reused. Use a decoder-only model."
        )
    count = getattr(text, "num_hidden_layers", None)
    if not count:
        raise InvalidInputError(
            f"the configuration of {name} names no num_hidden_layers: it is not a decoder. Pass a decoder-only model."
        )
    types = list(getattr(text, "layer_types", None) or ())
    attends, state_bytes, map_bytes = _recurrent(text, name)
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * count
    own = count - (getattr(text, "num_kv_shared_layers", None) or 0)
    keyed = [index for index in range(own) if not attends or attends[index]]
    dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None)
    return KVGeometry(
        model=str(name),
        layers=tuple(_layer(layers[index], _window(text, types, index)) for index in keyed),
        attention_heads=int(layers[0].num_attention_heads) if keyed else 0,
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
        context_length=getattr(text, "max_position_embeddings", None),
        state_bytes=state_bytes,
        map_bytes=map_bytes,
    )


def _recurrent(config: Any, name: str) -> tuple[list[bool], int, int]:
    """Return which layers have attention, and the bytes of the recurrent layers' states and maps.

    For a model without recurrent layers: an empty list, 0 and 0. The model is made on the meta device and run once,
    because only its code knows the shapes of its states.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from kvcag.cache.layers import Layers, generation_cache, kinds_of_config, layers_of, nbytes, run

    kinds = kinds_of_config(config)
    if not kinds:
        if any(word in config.model_type for word in ("rwkv", "xlstm", "mamba")):
            raise UnsupportedModelError(
                f"{name} has a recurrent state that transformers does not put into a cache. Use another model."
            )
        return [], 0, 0
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        cache = generation_cache([], 1, kinds)
        run(model, torch.zeros(1, dtype=torch.long), cache)
    states = layers_of(cache).states
    assert states is not None
    delta = [t for row in states.tensors for t in row[len(row) // 2 :] if t is not None and t.ndim == 4]
    is_delta = hasattr(config, "linear_key_head_dim")  # a matrix per head; others have one number
    maps = sum(4 * t.shape[1] * t.shape[2] ** 2 for t in delta) if is_delta else 0
    return [attends for attends, _ in kinds], nbytes(Layers((), states)), maps


def _config(model: Any) -> Any:
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    if isinstance(model, Mapping):
        return _of_mapping(model, "the configuration")
    path = Path(model)
    if path.is_file():
        try:
            return _of_mapping(json.loads(path.read_text(encoding="utf-8")), str(path))
        except ValueError as broken:
            raise InvalidInputError(f"{path} is not a model's config.json: {broken}") from broken
    if path.is_dir() and not (path / "config.json").is_file():
        raise InvalidInputError(f"there is no config.json in {path}. Pass a model's folder, or a hub id.")
    try:
        return AutoConfig.from_pretrained(str(model))
    except (OSError, ValueError) as failed:
        reason = str(failed).strip().splitlines()[0]
        raise InvalidInputError(
            f"no configuration of {str(model)!r} was found, as a folder or on the hub: {reason} "
            "Without a network, pass the folder or the config.json."
        ) from failed


def _of_mapping(described: Mapping[str, Any], where: str) -> Any:
    from transformers import AutoConfig

    settings = dict(described)
    kind = settings.pop("model_type", None)
    if not kind:
        raise InvalidInputError(f"{where} names no model_type: it is not a model's config.json")
    try:
        return AutoConfig.for_model(kind, **settings)
    except ValueError as unknown:
        raise InvalidInputError(
            f"{where} is of model_type {kind!r}, which this version of transformers does not know. Upgrade it."
        ) from unknown


def _layer(config: Any, window: int | None) -> LayerGeometry:
    from kvcag.cache.layers import latent_shape

    latent = latent_shape(config)
    if latent:
        return LayerGeometry(*latent, window)
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return LayerGeometry(int(getattr(config, "num_key_value_heads", None) or heads), head_dim, head_dim, window)


def _window(config: Any, kinds: list[str], index: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    slides = kinds[index] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    return int(window) if window and slides else None
