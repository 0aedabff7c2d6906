"""The one module that touches transformers' cache classes.

Everything else in kvcag sees a cache as a list with one `(keys, values)` a layer, each
`(batch, kv_heads, seq_len, head_dim)`, the keys already rotated to their positions.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from kvcag.errors import UnsupportedModelError
from kvcag.fingerprint import ModelFingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LayerKV: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_STATEFUL = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "ssm", "hybrid"}
"""Layer types that fold the past into a state of fixed size: no prefix can be cut from it, none put beside another."""


class ContextCache(DynamicCache):
    """A `DynamicCache` that knows which tokens are in it and which model made it.

    Attributes:
        token_ids: 1-D int64, every token in the cache when it was made.
        fingerprint: the model that made it.
        messages: the chat messages it holds, where their turns are closed. None where it ends within the turn that
            carries the documents, so that a continuation has to close that turn first.
        is_exact: it is what the model computes for these tokens; False where documents were merged without being
            recomputed.
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
        """A cache over `layers`, which it takes as they are.

        Args:
            layers: keys and values of each layer, `(1, kv_heads, seq_len, head_dim)`, keys rotated to their positions.
            token_ids: 1-D int64, `(seq_len,)`: the tokens that they were made from.
            fingerprint: of the model that made them, `engine.fingerprint`.
            messages: the chat messages they hold, where their turns are closed.
            is_exact: they are what the model computes for these tokens.
        """
        cache = cls()
        cache.layers.extend(cache_of(layers).layers)
        cache.token_ids, cache.fingerprint = token_ids, fingerprint
        cache.messages, cache.is_exact = messages, is_exact
        return cache


def cache_argument(module: torch.nn.Module, cache: Cache) -> dict[str, Cache]:
    """The keyword argument under which `module.forward` takes a cache.

    transformers 5.24 renamed `past_key_values` to `cache`, warns about the old name, and removes it in 5.40.
    """
    return {_cache_name(type(module).forward): cache}


