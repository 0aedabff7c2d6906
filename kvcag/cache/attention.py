"""Positions of tokens: forward passes over a cache by position, and re-rotation of keys to other positions.

**By position.** transformers makes masks from indices, so its masks do not work for tokens at scattered positions. For
several tokens over a cache, its `sdpa` attention takes a 4-D mask, copies keys and values once per query head, and
computes masked scores too. So such passes use kvcag's own attention function, registered with transformers
(`AttentionInterface`), in which each token attends by its position. The function works on one block of queries at a
time, over the keys up to the block's last position, and never makes the mask or the weights of a whole context.

**Re-rotation.** RoPE (Su et al., 2021) rotates each pair of a key's components by the angle `position * frequency`, so
a key moves to another position by a rotation by the difference of the angles. Which components, pairs, frequencies and
layers a model rotates is not read from its configuration but measured once on the model: the same tokens are encoded at
two offsets, and the rotation that maps one layer's keys onto the other's is that layer's rotation. A model without such
a rotation is refused, so an untested architecture is either handled correctly or refused.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcag.cache.layers import (
    BETWEEN_LAYERS,
    LayerKV,
    RowsCache,
    Turn,
    check_cacheable,
    contiguous_copy,
    decoder_of,
    device_of,
    generation_cache,
    kinds_of,
    layers_of,
    run,
    scatter_cache,
)
from kvcag.cache.states import check_affine
from kvcag.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME, OVER_SDPA = "kvcag", "kvcag_sdpa"
"""The names of kvcag's attention function: `OVER_SDPA` if the model's own implementation is `sdpa`, else `_NAME`. If
other code runs the model at the same time, it gets `sdpa` under `OVER_SDPA`, and an error under `_NAME`."""

_BLOCK = {"cpu": 64, "cuda": 1024}
"""The number of queries that attend as one block, to the keys up to the last query's position. The block's mask takes
one byte per key and query: 0.5 and 8 MiB for 8,192 keys. Small blocks compute fewer masked scores; large blocks need
fewer kernel launches."""

_RUN = {"cpu": 256, "cuda": 1024}
"""`_BLOCK` for queries at consecutive positions, where a large block has few masked scores."""


@dataclass(frozen=True, slots=True)
class Call:
    """The parameters of one layer's attention.

    Attributes:
        positions: the positions of the queries, ascending, int64 `(queries,)`. Key `i` is at position `i`.
        scaling: the factor of the scores.
        window: how many tokens a query sees, including its own; None: all.
        softcap: the bound of the scores, as in Gemma 2; None: unbounded.
        masks: the masks of the pass.
    """

    positions: torch.Tensor
    scaling: float
    window: int | None
    softcap: float | None
    masks: Masks

    def mask(self, queries: slice, keys: int) -> torch.Tensor:
        """Return which of the first `keys` keys each query of the slice sees: bool `(queries, keys)`."""
        at = self.positions[queries, None]
        key = torch.arange(keys, device=at.device)
        seen = key <= at
        return seen if self.window is None else seen & (key > at - self.window)

    def hidden(self, queries: slice, keys: int) -> tuple[int, torch.Tensor]:
        """Return the first key that some query of the slice does not see, and the mask from that key on.

        The mask is bool `(queries, keys - first)`, True for keys that the query does not see.
        """

        def make() -> torch.Tensor:
            return ~self.mask(queries, keys)[:, first:]

        first = 0 if self.window is not None else self.masks.at[queries.start] + 1
        return first, self.masks.get((queries.start, queries.stop, keys, self.window, self.positions.device), make)

    def additive(self, queries: slice, keys: int, times: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the mask as a term to add to the scores, repeated `times` times: `(1, 1, times * queries, keys)`."""

        def make() -> torch.Tensor:
            return _additive(self.mask(queries, keys), dtype).repeat(times, 1)[None, None]

        return self.masks.get((queries.start, queries.stop, keys, self.window, times, dtype), make)


