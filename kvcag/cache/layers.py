"""The only module that uses the internals of transformers' cache classes.

In the rest of kvcag, a cache is a list with one `(keys, values)` per attention layer, each
`(batch, kv_heads, seq_len, head_dim)`, with keys rotated to their positions. For a model with recurrent layers (gated
delta nets, Mamba, short convolutions), the list is a `Layers`, which also has their states after its last token.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import DynamicCache, __version__, cache_utils
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from kvcag.errors import UnsupportedModelError
from kvcag.fingerprint import ModelFingerprint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LayerKV: TypeAlias = tuple[torch.Tensor, torch.Tensor]


class _Missing:
    """A placeholder for a class that this version of transformers lacks."""

    def lazy_initialization(self) -> None: ...


_Linear: Any = getattr(cache_utils, "LinearAttentionLayer", _Missing)
_Dummy: Any = getattr(cache_utils, "DummyLayer", _Missing)
_CONTINUES = "conv_kernel_size" in inspect.signature(_Linear.lazy_initialization).parameters
"""Whether transformers continues from a recurrent state with several tokens. Before 5.24 it ignored the state."""

_LATENT = tuple(map(int, __version__.split(".")[:2])) >= (5, 15)
"""Whether latent attention (MLA) caches latents. Before 5.15 it cached the keys and values of every head."""

Kinds: TypeAlias = tuple[tuple[bool, int], ...]
"""For each layer: whether it has attention, and its number of recurrent states. Empty without recurrent layers."""


@dataclass(frozen=True, slots=True)
class States:
    """The states of a model's recurrent layers after the last of some tokens. Earlier tokens have no states.

    Attributes:
        kinds: the layers of the model.
        tensors: for each recurrent layer, in the model's order: the last inputs of its convolutions, then its recurrent
            states, in the model's own shapes and dtypes; None for a state that the layer lacks.
        maps: for each recurrent layer, the document's map: the state before the document times the map is its share in
            the state after it (`kvcag.cache.states`). None for a layer without recurrent state. Empty if unknown.
    """

    kinds: Kinds
    tensors: tuple[tuple[torch.Tensor | None, ...], ...]
    maps: tuple[torch.Tensor | None, ...] = ()

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> States:
        """Return the states with `change` applied to each tensor."""
        maps = tuple(t if t is None else change(t) for t in self.maps)
        return replace(self.restored(change), maps=maps)

    def restored(self, change: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone) -> States:
        """Return a copy that a generation may write to. Maps are shared, since they are never written to."""
        return replace(self, tensors=tuple(tuple(t if t is None else change(t) for t in row) for row in self.tensors))

    @property
    def is_map(self) -> bool:
        """Whether each recurrent state has a map, so that the document can follow other documents."""
        maps = self.maps or (None,) * len(self.tensors)
        recurrent = (any(t is not None for t in row[len(row) // 2 :]) for row in self.tensors)
        return all(known is not None or not recurs for recurs, known in zip(recurrent, maps, strict=True))

    @property
    def flat(self) -> list[torch.Tensor]:
        """All tensors, maps included."""
        return [tensor for row in (*self.tensors, self.maps) for tensor in row if tensor is not None]


class Layers(list[LayerKV]):
    """Keys and values of a model's attention layers, and the states of its recurrent layers after the last token.

    Attributes:
        states: None for a model without recurrent layers, and if the last token is not the last that was read.
        tokens: the number of tokens.
    """

    def __init__(self, layers: Iterable[LayerKV] = (), states: States | None = None, tokens: int = 0) -> None:
        super().__init__(layers)
        self.states = states
        self.tokens = self[0][0].shape[-2] if len(self) else tokens

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is cached, since a copy has other addresses."""
        return {"states": self.states, "tokens": self.tokens}

    def __bool__(self) -> bool:
        """Whether there are tokens, also for a model without attention layers, whose list is empty."""
        return self.tokens > 0

    @functools.cached_property
    def devices(self) -> set[torch.device]:
        """The devices of the keys and values."""
        return {tensor.device for kv in self for tensor in kv}

    @functools.cached_property
    def rows(self) -> np.ndarray | None:
        """The tensors' addresses for kernels: int64 `(2 * layers, 4)`, for each layer a row of keys, then of values.

        A row has the address, the elements between two heads, the number of heads, and `head_dim`. None unless all
        tensors are on one NVIDIA GPU, with one dtype and no gaps between tokens. Cached, since 36 layers take 0.1 ms.
        """
        tensors = [tensor for kv in self for tensor in kv]
        if not tensors or not tensors[0].is_cuda:
            return None
        forms = {(t.dtype, t.device, t.shape[0], t.shape[-1], *t.stride()[-2:]) for t in tensors}
        if len({form[:2] for form in forms}) > 1 or any(form[2:] != (1, form[3], form[3], 1) for form in forms):
            return None
        rows = [(t.data_ptr(), t.stride(1), t.shape[1], t.shape[-1]) for t in tensors]
        return np.array(rows, dtype=np.int64)


def as_layers(layers: Iterable[LayerKV]) -> Layers:
    """Convert to `Layers`. An argument that is a `Layers` is returned itself, with its cached `rows`."""
    return layers if isinstance(layers, Layers) else Layers(layers)