@functools.cache
def _cache_name(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def layers_of(cache: Cache) -> list[LayerKV]:
    """The keys and values of each layer, not copied. Empty for a cache that holds nothing.

    Raises:
        UnsupportedModelError: a layer is quantised, static, windowed or recurrent: what it holds is not one key and
            one value for each token.
    """
    held: list[LayerKV] = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer and not isinstance(layer, _AppendLayer):
            raise UnsupportedModelError(
                f"the cache has a {type(layer).__name__}, which does not hold one key and one value for each token. "
                "Use a plain DynamicCache(), made without a config."
            )
        if layer.keys is not None and layer.values is not None and layer.get_seq_length():
            held.append((layer.keys, layer.values))
    return held


def cache_of(layers: Iterable[LayerKV]) -> DynamicCache:
    """A `DynamicCache` over the given tensors, which it takes as they are.

    It copies nothing: `DynamicCache.update` concatenates, so whoever generates with it never writes into them. Where
    the result is handed to a caller, who may write into it, give it tensors of its own (`clone`).
    """
    cache = DynamicCache()
    for keys, values in layers:
        layer = DynamicLayer()
        _initialize(layer, keys)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _initialize(layer: DynamicLayer, like: torch.Tensor) -> None:
    """What `lazy_initialization` does, without its empty tensors."""
    layer.device, layer.is_initialized = like.device, True
    layer.dtype = like.dtype  # type: ignore[attr-defined]  # read by transformers before 5.24


def clone(cache: Cache) -> DynamicCache:
    """A copy that shares no memory with `cache`."""
    return cache_of((keys.clone(), values.clone()) for keys, values in layers_of(cache))


def share(cache: DynamicCache) -> DynamicCache:
    """Another cache over the same tensors: generating with it, which concatenates, leaves `cache` as it is."""
    shared = DynamicCache()
    shared.layers.extend(copy.copy(layer) for layer in cache.layers)
    return shared


def cut(layers: Sequence[LayerKV], start: int, end: int | None = None) -> list[LayerKV]:
    """Views of the tokens `start:end` of each layer."""
    return [(keys[..., start:end, :], values[..., start:end, :]) for keys, values in layers]


def contiguous_copy(layers: Iterable[LayerKV]) -> list[LayerKV]:
    """The same values in contiguous memory of their own: keeping a slice must not keep what it was cut from."""
    packed = torch.contiguous_format
    return [(keys.clone(memory_format=packed), values.clone(memory_format=packed)) for keys, values in layers]


def concat(parts: Sequence[Sequence[LayerKV]]) -> list[LayerKV]:
    """The parts one after another, layer by layer, in fresh memory."""
    return [
        (torch.cat([layer[0] for layer in layers], dim=-2), torch.cat([layer[1] for layer in layers], dim=-2))
        for layers in zip(*parts, strict=True)
    ]


def nbytes(layers: Iterable[LayerKV]) -> int:
    """Bytes of the keys and values."""
    return sum(t.numel() * t.element_size() for kv in layers for t in kv)


def generation_cache(parts: Sequence[Sequence[LayerKV]], room: int) -> DynamicCache:
    """The cache of one generation: a copy of `parts`, one after another, with room for `room` more tokens.

    New tokens are written in place instead of concatenating the whole context once a token, so a decode step costs
    the same after 10,000 tokens of context as after ten. It grows by doubling where the room does not suffice, shares
    nothing with `parts`, and is released with its last reference.
    """
    cache = _PausingCache()
    for layers, buffers in zip(zip(*parts, strict=True), _filled(parts, room), strict=True):
        layer = _AppendLayer(room)
        layer.take(buffers, sum(keys.shape[-2] for keys, _ in layers))
        cache.layers.append(layer)
    if not cache.layers:  # transformers makes a layer when the model first writes to it
        cache.layer_class_to_replicate = cast("Any", functools.partial(_AppendLayer, room))
    return cache


def _filled(parts: Sequence[Sequence[LayerKV]], room: int) -> list[LayerKV]:
    """Buffers of each layer that begin with `parts`, one after another, and have room for `room` more tokens.

    Layers of one shape are one tensor, filled by a few calls: on a GPU, calls are what a copy of 72 tensors costs.
    """
    flat = [[tensor for kv in part for tensor in kv] for part in parts]
    if not flat or not flat[0]:
        return []
    length = sum(tensors[0].shape[-2] for tensors in flat)
    kinds = {(t.shape[:-2], t.shape[-1], t.dtype, t.device) for t in flat[0]}
    like = flat[0][0]
    if len(kinds) == 1:
        whole = like.new_empty((len(flat[0]), *like.shape[:-2], length + room, like.shape[-1]))
        buffers = list(whole.unbind())
    else:
        buffers = [t.new_empty((*t.shape[:-2], length + room, t.shape[-1])) for t in flat[0]]
    # A GPU copies eight bytes at a time in half the time that it takes for two.
    wide = like.is_cuda and all(t.shape[-1] * t.element_size() % 8 == 0 and t.stride(-1) == 1 for t in flat[0])
    start = 0
    for tensors in flat:
        end = start + tensors[0].shape[-2]
        targets = whole[..., start:end, :].unbind() if len(kinds) == 1 else [b[..., start:end, :] for b in buffers]
        if wide:
            targets, tensors = ([t.view(torch.int64) for t in each] for each in (targets, tensors))
        torch._foreach_copy_(list(targets), tensors)
        start = end
    return list(zip(buffers[::2], buffers[1::2], strict=True))


BETWEEN_LAYERS: ContextVar[Callable[[], None] | None] = ContextVar("kvcag_between_layers", default=None)
"""Called before each layer of a forward pass writes to its cache. An error that it raises ends the pass there, and
`crop` puts the cache right again."""


class _PausingCache(DynamicCache):
    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        between = BETWEEN_LAYERS.get()
        if between is not None:
            between()
        return super().update(*args, **kwargs)


class _AppendLayer(DynamicLayer):
    """A `DynamicLayer` that writes into a buffer with spare room. `keys` and `values` are views of what is filled."""

    _keys: torch.Tensor
    _values: torch.Tensor

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room
        self.length = 0

    def take(self, buffers: LayerKV, length: int) -> None:
        """Hold the first `length` tokens of `buffers`, and write what comes behind them."""
        _initialize(self, buffers[0])
        self._keys, self._values = buffers
        self.advance(length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `(batch, kv_heads, new_tokens, head_dim)` and return all that is held."""
        new = key_states.shape[-2]
        if not self.is_initialized:
            _initialize(self, key_states)
            self._reserve((key_states, value_states), new + self.room)
        end = self.length + new
        self.make_room(new)
        self._keys[..., self.length : end, :] = key_states
        self._values[..., self.length : end, :] = value_states
        self.length = end
        self.keys, self.values = self._keys[..., :end, :], self._values[..., :end, :]
        return self.keys, self.values

    def make_room(self, new: int) -> LayerKV:
        """The buffers, large enough for `new` more tokens."""
        if self.length + new > self._keys.shape[-2]:
            self._reserve((self._keys, self._values), 2 * (self.length + new))
        return self._keys, self._values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (a negative number, as in transformers 5)."""
        self.advance(tokens_to_remove)

    def advance(self, new: int) -> None:
        """Count `new` more tokens of the buffers as held; fewer where it is negative."""
        self.length += new
        self.keys, self.values = self._keys[..., : self.length, :], self._values[..., : self.length, :]

    def _reserve(self, like: LayerKV, capacity: int) -> None:
        keys, values = (t.new_empty((*t.shape[:-2], capacity, t.shape[-1])) for t in like)
        if self.length:
            keys[..., : self.length, :] = self._keys[..., : self.length, :]
            values[..., : self.length, :] = self._values[..., : self.length, :]
        self._keys, self._values = keys, values


def roomy_buffers(cache: Cache, new: int) -> list[LayerKV] | None:
    """The whole buffers of a generation's cache, each with room for `new` more tokens, made where it lacks.

    `(1, kv_heads, capacity, head_dim)` each, contiguous. None for another cache, or one that holds nothing yet.
    Whoever writes tokens into them says so by `advance`.
    """
    buffers = []
    for layer in cache.layers:
        if not isinstance(layer, _AppendLayer) or not layer.is_initialized:
            return None
        buffers.append(layer.make_room(new))
    return buffers


def advance(cache: Cache, new: int) -> None:
    """Count `new` more tokens, which were written into `roomy_buffers`."""
    for layer in cast("list[_AppendLayer]", cache.layers):
        layer.advance(new)


def crop(cache: Cache, length: int) -> None:
    """Keep the first `length` tokens of a generation's cache."""
    for layer in cache.layers:  # after an error in the middle of a step they differ in length
        excess = layer.get_seq_length() - length  # type: ignore[union-attr]
        if excess > 0:
            layer.crop(-excess)  # type: ignore[union-attr]


def check_cacheable(model: PreTrainedModel) -> None:
    """Refuse a model whose past cannot be kept as one key and one value for each token.

    Raises:
        UnsupportedModelError: an encoder-decoder, or a model with recurrent or linear-attention layers.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder: its decoder's cache depends on the encoder's input. "
            "Use a decoder-only model (AutoModelForCausalLM)."
        )
    text = config.get_text_config(decoder=True)
    types = set(getattr(text, "layer_types", None) or ()) | set(getattr(text, "layers_block_type", None) or ())
    states = sorted(t for t in types if any(word in t for word in _STATEFUL))
    if states or getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps a recurrent state ({', '.join(states) or 'stateful'} layers): its past "
            "cannot be cut at a token or put beside another. Use a model whose layers are all attention."
        )


Watch: TypeAlias = Callable[[int, LayerKV, LayerKV], None]
"""Called as `watch(layer_idx, held, new)` before a layer takes new keys and values in."""


def scatter_cache(layers: Sequence[LayerKV], positions: torch.Tensor, watch: Watch | None = None) -> DynamicCache:
    """A cache over `layers` that writes the tokens it is given in place, at `positions`, instead of at the end.

    A forward pass over it recomputes those tokens' keys and values for every layer. `layers` is written to.
    """
    return _cache(_ScatterLayer(index, kv, positions, watch) for index, kv in enumerate(layers))


def peek_cache(layers: Sequence[LayerKV]) -> DynamicCache:
    """A cache that shows new tokens after `layers` and keeps none of them: a pass over it leaves no trace."""
    return _cache(_PeekLayer(kv) for kv in layers)


def _cache(layers: Iterable[DynamicLayer]) -> DynamicCache:
    cache = _PausingCache()
    cache.layers.extend(layers)
    return cache


class _HeldLayer(DynamicLayer):
    """A layer over given tensors, not copied."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, kv: LayerKV) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _initialize(self, kv[0])
        self.keys, self.values = kv


class _PeekLayer(_HeldLayer):
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


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