class Masks:
    """A cache of masks for all layers of a pass. Masks beyond `_MASKS` bytes are made again in each layer.

    Attributes:
        at: the positions of the queries.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self.at: list[int] = positions.tolist()
        self._made: dict[tuple[object, ...], torch.Tensor] = {}
        self._bytes = 0

    def get(self, key: tuple[object, ...], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the mask with this key. Calls `make` if the mask is not cached."""
        mask = self._made.get(key)
        if mask is None:
            mask = make()
            if self._bytes + mask.nbytes <= _MASKS:
                self._made[key] = mask
                self._bytes += mask.nbytes
        return mask


_MASKS = 64 << 20
"""The most bytes of masks that a pass caches, enough for 700 recomputed tokens among 8,000."""


Reader: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, Call], "torch.Tensor | None"]
"""Called as `reader(layer_idx, query, key, value, call)` before a layer attends. `query` is `(1, heads, queries,
head_dim)`; `key` and `value` are all that the layer sees, `(1, kv_heads, keys, head_dim)`. A reader may return the
attention's output, `(1, queries, heads, head_dim)`, if it computed the output anyway, or raise `EnoughError`."""


class EnoughError(Exception):
    """Raised by a reader that needs no further layers. It ends the pass."""


@dataclass(frozen=True, slots=True)
class _Pass:
    positions: torch.Tensor
    blocks: list[tuple[slice, int]]
    """Each block of queries with its number of keys, as Python numbers, so that no layer waits for the device."""
    reader: Reader | None
    implementation: str
    masks: Masks


@dataclass(frozen=True, slots=True)
class _Rows:
    """A pass with one token of each of several generations, each of which attends to its own cache."""

    cache: RowsCache
    passes: list[_Pass]


_running: ContextVar[_Pass | _Rows] = ContextVar("kvcag_pass")


@torch.no_grad()
def attend(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    cache: Cache,
    reader: Reader | None = None,
) -> None:
    """Run tokens at given positions through every layer, over a cache.

    The model's own attention function is restored after the pass, also after an error.

    Args:
        model: a model that `check_mergeable` accepts.
        token_ids: int64 `(seq_len,)`.
        positions: their positions, ascending, int64 `(seq_len,)`.
        cache: its `update` must return keys at the positions 0, 1, 2, ….
        reader: called in each layer. Its `EnoughError` ends the pass without an error.
    """
    with suppress(EnoughError), by_position(model, positions, reader):
        run(decoder_of(model), token_ids, cache, positions)