def states_of(layers: Iterable[LayerKV]) -> States | None:
    """Return the states of recurrent layers after the last token; None if there are none."""
    return getattr(layers, "states", None)


def length_of(layers: Sequence[LayerKV]) -> int:
    """Return the number of tokens."""
    return layers[0][0].shape[-2] if len(layers) else getattr(layers, "tokens", 0)


def kinds_of(model: PreTrainedModel) -> Kinds:
    """Return the kinds of a model's layers; empty for a model without recurrent layers. Cached per model."""
    if model not in _kinds:
        _kinds[model] = kinds_of_config(model.config.get_text_config(decoder=True))
    return _kinds[model]


_kinds: WeakKeyDictionary[Any, Kinds] = WeakKeyDictionary()


def latent_shape(config: Any) -> tuple[int, int, int] | None:
    """Return the KV heads and the cached key and value dimensions of a model with latent attention; else None."""
    latent = getattr(config, "kv_lora_rank", None)
    if not latent:
        return None
    if _LATENT:  # the latents as keys, and one rotated key for all heads as value
        return 1, int(latent), int(config.qk_rope_head_dim)
    heads, key_dim = int(config.num_attention_heads), int(config.qk_nope_head_dim + config.qk_rope_head_dim)
    return heads, key_dim, int(config.v_head_dim)


def kinds_of_config(config: PretrainedConfig) -> Kinds:
    """Return `kinds_of` for a model whose decoder has this configuration."""
    layers = _own_layers(config)
    if not any(isinstance(layer, _Linear) for layer in layers):
        return ()
    return tuple((isinstance(layer, DynamicLayer), getattr(layer, "number_of_states", 0)) for layer in layers)


def _is_cache_of(each: Any, module: str) -> bool:
    return isinstance(each, type) and issubclass(each, Cache) and each.__module__ == module


def _own_layers(config: PretrainedConfig) -> list[Any]:
    """Return the cache layers that transformers would make; none if it has no cache for the model."""
    try:
        return list(DynamicCache(config=config).layers)
    except (AttributeError, KeyError, TypeError):
        return []


def _is_plain(layer: Any) -> bool:
    """Whether a cache layer is of a known class: with keys and values, recurrent states, both, or nothing."""
    return isinstance(layer, (_Linear, _Dummy)) or type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


class _CacheOfLayers(DynamicCache):
    """A cache that has the `Layers` it was made of, with their cached `rows`."""

    held = Layers()

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values. The former tensors are not needed any more, so they are not held."""
        self.held = Layers()
        return super().update(*args, **kwargs)

    def still_holds(self) -> bool:
        """Whether the cache is unchanged since it was made: nothing was generated into it or cut from it."""
        layers = cast("list[DynamicLayer]", self.layers)
        same = (
            one.keys is keys and one.values is values for one, (keys, values) in zip(layers, self.held, strict=False)
        )
        return len(self.held) == len(layers) and all(same)


class ContextCache(_CacheOfLayers):
    """A `DynamicCache` with its tokens and the fingerprint of its model.

    Attributes:
        token_ids: the tokens in the cache when it was made, int64 `(seq_len,)`.
        fingerprint: the model that made the cache.
        messages: the chat messages in the cache, if each of them is a complete turn. None if the cache ends inside the
            turn with the documents, which a continuation closes first.
        is_exact: the cache equals that of a full prefill; False if documents were merged without recomputing all.
    """

    token_ids: torch.Tensor
    fingerprint: ModelFingerprint
    messages: list[dict[str, Any]] | None
    is_exact: bool

    @classmethod
    def of(
        cls,
        layers: Iterable[LayerKV],
        token_ids: torch.Tensor,
        fingerprint: ModelFingerprint,
        messages: list[dict[str, Any]] | None = None,
        *,
        is_exact: bool = True,
    ) -> ContextCache:
        """Make a cache over `layers` without copying them.

        Args:
            layers: keys and values of each layer, `(1, kv_heads, seq_len, head_dim)`, keys rotated to their positions.
            token_ids: their tokens, int64 `(seq_len,)`.
            fingerprint: `engine.fingerprint` of the model that made them.
            messages: the chat messages of these tokens, if each of them is a complete turn.
            is_exact: the keys and values equal those of a full prefill.
        """
        cache = cls()
        layers = as_layers(layers)
        cache.layers.extend(cache_of(layers).layers)
        if states_of(layers) is None:
            cache.held = layers
        cache.token_ids, cache.fingerprint = token_ids, fingerprint
        cache.messages, cache.is_exact = messages, is_exact
        return cache


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device for the inputs of a model or of its decoder.

    With accelerate's CPU or disk offload, the first weights may be on another device or on `meta`, also in a decoder
    that has no hook itself, as after `accelerate.cpu_offload`.
    """
    if not hasattr(model, "_hf_hook") and (device := model.device).type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), model.device))


def cache_argument(module: torch.nn.Module, cache: Cache) -> dict[str, Cache]:
    """Return the keyword argument by which `module.forward` takes a cache.

    transformers 5.24 renamed `past_key_values` to `cache`, warns about the old name, and removes it in 5.40.
    """
    return {"cache" if _takes(module, "cache") else "past_key_values": cache}


def run(
    module: torch.nn.Module,
    token_ids: torch.Tensor,
    cache: Cache,
    positions: torch.Tensor | None = None,
    *,
    last: bool = False,
) -> Any:
    """Run tokens through a model or its decoder, over a cache, which grows by them. Returns the module's output.

    Args:
        module: the model or its decoder.
        token_ids: int64 `(seq_len,)`, on any device.
        cache: the keys, values and states of the tokens before.
        positions: the tokens' positions, int64 `(seq_len,)`. None: they follow those in the cache.
        last: compute the logits of the last token alone, if the model can.
    """
    device, new = device_of(cast("PreTrainedModel", module)), len(token_ids)
    given: dict[str, Any] = cache_argument(module, cache)
    if positions is None and isinstance(cache, _RecurrentCache) and _takes(module, "position_ids"):
        positions = torch.arange(cache.tokens, cache.tokens + new)  # some models (Bamba) would count from 0
    if positions is not None:
        given["position_ids"] = positions[None].to(device)
    if last and _takes(module, "logits_to_keep"):
        given["logits_to_keep"] = 1
    output = module(input_ids=token_ids[None].to(device), use_cache=True, **given)
    if isinstance(cache, _RecurrentCache):
        cache.tokens += new
    return output


def _takes(module: torch.nn.Module, argument: str) -> bool:
    return argument in _arguments(type(module).forward)


@functools.cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def layers_of(cache: Cache) -> Layers:
    """Return the keys and values of each layer without copying them. Empty for an empty cache.

    Raises:
        UnsupportedModelError: a layer is quantised, static or windowed, so it does not have one key and one value per
            token.
    """
    if isinstance(cache, _CacheOfLayers) and cache.still_holds():
        return cache.held
    held = Layers()
    if isinstance(cache, _RecurrentCache):
        held.states, held.tokens = cache.states, cache.tokens
    for layer in cache.layers:
        if isinstance(layer, (_Linear, _Dummy)) and not isinstance(layer, DynamicLayer):
            continue
        if type(layer) is not DynamicLayer and not isinstance(layer, _AppendLayer):
            raise UnsupportedModelError(
                f"the cache has a {type(layer).__name__}, which does not have one key and one value for each token. "
                "Use a plain DynamicCache(), made without a config."
            )
        if layer.keys is not None and layer.values is not None and layer.get_seq_length():
            held.append((layer.keys, layer.values))
            held.tokens = layer.get_seq_length()
    return held


def cache_of(layers: Iterable[LayerKV]) -> DynamicCache:
    """Make a `DynamicCache` over the given tensors without copying them.

    A generation does not write into the keys and values, since `DynamicCache.update` concatenates, but it writes into
    the states of recurrent layers. Use `clone` for a cache whose owner may write into its tensors.
    """
    states = states_of(layers)
    if states is not None:
        kept = list(layers)
        return _RecurrentCache(states.kinds, length_of(cast("Layers", layers)), kept, states)
    cache = _CacheOfLayers()
    cache.held = as_layers(layers)
    for keys, values in cache.held:
        layer = DynamicLayer()
        _initialize(layer, keys)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _initialize(layer: DynamicLayer, like: torch.Tensor) -> None:
    """Initialise a layer as `lazy_initialization` does, without making empty tensors."""
    layer.device, layer.is_initialized = like.device, True
    layer.dtype = like.dtype  # type: ignore[attr-defined]  # read by transformers before 5.24


def clone(cache: Cache) -> DynamicCache:
    """Return a copy that shares no memory with `cache`."""
    return cache_of(mapped(layers_of(cache), torch.Tensor.clone))


def mapped(layers: Sequence[LayerKV], change: Callable[[torch.Tensor], torch.Tensor]) -> Layers:
    """Return the layers with `change` applied to each tensor, such as a copy to another device."""
    states = states_of(layers)
    kept = states.mapped(change) if states else None
    return Layers(((change(keys), change(values)) for keys, values in layers), kept, length_of(layers))


def share(cache: DynamicCache) -> DynamicCache:
    """Return another cache over the same keys and values. Generating with it does not change `cache`.

    States of recurrent layers are copied, since a generation writes into them.
    """
    layers = layers_of(cache)
    if layers.states is None:
        return cache_of(layers)
    return cache_of(Layers(layers, layers.states.restored(), layers.tokens))


def cut(layers: Sequence[LayerKV], start: int, end: int | None = None) -> Layers:
    """Return views of the tokens `start:end` of each layer. The states are kept only if `end` is the last token's."""
    length = length_of(layers)
    end = length if end is None else min(end, length)
    if isinstance(layers, Layers) and (start, end) == (0, length):
        return layers
    cuts = ((keys[..., start:end, :], values[..., start:end, :]) for keys, values in layers)
    views = Layers(cuts, states_of(layers) if end == length else None, end - start)
    rows = layers.__dict__.get("rows") if isinstance(layers, Layers) else None
    if rows is not None:
        views.rows = shifted(rows, start, views)
    return views