@torch.no_grad()
def predict(model: PreTrainedModel, token_ids: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Run `attend`, and return the logits of the last token, `(1, vocabulary)`."""
    with by_position(model, positions):
        logits: torch.Tensor = run(model, token_ids, cache, positions, last=True).logits
    return logits[:, -1]


@contextmanager
def by_position(model: PreTrainedModel, positions: torch.Tensor, reader: Reader | None = None) -> Iterator[None]:
    """Within the block, a forward pass of `model` over a cache attends by position.

    The pass's tokens are at `positions` (int64 `(seq_len,)`, ascending), and the keys that the cache returns, including
    new ones, at 0, 1, 2, …. `check_mergeable` must accept the model: it then uses transformers' `AttentionInterface`
    in every layer.
    """
    decoder, device = decoder_of(model), device_of(model)
    with _ours(decoder) as own:
        token = _running.set(_Pass(positions.to(device), _seen(positions, device), reader, own, Masks(positions)))
        try:
            yield
        finally:
            _running.reset(token)


@contextmanager
def by_row(model: PreTrainedModel, caches: Sequence[Cache]) -> Iterator[RowsCache]:
    """Yields a cache for a forward pass with one new token for each of `caches`, at the end of each.

    The model must be one that `by_position` accepts.
    """
    cache = RowsCache(caches)
    with _ours(decoder_of(model)) as own:
        ends = [held.get_seq_length() for held in caches]
        at = [torch.tensor([end]) for end in ends]
        passes = [
            _Pass(each.to(device_of(model)), [(slice(0, 1), end + 1)], None, own, Masks(each))
            for each, end in zip(at, ends, strict=True)
        ]
        token = _running.set(_Rows(cache, passes))
        try:
            yield cache
        finally:
            _running.reset(token)


@contextmanager
def _ours(decoder: torch.nn.Module) -> Iterator[str]:
    """Within the block, the decoder uses kvcag's attention function. Several passes may run at the same time.

    Yields the name of the decoder's own implementation, which is restored after the last of them.
    """
    config: Any = decoder.config
    with _swapping:
        own, passes = _swapped.get(decoder, (config._attn_implementation, 0))
        _swapped[decoder] = own, passes + 1
        config._attn_implementation = OVER_SDPA if own == "sdpa" else _NAME
    try:
        yield own
    finally:
        with _swapping:
            _, passes = _swapped.pop(decoder)
            if passes > 1:
                _swapped[decoder] = own, passes - 1
            else:
                config._attn_implementation = own


_swapped: WeakKeyDictionary[torch.nn.Module, tuple[str, int]] = WeakKeyDictionary()
"""For each decoder that uses kvcag's attention function now: its own implementation, and the number of passes."""
_swapping = threading.Lock()


def put_back_attention() -> None:
    """Restore every decoder's own attention function in a forked process, in which no pass runs."""
    global _swapping
    _swapping = threading.Lock()
    for decoder, (own, _) in list(_swapped.items()):
        decoder.config._attn_implementation = own  # type: ignore[union-attr]
    _swapped.clear()


def _seen(positions: torch.Tensor, device: torch.device) -> list[tuple[slice, int]]:
    """Divide the queries at `positions` into blocks; return each block with the number of keys that it sees."""
    at = positions.tolist()
    has_gaps = bool(at) and at[-1] - at[0] + 1 > len(at)
    if has_gaps and device.type == "cpu":
        blocks = _near(at)
    else:
        blocks = _blocks(len(at), (_BLOCK if has_gaps else _RUN).get(device.type, 512))
    return [(block, at[block.stop - 1] + 1) for block in blocks]


def _near(at: list[int]) -> list[slice]:
    """Divide queries into blocks of nearby positions, which have few masked scores, for a CPU.

    A block of 16 queries takes hardly more time per query than a larger block.
    """
    blocks, start = [], 0
    for index, position in enumerate(at):
        if index - start == _BLOCK["cpu"] or (index - start >= 16 and position - at[start] > 256):
            blocks.append(slice(start, index))
            start = index
    return [*blocks, slice(start, len(at))]


def _blocks(queries: int, size: int) -> list[slice]:
    """Divide queries into blocks of `size`. Avoids blocks of 32k + 1 queries, except a single query.

    In such a block, PyTorch's memory-efficient kernel uses a wrong stride for broadcast keys, and the last query's
    output is wrong (pytorch#191937, seen with 2.11 on an H100).
    """
    blocks = [slice(start, min(start + size, queries)) for start in range(0, queries, size)]
    start, stop = (blocks[-1].start, blocks[-1].stop) if blocks else (0, 0)
    if stop - start > 1 and (stop - start) % 32 == 1:
        blocks[-1:] = [slice(start, stop - 1), slice(stop - 1, stop)]
    return blocks


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' `AttentionInterface` requires; `attention_mask` is None.

    Returns `(batch, queries, heads, head_dim)`.
    """
    running = _running.get()
    if isinstance(running, _Pass):
        return _attend(running, module, query, key, value, scaling, kwargs), None
    rows = zip(running.passes, torch.split(query, 1), running.cache.held, strict=True)
    return torch.cat([_attend(each, module, q, k, v, scaling, kwargs) for each, q, (k, v) in rows]), None


def _attend(
    running: _Pass,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    if (queries := query.shape[2]) < len(running.positions):  # Gemma 4: layers that share keys get the last ones
        last = running.positions[-queries:]
        running = replace(running, positions=last, blocks=_seen(last, last.device), masks=Masks(last))
    call = Call(
        running.positions.to(key.device),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        kwargs.get("sliding_window"),
        kwargs.get("softcap"),
        running.masks,
    )
    read = None
    if running.reader is not None:
        read = running.reader(int(module.layer_idx), query, key, value, call)  # type: ignore[arg-type]
    # sdpa supports neither attention sinks nor soft caps, so the model's own eager function attends.
    own = running.implementation == "eager" or bool({"softcap", "s_aux"} & {k for k in kwargs if kwargs[k] is not None})
    if read is not None and not own:
        return read
    if query.shape[2] == 1 and call.window is None and not own:
        keys = running.blocks[0][1]  # a single recomputed token must not see later tokens
        return one_query(query, key[:, :, :keys], value[:, :, :keys], call.scaling)
    if query.device.type == "cpu" and not own:
        way = _by_products if query.dtype == torch.bfloat16 else _grouped
        return way(call, running.blocks, query, key, value)
    outputs = []
    for block, keys in running.blocks:
        q, k, v, mask = query[:, :, block], key[:, :, :keys], value[:, :, :keys], call.mask(block, keys)
        outputs.append(_eager(module, q, k, v, mask, scaling, kwargs) if own else _sdpa(q, k, v, mask, call.scaling))
    return torch.cat(outputs, dim=1)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attend with `sdpa`, with KV heads as the batch, so that keys are broadcast over query heads and not copied."""
    kv_heads, queries = k.shape[1], q.shape[2]
    mask = _additive(mask, q.dtype)
    grouped = q.reshape(kv_heads, -1, queries, q.shape[-1])
    k, v = (t[0, :, None].expand(-1, grouped.shape[1], -1, -1) for t in (k, v))
    out = scaled_dot_product_attention(grouped, k, v, attn_mask=mask[None, None], scale=scaling)
    return out.reshape(1, -1, queries, v.shape[-1]).transpose(1, 2)


def _grouped(
    call: Call, blocks: list[tuple[slice, int]], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Attend with `sdpa`, with all query heads that share a KV head as queries of that head, as in `one_query`."""
    kv_heads, head_dim = key.shape[1], query.shape[-1]
    heads, outputs = query.shape[1] // kv_heads, []
    for block, keys in blocks:
        mask = call.additive(block, keys, heads, query.dtype)
        grouped = query[:, :, block].reshape(1, kv_heads, -1, head_dim)
        out = scaled_dot_product_attention(
            grouped, key[:, :, :keys], value[:, :, :keys], attn_mask=mask, scale=call.scaling
        )
        outputs.append(out.reshape(1, query.shape[1], -1, value.shape[-1]).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _by_products(
    call: Call, blocks: list[tuple[slice, int]], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Attend with two matrix products and a softmax, for one block of queries and one KV head at a time.

    On a CPU in bf16 this takes half to two thirds of the time of PyTorch's masked attention (`benchmarks/cpu.py`), in
    fp32 a little more. All blocks write their scores to the same memory, which stays in the CPU's cache, and only keys
    that some query of the block does not see are masked.
    """
    kv_heads, head_dim = key.shape[1], query.shape[-1]
    grouped = (query * call.scaling).view(kv_heads, -1, *query.shape[2:])
    out = query.new_empty(*grouped.shape[:-1], value.shape[-1])
    heads = grouped.shape[1]
    scratch = query.new_empty(heads * max((block.stop - block.start) * keys for block, keys in blocks))
    for block, keys in blocks:
        first, hidden = call.hidden(block, keys)
        for head in range(kv_heads):
            rows = grouped[head, :, block].reshape(-1, head_dim)
            scores = scratch[: len(rows) * keys].view(len(rows), keys)
            torch.mm(rows, key[0, head, :keys].t(), out=scores)
            scores.view(heads, -1, keys)[..., first:].masked_fill_(hidden, float("-inf"))
            torch.softmax(scores, -1, out=scores)
            out[head, :, block] = (scores @ value[0, head, :keys]).view(heads, -1, value.shape[-1])
    return out.view(1, -1, *out.shape[2:]).transpose(1, 2)


def one_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attend with one query per head, which needs no mask; each key is read once for all heads that share it.

    The query heads of a KV head become that head's queries. On a CPU in bf16, PyTorch's kernel takes seven times longer
    for keys that are repeated once per head. From `_MANY_KEYS` keys on, two matrix products take 0.6 of the kernel's
    time, one KV head at a time: for all heads at once, PyTorch would copy the keys, whose buffers have spare room
    behind each head. Their scores are bf16: over 2,000 tokens, SmolLM2's logits are 1.6% off those in fp32, with the
    kernel 1.4%.

    Args:
        q: `(batch, heads, 1, head_dim)`.
        k: `(batch, kv_heads, keys, head_dim)`; so is `v`.
        v: the values.
        scaling: the factor of the scores.

    Returns:
        `(batch, 1, heads, head_dim)`.
    """
    batch, heads, _, head_dim = q.shape
    grouped = q.view(batch, k.shape[1], -1, head_dim)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and batch == 1 and k.shape[2] >= _MANY_KEYS:
        scores = q.new_empty(*grouped.shape[1:3], k.shape[2])
        out = q.new_empty(*grouped.shape[1:3], v.shape[-1])
        for row, queries, keys in zip(scores, (grouped * scaling)[0], k[0], strict=True):
            torch.mm(queries, keys.t(), out=row)
        for to, weights, values in zip(out, scores.softmax(-1), v[0], strict=True):
            torch.mm(weights, values, out=to)
    else:
        out = scaled_dot_product_attention(grouped, k, v, scale=scaling)
    return out.reshape(batch, 1, heads, v.shape[-1])


_MANY_KEYS = 1024
"""The number of keys from which two matrix products are faster than PyTorch's kernel, for one query."""


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask as a term to add to the scores, with a row stride of a multiple of 16, as fused kernels need.

    From a bool mask, PyTorch would make this term in each call, with a copy for the stride, which takes half of the
    call's time over 32,855 keys on an H100 (2.9 ms instead of 1.6).
    """
    queries, keys = mask.shape
    rows = torch.zeros(queries, keys + -keys % 16, dtype=dtype, device=mask.device)[:, :keys]
    return rows.masked_fill_(~mask, float("-inf"))


def _eager(
    module: torch.nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    additive = _additive(mask, q.dtype)
    given = kwargs if scaling is None else {"scaling": scaling, **kwargs}
    eager = sys.modules[type(module).__module__].eager_attention_forward
    out: torch.Tensor = eager(module, q, k, v, additive[None, None], **given)[0]
    return out


def _attention_over_sdpa(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    here = _running.get(None) is not None
    return (_attention if here else ALL_ATTENTION_FUNCTIONS["sdpa"])(module, *args, **kwargs)


def _mask_over_sdpa(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return None if _running.get(None) is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(_NAME, _attention)
AttentionInterface.register(OVER_SDPA, _attention_over_sdpa)
AttentionMaskInterface.register(OVER_SDPA, _mask_over_sdpa)


# --- re-rotation ------------------------------------------------------------------------------------------------

_INSTEAD = "Use strategy='exact', which encodes each combination of documents in order."


@dataclass(frozen=True, slots=True)
class Rotation:
    """How one layer rotates its keys.

    Attributes:
        module: the rotary module, whose frequencies are read at each use; None if the layer rotates nothing.
        name: the attribute of `module` with the frequencies, `(rotary_dim / 2,)`.
        interleaved: components are paired (0, 1), (2, 3), …, as in GLM and Cohere; else (0, d/2), (1, d/2 + 1), ….
        start: the first rotated component.
        of_values: the second tensor of the cache layer is rotated, not the first. Latent attention (MLA) caches the
            latents as `keys`, and the rotated part of the keys as `values`.
    """

    module: torch.nn.Module | None = None
    name: str = ""
    interleaved: bool = False
    start: int = 0
    of_values: bool = False

    @property
    def frequencies(self) -> torch.Tensor:
        """The current frequencies, fp32 `(rotary_dim / 2,)`. They change with `model.to(bfloat16)`."""
        frequencies: torch.Tensor = getattr(self.module, self.name)
        return frequencies.float()

    def turns_all_of(self, head_dim: int) -> bool:
        """Whether every component of a key is rotated."""
        return self.module is not None and not self.of_values and 2 * len(self.frequencies) == head_dim

    def angles(self, start: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine of the rotation from the positions `start` to the positions `end`, `(seq_len,)` each.

        Both results are fp32 `(seq_len, rotary_dim / 2)`. They come from the difference of the two angles, each rounded
        to fp32 as in the model. `frequency * (end - start)` would be off by 1e-3 at position 100,000.
        """
        f = self.frequencies
        angle = (end[:, None].to(f) * f).double() - (start[:, None].to(f) * f).double()
        return angle.cos().float(), angle.sin().float()

    def turn(self, keys: torch.Tensor, by: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor) -> None:
        """Rotate `keys`, `(…, seq_len, head_dim)`, in fp32, and write them to `out`, which may be `keys`."""
        cos, sin = by
        if out is not keys and 2 * cos.shape[-1] < keys.shape[-1]:
            out.copy_(keys)
        (a, b), (to_a, to_b) = self._pairs(keys, cos), self._pairs(out, cos)
        a, b = a.float(), b.float()
        if out is not keys and out.dtype == torch.float32:
            torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-1)
            torch.mul(b, cos, out=to_b).addcmul_(a, sin)
            return
        turned_a, turned_b = (a * cos).addcmul_(b, sin, value=-1), (b * cos).addcmul_(a, sin)
        to_a.copy_(turned_a)
        to_b.copy_(turned_b)

    def _pairs(self, keys: torch.Tensor, cos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = cos.shape[-1]
        rotary = keys[..., self.start : self.start + 2 * half]
        if self.interleaved:
            return rotary[..., 0::2], rotary[..., 1::2]
        return rotary[..., :half], rotary[..., half:]


UNROTATED = Rotation()

_measured: WeakKeyDictionary[Any, list[Rotation]] = WeakKeyDictionary()


def rotations(model: PreTrainedModel) -> list[Rotation]:
    """Return the rotation of each layer, which is measured once per model.

    Raises:
        UnsupportedModelError: see `check_mergeable`.
    """
    found = _measured.get(model)
    if found is None:
        check_cacheable(model)
        _check_configuration(model)
        found = _measured[model] = _measure(model)
    return found


def check_mergeable(model: PreTrainedModel) -> None:
    """Refuse a model whose caches cannot be moved to other positions and merged.

    The first call runs three forward passes of 12 tokens; later calls return the first result.

    Raises:
        UnsupportedModelError: positions are learned or ALiBi, or RoPE's frequencies change with the length; layers have
            a state that cannot be composed, or attend in chunks; or no known rotation moves the keys.
    """
    rotations(model)
    if kinds_of(model):
        check_affine(model)


def attends_to_its_own(model: PreTrainedModel) -> bool:
    """Whether each layer attends to the same keys and values that it caches.

    False with latent attention, which computes keys from cached latents, and if a layer uses another layer's keys.
    """
    found = rotations(model)
    return len(found) == decoder_of(model).config.num_hidden_layers and not any(each.of_values for each in found)


class PositionShift:
    """Moves tokens from the positions `start` to the positions `end`, in any layer.

    The angles are computed once for all layers with the same frequencies.

    Args:
        rotated: the rotation of each layer.
        start: int64 `(seq_len,)`; so is `end`.
        end: the new positions.
    """

    def __init__(self, rotated: Sequence[Rotation], start: torch.Tensor, end: torch.Tensor) -> None:
        self.start, self.end = start, end
        self._rotations = rotated
        self._angles: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def turn(self, layer_idx: int, kv: LayerKV, *, back: bool = False, to: LayerKV | None = None) -> None:
        """Rotate one layer's keys (or values, see `Rotation.of_values`), `(…, seq_len, head_dim)`, in fp32.

        Args:
            layer_idx: the layer's index.
            kv: keys and values.
            back: rotate from `end` to `start`.
            to: write the result to these tensors. None: rotate in place.
        """
        rotation = self._rotations[layer_idx]
        if to is not None:
            for source, target in zip(kv, to, strict=True):
                if rotation.module is None or source is not kv[rotation.of_values]:
                    target.copy_(source)
        if rotation.module is None:
            return
        rotated, target = kv[rotation.of_values], (to or kv)[rotation.of_values]
        cos, sin = self.angles(rotation, rotated.device)
        rotation.turn(rotated, (cos, -sin if back else sin), target)

    def angles(self, rotation: Rotation, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `Rotation.angles` between these positions, computed once for all layers with the same frequencies."""
        known = (id(rotation.module), rotation.name, device)
        if known not in self._angles:
            cos, sin = rotation.angles(self.start, self.end)
            self._angles[known] = cos.to(device), sin.to(device)
        return self._angles[known]


def turns_of(rotated: Sequence[Rotation]) -> list[Turn] | None:
    """Group layers that rotate keys alike, for `kvcag.cache.layers.moved`. None if a layer rotates values instead."""
    groups: dict[Rotation, list[int]] = {}
    for index, rotation in enumerate(rotated):
        groups.setdefault(rotation, []).append(index)
    if any(rotation.of_values for rotation in groups):
        return None
    return [
        Turn(indices, None if way.module is None else way.frequencies, way.start, way.interleaved)
        for way, indices in groups.items()
    ]


def _check_configuration(model: PreTrainedModel) -> None:
    config = decoder_of(model).config
    kinds, name = " ".join(_rope_kinds(model, config)), type(model).__name__
    if "dynamic" in kinds or "longrope" in kinds:
        raise UnsupportedModelError(
            f"{name} uses {'dynamic-NTK' if 'dynamic' in kinds else 'LongRoPE'} scaling: its frequencies change with "
            f"the length of the context, so a cached key cannot be moved. {_INSTEAD} "
            "Or load the model with another rope_type, such as yarn or llama3."
        )
    if "mrope" in kinds and not kinds_of(model):  # these read text only, and `_measure` finds its rotation
        raise UnsupportedModelError(
            f"{name} uses multimodal RoPE, whose positions depend on the images before them. {_INSTEAD} "
            "Or use a text model of its family."
        )
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedModelError(
            f"{name} attends in chunks, so which tokens see each other depends on their positions. {_INSTEAD}"
        )


def _rope_kinds(model: PreTrainedModel, config: Any) -> Iterator[str]:
    for module in model.modules():
        yield str(getattr(module, "rope_type", ""))
    for described in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        yield str(described or "").lower()


_TOKENS = 12
_OFFSET = 57
"""The distance of the two offsets, large enough to tell apart the slowest frequencies of θ 10,000 and 1,000,000."""


def _measure(model: PreTrainedModel) -> list[Rotation]:
    token = BETWEEN_LAYERS.set(None)  # no pause between layers: the pass is short, and the caller holds a lock
    try:
        return _probe(model)
    finally:
        BETWEEN_LAYERS.reset(token)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> list[Rotation]:
    config = decoder_of(model).config
    ids = (torch.arange(_TOKENS) * 7919 + 11) % config.vocab_size
    here, there = _encode(model, ids, 0), _encode(model, ids, _OFFSET)
    kinds = kinds_of(model)
    if not (here or kinds) or any(t.ndim != 4 or t.shape[-2] != _TOKENS for kv in here for t in kv):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not cache one key and one value per token in each layer. {_INSTEAD}"
        )
    # In half precision, cosines and sines have errors of 1e-2; a wrong rotation has an error of about 1.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    found = [_rotation(model, old, new, tolerance) for old, new in zip(here, there, strict=True)]
    if kinds:  # with recurrent layers, single tokens are not recomputed, and keys without RoPE are allowed
        return found
    if all(rotation is UNROTATED for rotation in found):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not rotate its keys: its positions are ALiBi biases, or absent, so a token "
            f"cannot be recomputed at a given position. {_INSTEAD}"
        )
    _check_scatter(model, ids, here, tolerance)
    return found


def _encode(model: PreTrainedModel, ids: torch.Tensor, offset: int) -> list[LayerKV]:
    cache = generation_cache([], len(ids), kinds_of(model))
    run(decoder_of(model), ids, cache, torch.arange(offset, offset + len(ids)))
    return layers_of(cache)


def _rotation(model: PreTrainedModel, old: LayerKV, new: LayerKV, tolerance: float) -> Rotation:
    moves = [_error(before, after) > tolerance for before, after in zip(old, new, strict=True)]
    if all(moves):
        raise UnsupportedModelError(
            f"{type(model).__name__}'s cached values change with their position: they are not plain values, or its "
            f"positions are learned. {_INSTEAD}"
        )
    which = moves[1]
    keys, there = old[which], new[which]
    at = torch.arange(_TOKENS, device=keys.device)
    best, least = UNROTATED, _error(keys, there)
    for rotation in _candidates(model, keys.shape[-1]):
        cos, sin = rotation.angles(at, at + _OFFSET)
        turned = torch.empty_like(keys)
        rotation.turn(keys, (cos.to(keys.device), sin.to(keys.device)), turned)
        if (error := _error(turned, there)) < least:
            best, least = replace(rotation, of_values=which), error
    if least > tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__}'s keys cannot be moved to another position: re-rotated keys differ from keys "
            f"encoded there by {least:.0%}. Its positions are learned, or its rotation is unknown to kvcag. {_INSTEAD}"
        )
    return best


def _candidates(model: PreTrainedModel, head_dim: int) -> Iterator[Rotation]:
    seen: list[torch.Tensor] = []
    for module in model.modules():
        for name, table in vars(module).get("_buffers", {}).items():
            if not name.endswith("inv_freq") or "original" in name or table is None:
                continue
            if 2 * len(table) > head_dim or any(torch.equal(table.cpu(), other) for other in seen):
                continue
            seen.append(table.cpu())
            for start in sorted({0, head_dim - 2 * len(table)}):  # the first components, or the last
                yield Rotation(module, name, start=start)
                yield Rotation(module, name, interleaved=True, start=start)


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the relative error of the median token.

    In half precision, an MoE router may send a few tokens to other experts, which would spoil the mean.
    """
    difference, size = ((t.float().square().sum(dim=(0, 1, 3))) for t in (a - b, b))
    return float((difference / size).sqrt().median())


def _hides_a_window(config: Any) -> bool:
    """Whether the configuration gives every layer a sliding window, which each layer's attention must then use."""
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(slides) and not getattr(config, "layer_types", None)


def _check_scatter(model: PreTrainedModel, ids: torch.Tensor, right: list[LayerKV], tolerance: float) -> None:
    """Recompute every second token over a cache without it, to refuse models whose attention has unknown arguments."""
    config = decoder_of(model).config
    types = getattr(config, "layer_types", None)
    odd = torch.arange(1, _TOKENS, 2)
    layers, windows = contiguous_copy(right), {}

    def note(layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> None:
        windows[layer_idx] = call.window

    for kv in layers:
        for t in kv:
            t[..., odd, :] = 0
    attend(model, ids[odd], odd, scatter_cache(layers, odd), note)
    errors = [
        _error(a[..., odd, :], b[..., odd, :])
        for x, y in zip(layers, right, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    if not windows.keys() >= set(range(len(layers))) or max(errors) > tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not use transformers' AttentionInterface in every layer, so single tokens "
            f"cannot be recomputed. {_INSTEAD}"
        )
    if _hides_a_window(config) and not any(windows.values()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a sliding window in its configuration, but does not pass one to its "
            f"attention, so it is unclear which tokens a token sees. {_INSTEAD}"
        )
    for index, window in windows.items():
        if types and (types[index] == "sliding_attention") != (window is not None):
            raise UnsupportedModelError(
                f"{type(model).__name__} has {types[index]} in layer {index} by its configuration, but attends with a "
                f"window of {window}, so it is unclear which tokens a token sees. {_INSTEAD}"
            )