def shifted(rows: np.ndarray, start: int, layers: Sequence[LayerKV]) -> np.ndarray:
    """Return `Layers.rows` for the tokens from `start` on; `layers` has their dtype."""
    rows = rows.copy()
    rows[:, 0] += start * layers[0][0].element_size() * rows[:, 3]
    return rows


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to the device without waiting for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def contiguous_copy(layers: Sequence[LayerKV]) -> Layers:
    """Copy to contiguous memory, so that a stored slice does not keep the whole tensor in memory."""
    return mapped(layers, functools.partial(torch.clone, memory_format=torch.contiguous_format))


def concat(parts: Sequence[Sequence[LayerKV]], room: int = 0) -> Layers:
    """Concatenate parts, layer by layer, in new memory, with zeros for `room` more tokens at the end.

    The states are those of the last part.
    """
    if not parts:
        return Layers(tokens=room)
    joined, states = _buffers(parts[0], sum(map(length_of, parts)), room), states_of(parts[-1])
    _copy(parts, joined)
    joined.states = states and replace(states.restored(), maps=())
    return joined


class Turn(NamedTuple):
    """How some layers rotate their keys (`kvcag.cache.attention.Rotation`).

    Attributes:
        layers: the layers' numbers.
        frequencies: fp32 `(rotary_dim / 2,)`; None if the layers do not rotate keys.
        start: the first rotated component.
        interleaved: how components are paired.
    """

    layers: list[int]
    frequencies: torch.Tensor | None
    start: int
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Move:
    """How parts change when they are concatenated.

    Attributes:
        stood: the position at which each part's first token was encoded.
        turns: how keys are re-rotated to their new positions. Each layer is in one `Turn`.
        change: a drift, fp32 `(layers, kv_heads, 2 * head_dim)`: of the key, as at position 0, and of the value.
        gives: for each part, whether `change` is added to its tokens.
    """

    stood: Sequence[int]
    turns: Sequence[Turn]
    change: torch.Tensor | None
    gives: Sequence[bool]


def moved(parts: Sequence[Layers], room: int, move: Move) -> Layers | None:
    """`concat` without states, of re-rotated and changed parts, by a kernel. None if no kernel supports the layers."""
    kernels = kernels_for(parts[0].rows)
    if kernels is None:
        return None
    joined = _buffers(parts[0], sum(map(length_of, parts)), room)
    return joined if kernels.fill(joined, parts, move) else None


def nbytes(layers: Iterable[LayerKV]) -> int:
    """Return the bytes of the keys, values and states."""
    states = states_of(layers)
    tensors = [*(tensor for kv in layers for tensor in kv), *(states.flat if states else ())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def generation_cache(
    parts: Sequence[Sequence[LayerKV]], room: int, kinds: Kinds = (), *, lent: bool = False
) -> DynamicCache:
    """Make the cache of one generation: a copy of `parts`, one after another, with room for `room` more tokens.

    New tokens are written in place, without concatenating the whole context for each token, so writing a token costs
    the same after 10,000 tokens of context as after ten. A full buffer is replaced by one of twice the size.

    Args:
        parts: keys and values, only read. For a model with recurrent layers, the last part has the states.
        room: the number of further tokens.
        kinds: `kinds_of` the model.
        lent: do not copy the longest part. Captured CUDA graphs read it in place, once for all generations over it;
            other code copies it before the first use.
    """
    if kinds:
        tokens = sum(map(length_of, parts))
        joined = _buffers(parts[0] if parts else (), tokens, room, zeroed=False)
        _copy(parts, joined)
        states = states_of(parts[-1]) if parts else None
        return _RecurrentCache(kinds, tokens, joined, states, room=room, copied=True)
    parts = [part for part in parts if length_of(part)]
    lengths = [length_of(part) for part in parts]
    longest = max(range(len(parts)), key=lengths.__getitem__, default=0)
    if not lent or not parts or lengths[longest] < _WORTH_LENDING or not readable(parts[longest]):
        longest = len(parts)
    copied = [part for index, part in enumerate(parts) if index != longest]
    like = parts[longest] if longest < len(parts) else parts[0] if parts else ()
    buffers = _buffers(like, sum(map(length_of, copied)), room, zeroed=False)
    _copy(copied, buffers)
    loan = _Loan(as_layers(like), sum(lengths[:longest])) if longest < len(parts) else None
    return GenerationCache(room, _Unmade(room, buffers, sum(lengths), loan) if len(buffers) else None)


_WORTH_LENDING = 256
"""The least tokens of a lent part. For fewer, copying is cheaper than a second loop in the attention."""


def readable(layers: Sequence[LayerKV]) -> bool:
    """Whether kernels can read these keys and values in place, with the stride between heads as the only stride."""
    rows = as_layers(layers).rows
    if rows is None:
        return False
    keys, values = rows[::2], rows[1::2]
    gapless = (rows[:, 1] % rows[:, 3] == 0) & (rows[:, 0] % 16 == 0)
    return bool(gapless.all() and (keys[:, 1] == values[:, 1]).all())


def kernels_for(rows: np.ndarray | None) -> ModuleType | None:
    """Return the module `kvcag.cache.kernels` if it supports these `Layers.rows`; else None."""
    if rows is None or not _has_triton() or (rows[:, 2:] != rows[0, 2:]).any():
        return None
    from kvcag.cache import kernels

    return kernels


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _buffers(like: Sequence[LayerKV], tokens: int, room: int, *, zeroed: bool = True) -> Layers:
    """Make buffers for `tokens` tokens of each layer and for `room` more, which are zeros if `zeroed`.

    `like` has the buffers' heads, sizes and dtypes. If all layers have one shape, their buffers are views of one
    tensor, which few calls fill. On a GPU, the calls dominate the cost of copying 72 tensors.
    """
    tensors = [tensor for kv in like for tensor in kv]
    if not tensors:
        return Layers(tokens=tokens + room)
    shapes = [(*tensor.shape[:-2], tokens + room, tensor.shape[-1]) for tensor in tensors]
    known, rows = like.rows if isinstance(like, Layers) else None, None
    if kernels_for(known) is not None or len({(*t.shape, t.dtype, t.device) for t in tensors}) == 1:
        whole = tensors[0].new_empty((len(shapes), *shapes[0]))
        buffers, spare = list(whole.unbind()), [whole]
        if known is not None:
            addresses = whole.data_ptr() + np.arange(len(whole)) * (whole.stride(0) * whole.element_size())
            rows = np.column_stack([addresses, np.full(len(whole), whole.stride(2)), known[:, 2:]])
    else:
        buffers = spare = [t.new_empty(shape) for t, shape in zip(tensors, shapes, strict=True)]
    for each in spare if zeroed and room else ():
        each[..., tokens:, :].zero_()
    made = Layers(zip(buffers[::2], buffers[1::2], strict=True))
    if rows is not None:
        made.rows = rows
    return made


def _copy(parts: Sequence[Sequence[LayerKV]], to: Layers) -> None:
    """Copy parts, one after another, to the beginning of the buffers `to`."""
    kept = [as_layers(part) for part in parts if len(to) and length_of(part)]
    kernels = kernels_for(to.rows) if kept else None
    if kernels is not None and kernels.fill(to, kept):
        return
    buffers, start = [tensor for kv in to for tensor in kv], 0
    for part in kept:
        end = start + length_of(part)
        target = [buffer[..., start:end, :] for buffer in buffers]
        torch._foreach_copy_(target, [tensor for kv in part for tensor in kv])
        start = end


BETWEEN_LAYERS: ContextVar[Callable[[], None] | None] = ContextVar("kvcag_between_layers", default=None)
"""Called before each layer of a forward pass writes to its cache. An error that it raises ends the pass, after which
`crop` must restore the cache."""


class _PausingCache(DynamicCache):
    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        between = BETWEEN_LAYERS.get()
        if between is not None:
            between()
        return super().update(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class _Loan:
    """Keys and values of another cache that a generation reads without a copy, and the position of the first token."""

    layers: Layers
    start: int

    @property
    def length(self) -> int:
        return length_of(self.layers)


@dataclass(slots=True)
class _Unmade:
    """The state of a `GenerationCache` whose layers are not made yet.

    Captured passes need only addresses, and to make 36 layers takes 0.5 ms.
    """

    room: int
    buffers: Layers
    length: int
    loan: _Loan | None
    _table: np.ndarray | None = None

    @property
    def own(self) -> int:
        """Tokens in the buffers."""
        return self.length - (self.loan.length if self.loan else 0)

    def table(self, new: int) -> np.ndarray | None:
        """Return `GenerationCache.addresses`; None if the layers have to be made first."""
        rows = self.buffers.rows
        if rows is None or self.own + new > length_of(self.buffers):
            return None
        if self._table is None:
            self._table = np.zeros((len(self.buffers), 8), dtype=np.int64)
            self._table[:, :3] = addresses_in(rows)
            if self.loan is not None:
                lent = self.loan.layers.rows
                assert lent is not None  # `readable` said so
                self._table[:, 3:6] = addresses_in(lent)
                self._table[:, 6:] = self.loan.start, self.loan.length
        return self._table

    def make(self) -> list[_AppendLayer]:
        """Make the layers."""
        loan = self.loan
        lent = [None] * len(self.buffers) if loan is None else [_Lent(kv, loan.start) for kv in loan.layers]
        return [_AppendLayer(self.room, kv, self.own, each) for kv, each in zip(self.buffers, lent, strict=True)]


def addresses_in(rows: np.ndarray) -> np.ndarray:
    """Return the addresses of each layer's keys and values, and the tokens between two heads: int64 `(layers, 3)`."""
    keys, values = rows[::2], rows[1::2]
    return np.column_stack([keys[:, 0], values[:, 0], keys[:, 1] // keys[:, 3]])


class GenerationCache(_PausingCache):
    """The cache of one generation: see `generation_cache`."""

    _known: tuple[int, int, np.ndarray] | None = None

    def __init__(self, room: int, unmade: _Unmade | None) -> None:
        super().__init__()
        self._unmade = unmade
        if unmade is None:  # transformers makes a layer when the model first writes to it
            self.layer_class_to_replicate = cast("Any", functools.partial(_AppendLayer, room))

    @property  # type: ignore[override]
    def layers(self) -> list[_AppendLayer]:
        """The layers. They are made at the first access."""
        if self._unmade is not None:
            self._layers, self._unmade = self._unmade.make(), None
        return self._layers

    @layers.setter
    def layers(self, layers: list[_AppendLayer]) -> None:
        self._layers, self._unmade = layers, None

    def addresses(self, new: int) -> np.ndarray | None:
        """Return the addresses of the layers for kernels, with room for `new` more tokens: int64 `(layers, 8)`.

        A row has the address of the keys, the address of the values, and the tokens between two heads; the same three
        numbers of the lent part; and the lent part's first position and length. None if the cache is empty. After
        writing tokens to these addresses, call `advance`.
        """
        if self._unmade is not None and (table := self._unmade.table(new)) is not None:
            return table
        if not self.layers or not self.layers[0].is_initialized:
            return None
        changes = sum([layer.changes for layer in self.layers])
        if self._known is None or self._known[0] != changes or self.layers[0].own + new > self._known[1]:
            for layer in self.layers:
                layer.make_room(new)
            table = np.array([layer.address() for layer in self.layers], dtype=np.int64)
            self._known = sum([layer.changes for layer in self.layers]), int(table[:, 2].min()), table
        return self._known[2]

    def shapes(self) -> list[tuple[int, int]]:
        """Return the number of KV heads and `head_dim` of each layer."""
        return [layer.shape()[:2] for layer in self.layers]

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self._unmade.buffers[0][0].dtype if self._unmade is not None else self.layers[0].shape()[2]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that are held."""
        return self._unmade.length if self._unmade is not None else super().get_seq_length(layer_idx)

    def advance(self, new: int) -> None:
        """Count `new` more tokens as held, which were written where `addresses` says."""
        if self._unmade is not None:
            self._unmade.length += new
            return
        for layer in self.layers:
            layer.length += new

    def behind(self, start: int) -> Layers:
        """Return the tokens from `start` on, as views unless lent tokens are among them."""
        return Layers((layer.behind(start) for layer in self.layers), tokens=self.get_seq_length() - start)


@dataclass(frozen=True, slots=True)
class _Lent:
    """One layer of a loan, `(1, kv_heads, seq_len, head_dim)` each, and the position of its first token."""

    kv: LayerKV
    start: int

    @property
    def length(self) -> int:
        return int(self.kv[0].shape[-2])

    @property
    def end(self) -> int:
        return self.start + self.length


class _AppendLayer(DynamicLayer):
    """A `DynamicLayer` that writes into a buffer with spare room. `keys` and `values` are views of the filled part.

    Args:
        room: the room for further tokens in a new buffer.
        buffers: `(1, kv_heads, capacity, head_dim)` each.
        own: the number of tokens in the buffers.
        lent: tokens between those of the buffers, which stay in another cache until they are copied.
    """

    _keys: torch.Tensor
    _values: torch.Tensor

    def __init__(self, room: int, buffers: LayerKV | None = None, own: int = 0, lent: _Lent | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room, self._lent = room, lent
        self.length = own + (lent.length if lent else 0)
        self.changes = 0
        if buffers is not None:
            self.take(buffers, self.length)

    def take(self, buffers: LayerKV, length: int) -> None:
        """Use these buffers. With the lent tokens, the layer then has `length` tokens, and appends after them."""
        _initialize(self, buffers[0])
        self._keys, self._values = buffers
        self.length = length
        self.changes += 1

    @property
    def own(self) -> int:
        """The number of tokens in the buffers."""
        return self.length - (self._lent.length if self._lent else 0)

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys, `(batch, kv_heads, seq_len, head_dim)`."""
        return self._whole()[0] if self.is_initialized else None

    @keys.setter
    def keys(self, none: torch.Tensor | None) -> None: ...  # transformers' constructor assigns None

    @property
    def values(self) -> torch.Tensor | None:
        """All values, `(batch, kv_heads, seq_len, head_dim)`."""
        return self._whole()[1] if self.is_initialized else None

    @values.setter
    def values(self, none: torch.Tensor | None) -> None: ...

    def get_seq_length(self) -> int:
        """Return the number of tokens, lent ones included."""
        return self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, `(batch, kv_heads, new_tokens, head_dim)` each, and return all keys and values."""
        new = key_states.shape[-2]
        if not self.is_initialized:
            _initialize(self, key_states)
            self._reserve((key_states, value_states), new + self.room)
        if self._lent is not None:
            self._whole()
        self.make_room(new)
        end = self.length + new
        self._keys[..., self.length : end, :] = key_states
        self._values[..., self.length : end, :] = value_states
        self.length = end
        return self._whole()

    def make_room(self, new: int) -> None:
        """Enlarge the buffers if they have no room for `new` more tokens."""
        if self.own + new > self._keys.shape[-2]:
            self._reserve((self._keys, self._values), 2 * (self.own + new))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (a negative number, as in transformers 5)."""
        if self._lent and self.length + tokens_to_remove < self._lent.end:
            self._whole()
        self.length += tokens_to_remove

    def behind(self, start: int) -> LayerKV:
        """Return the tokens from `start` on, as views unless lent tokens are among them."""
        if self._lent is not None and start < self._lent.end:
            keys, values = self._joined(self.own)
        else:
            keys, values = self._keys[..., : self.own, :], self._values[..., : self.own, :]
            start -= self._lent.length if self._lent else 0
        return keys[..., start:, :], values[..., start:, :]

    def shape(self) -> tuple[int, int, torch.dtype]:
        """Return the number of KV heads, `head_dim` and the dtype."""
        return self._keys.shape[1], self._keys.shape[-1], self._keys.dtype

    def address(self) -> tuple[int, ...]:
        """Return the layer's row of `GenerationCache.addresses`."""
        own = self._keys.data_ptr(), self._values.data_ptr(), self._keys.shape[-2]
        if self._lent is None:
            return *own, 0, 0, 0, 0, 0
        keys, values = self._lent.kv
        between = keys.stride(1) // keys.shape[-1]
        return *own, keys.data_ptr(), values.data_ptr(), between, self._lent.start, self._lent.length

    def _whole(self) -> LayerKV:
        """Return all keys and values. The first call copies the lent tokens into the buffers."""
        if self._lent is not None:
            self._keys, self._values = self._joined(self._keys.shape[-2])
            self._lent = None
            self.changes += 1
        return self._keys[..., : self.length, :], self._values[..., : self.length, :]

    def _joined(self, capacity: int) -> LayerKV:
        """Return a copy of all tokens in buffers with room for `capacity` tokens besides the lent ones."""
        assert self._lent is not None
        start, length, own = self._lent.start, self._lent.length, self.own
        joined = []
        for mine, theirs in zip((self._keys, self._values), self._lent.kv, strict=True):
            target = mine.new_empty((*mine.shape[:-2], capacity + length, mine.shape[-1]))
            target[..., :start, :] = mine[..., :start, :]
            target[..., start : start + length, :] = theirs
            target[..., start + length : self.length, :] = mine[..., start:own, :]
            joined.append(target)
        return joined[0], joined[1]

    def _reserve(self, like: LayerKV, capacity: int) -> None:
        keys, values = (t.new_empty((*t.shape[:-2], capacity, t.shape[-1])) for t in like)
        if self.length:
            keys[..., : self.own, :] = self._keys[..., : self.own, :]
            values[..., : self.own, :] = self._values[..., : self.own, :]
        self._keys, self._values = keys, values
        self.changes += 1


class _RecurrentCache(_PausingCache):
    """The cache of a model with recurrent layers. `run` counts its tokens, since a state does not tell their number.

    Args:
        kinds: the model's layers.
        tokens: the number of tokens that were read.
        buffers: keys and values of each attention layer, not copied; they may have room for more tokens.
        states: the states of the recurrent layers; None for an empty cache.
        room: the room for tokens in a new buffer.
        copied: copy the states.
    """

    def __init__(
        self,
        kinds: Kinds,
        tokens: int,
        buffers: Iterable[LayerKV],
        states: States | None,
        *,
        room: int = 0,
        copied: bool = False,
    ) -> None:
        super().__init__()
        self.kinds, self.tokens = kinds, tokens
        self._maps = (tokens, () if copied or states is None else states.maps)
        held, rows = iter(buffers), iter(states.tensors if states else ())
        for attends, count in kinds:
            layer: Any = _Linear(number_of_states=count) if count else _Dummy()
            if attends:
                layer = _RecurrentAppendLayer(room, count) if count else _AppendLayer(room)
                if states is not None:
                    layer.take(next(held), tokens)
            if count and states is not None:
                _restore(layer, next(rows), copied=copied)
            self.layers.append(layer)

    @property
    def states(self) -> States | None:
        """The states of the recurrent layers, not copied; None if the cache is empty."""
        if not self.tokens:
            return None
        recurrent = [layer for layer in self.layers if isinstance(layer, _Linear)]
        rows = tuple((*layer.conv_states.values(), *layer.recurrent_states.values()) for layer in recurrent)
        tokens, maps = self._maps
        return States(self.kinds, rows, maps if tokens == self.tokens else ())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens that were read."""
        return self.tokens


def row_of(cache: Cache, layer_idx: int) -> tuple[torch.Tensor | None, ...]:
    """Return one recurrent layer's states without copying: inputs of convolutions, then recurrent states, or None."""
    layer: Any = cache.layers[layer_idx]
    return (*layer.conv_states.values(), *layer.recurrent_states.values())


def lone_cache(layer_idx: int, conv: torch.Tensor, state: torch.Tensor) -> DynamicCache:
    """Make a cache for one recurrent layer only, which continues from these states. They are not copied."""
    cache = DynamicCache()
    cache.layers.extend(_Linear(number_of_states=1) for _ in range(layer_idx + 1))
    _restore(cache.layers[layer_idx], (conv, state), copied=False)
    return cache


def _restore(layer: Any, tensors: tuple[torch.Tensor | None, ...], *, copied: bool) -> None:
    """Set the states from which a recurrent layer continues."""
    half = len(tensors) // 2
    for index, state in enumerate(tensors):
        if state is None:
            continue
        if index < half:
            layer.lazy_initialization(conv_states=state, state_idx=index)
            layer.conv_states[index] = state.clone() if copied else state
        else:
            layer.lazy_initialization(recurrent_states=state, state_idx=index - half)
            layer.recurrent_states[index - half] = state.clone() if copied else state
        layer.has_previous_state[index % half] = True


def behind(cache: Cache, start: int) -> Layers:
    """Return the tokens of a cache from `start` on, for reading only."""
    return cache.behind(start) if isinstance(cache, GenerationCache) else cut(layers_of(cache), start)


def crop(cache: Cache, length: int) -> None:
    """Remove all but the first `length` tokens of a generation's cache."""
    for layer in cache.layers:  # after an error in the middle of a pass, the layers' lengths differ
        excess = layer.get_seq_length() - length  # type: ignore[union-attr]
        if excess > 0:
            layer.crop(-excess)  # type: ignore[union-attr]


class RowsCache(_PausingCache):
    """The cache of a pass with one new token for each of several generations, each with its own cache.

    Attributes:
        held: the keys and values of each generation in the current layer, including those of the new token.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        super().__init__()
        self._caches = caches
        self.held: list[LayerKV] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append each new token, `(generations, kv_heads, 1, head_dim)`, to its own cache; return the arguments."""
        between = BETWEEN_LAYERS.get()
        if between is not None:
            between()
        self.held = [
            cache.layers[layer_idx].update(key_states[i : i + 1], value_states[i : i + 1])  # type: ignore[union-attr]
            for i, cache in enumerate(self._caches)
        ]
        return key_states, value_states


def check_cacheable(model: PreTrainedModel) -> None:
    """Refuse a model whose cache cannot be stored and reused.

    Raises:
        UnsupportedModelError: the model is an encoder-decoder, has its own cache class, or has recurrent layers whose
            states are not in a `DynamicCache` in this version of transformers.
    """
    config = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: its decoder's cache depends on the encoder's input. "
            "Use a decoder-only model (AutoModelForCausalLM)."
        )
    own = _own_layers(config.get_text_config(decoder=True))
    if beside := sorted({type(layer).__name__ for layer in own if not _is_plain(layer)}):
        raise UnsupportedModelError(
            f"{name} caches more per token than a key and a value ({', '.join(beside)}), which kvcag cannot store. "
            "Use another model."
        )
    module = sys.modules[type(model).__module__]
    if beside := [key for key, each in vars(module).items() if _is_cache_of(each, module.__name__)]:
        raise UnsupportedModelError(
            f"{name} has its own cache class ({beside[0]}), which kvcag cannot store. Use another model."
        )
    recurrent = bool(kinds_of(model))
    if recurrent and not _CONTINUES:
        raise UnsupportedModelError(f"{name} has recurrent layers, which need transformers 5.24 or newer. Upgrade it.")
    if getattr(model, "_is_stateful", False) and not recurrent:
        raise UnsupportedModelError(
            f"{name} has a recurrent state that transformers does not put into a DynamicCache, so kvcag cannot store "
            "it. Use another model."
        )


Watch: TypeAlias = Callable[[int, LayerKV, LayerKV], None]
"""Called as `watch(layer_idx, held, new)` before a layer writes new keys and values."""


def zeros_like(layers: Sequence[LayerKV], tokens: int) -> Layers:
    """Return zeros for `tokens` tokens, with the heads, sizes, dtypes and devices of `layers`."""

    def zeros(of: torch.Tensor) -> torch.Tensor:
        return of.new_zeros((*of.shape[:-2], tokens, of.shape[-1]))

    return Layers(((zeros(keys), zeros(values)) for keys, values in layers), tokens=tokens)


def scatter_cache(layers: Sequence[LayerKV], positions: torch.Tensor, watch: Watch | None = None) -> DynamicCache:
    """Make a cache over `layers` that writes new tokens in place, at `positions` (int64, 1-D), not at the end.

    A forward pass over the cache recomputes the keys and values of these tokens in every layer, inside `layers`.
    """
    return _cache(_ScatterLayer(index, kv, positions, watch) for index, kv in enumerate(layers))


def _cache(layers: Iterable[DynamicLayer]) -> DynamicCache:
    cache = _PausingCache()
    cache.layers.extend(layers)
    return cache


class _RecurrentAppendLayer(_Linear, _AppendLayer):  # type: ignore[misc]  # mypy does not see the class
    """A layer with both attention and recurrent states (Falcon-H1)."""

    def __init__(self, room: int, number_of_states: int) -> None:
        _AppendLayer.__init__(self, room)
        _Linear.__init__(self, number_of_states=number_of_states)


class _HeldLayer(DynamicLayer):
    """A layer over given tensors, not copied."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, kv: LayerKV) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _initialize(self, kv[0])
        self.keys, self.values = kv


class _ScatterLayer(_HeldLayer):
    def __init__(self, index: int, kv: LayerKV, positions: torch.Tensor, watch: Watch | None) -> None:
        super().__init__(kv)
        self.index, self.positions, self.watch = index, positions.to(kv[0].device), watch

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.watch is not None:
            self.watch(self.index, (self.keys, self.values), (key_states, value_states))
        self.keys.index_copy_(-2, self.positions, key_states)
        self.values.index_copy_(-2, self.positions, value_states)
        return self.keys, self.values


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the module with the layers, without the language modelling head."""
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "config") else model.base_model  # ModernBERT's `get_decoder` returns its head
