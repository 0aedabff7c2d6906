"""Where tokens stand: forward passes over a cache by position, and keys that move to other positions.

**By position.** transformers' masks are made from indices, so scattered tokens cannot be recomputed with them. Where
several tokens go on over a cache, `sdpa` takes a 4-D mask: it then copies keys and values once for each query head that
shares them, and multiplies what the mask hides. So such passes run under an attention function of ours, registered with
transformers (`AttentionInterface`): each token attends by its true position, wherever it stands in the batch. The
function masks block of queries by block, over the keys up to the block's last position, and neither the mask nor the
weights of a whole context are ever held.

**Re-rotation.** RoPE turns each pair of a key's components by `position * frequency`, so a key moves from one position
to another by turning it by the difference. How a model does it (which components, paired how, with which frequencies,
in which layers) is not read from its configuration but measured once on the model itself: the same tokens are encoded
at two offsets, and what moves the one's keys onto the other's is how this layer rotates. A model for which nothing does
is refused, so an architecture without a test is right or refused.
"""

from __future__ import annotations

import inspect
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
    Layers,
    RowsCache,
    cache_argument,
    check_cacheable,
    contiguous_copy,
    decoder_of,
    device_of,
    generation_cache,
    kernels_for,
    kinds_of,
    layers_of,
    scatter_cache,
    shifted,
)
from kvcag.cache.states import check_affine
from kvcag.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME, OVER_SDPA = "kvcag", "kvcag_sdpa"
"""Ours, by the model's own implementation. Where that is `sdpa`, a pass of others at the same time is
given `sdpa`. In other models such a pass fails."""

_BLOCK = {"cpu": 64, "cuda": 1024}
"""Queries that attend at a time, to the keys up to the last one's position. Their mask is one byte a key and query: 0.5
and 8 MiB over 8,192 keys. Small blocks save work above the diagonal, large ones save kernel launches."""

_RUN = {"cpu": 256, "cuda": 1024}
"""The same of queries that stand one behind another, where a large block has little above its diagonal."""


@dataclass(frozen=True, slots=True)
class Call:
    """How one layer attends.

    Attributes:
        positions: 1-D int64, where the queries stand, ascending; key `i` stands at position `i`.
        scaling: what scores are multiplied with.
        window: how many tokens, itself included, a query sees; None for all.
        softcap: bound of the scores, as in Gemma 2; None for none.
        masks: those of the pass.
    """

    positions: torch.Tensor
    scaling: float
    window: int | None
    softcap: float | None
    masks: Masks

    def mask(self, queries: slice, keys: int) -> torch.Tensor:
        """Which of the first `keys` keys each query of the slice sees. `(queries, keys)`, bool."""
        at = self.positions[queries, None]
        key = torch.arange(keys, device=at.device)
        seen = key <= at
        return seen if self.window is None else seen & (key > at - self.window)

    def hidden(self, queries: slice, keys: int) -> tuple[int, torch.Tensor]:
        """The first key that some query of the slice does not see, and which of those from it on each does not see.

        `(queries, keys - first)`, bool.
        """

        def make() -> torch.Tensor:
            return ~self.mask(queries, keys)[:, first:]

        first = 0 if self.window is not None else self.masks.at[queries.start] + 1
        return first, self.masks.get((queries.start, queries.stop, keys, self.window, self.positions.device), make)

    def additive(self, queries: slice, keys: int, times: int, dtype: torch.dtype) -> torch.Tensor:
        """The mask as a term that is added to the scores, repeated so many times: `(1, 1, times * queries, keys)`."""

        def make() -> torch.Tensor:
            return _additive(self.mask(queries, keys), dtype).repeat(times, 1)[None, None]

        return self.masks.get((queries.start, queries.stop, keys, self.window, times, dtype), make)


class Masks:
    """The masks of a pass, which are the same for all its layers. Large ones are made anew for each layer.

    Attributes:
        at: the positions of the queries.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self.at: list[int] = positions.tolist()
        self._made: dict[tuple[object, ...], torch.Tensor] = {}
        self._bytes = 0

    def get(self, key: tuple[object, ...], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The mask of this key; `make` makes it."""
        mask = self._made.get(key)
        if mask is None:
            mask = make()
            if self._bytes + mask.nbytes <= _MASKS:
                self._made[key] = mask
                self._bytes += mask.nbytes
        return mask


_MASKS = 64 << 20
"""Bytes of masks that a pass holds: enough for 700 tokens that are recomputed among 8,000."""


Reader: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, Call], "torch.Tensor | None"]
"""Called as `reader(layer_idx, query, key, value, call)` before a layer attends: `query` is `(1, heads, queries,
head_dim)`; `key` and `value` hold all keys that the layer sees. A reader that made the attention's output on its way,
`(1, queries, heads, head_dim)`, returns it, and it is not made again. It may raise `EnoughError`."""


class EnoughError(Exception):
    """Raised by a reader that has what it needs: the rest of the pass is not run."""


@dataclass(frozen=True, slots=True)
class _Pass:
    positions: torch.Tensor
    blocks: list[tuple[slice, int]]
    """Which queries attend together, and to how many keys: read once a pass, not once a layer from the device."""
    reader: Reader | None
    implementation: str
    masks: Masks


@dataclass(frozen=True, slots=True)
class _Rows:
    """A pass of one token for each of several generations: how each attends to its own cache."""

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
    """Run `token_ids` at `positions` (1-D int64 each, positions ascending) through every layer, over `cache`.

    The keys that the cache hands out must stand at positions 0, 1, 2, …. The model's attention implementation is
    ours for the time of the pass only, and is put back when it raises, too. `EnoughError` ends the pass quietly.
    """
    with suppress(EnoughError), by_position(model, positions, reader):
        decoder = decoder_of(model)
        decoder(
            input_ids=token_ids[None].to(device_of(model)),
            position_ids=positions[None].to(device_of(model)),
            use_cache=True,
            **cache_argument(decoder, cache),
        )


@torch.no_grad()
def predict(model: PreTrainedModel, token_ids: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
    """`attend`, and the logits after the last token, `(1, vocabulary)`."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    device = device_of(model)
    with by_position(model, positions):
        logits: torch.Tensor = model(
            input_ids=token_ids[None].to(device),
            position_ids=positions[None].to(device),
            use_cache=True,
            **last,
            **cache_argument(model, cache),
        ).logits
    return logits[:, -1]


@contextmanager
def by_position(model: PreTrainedModel, positions: torch.Tensor, reader: Reader | None = None) -> Iterator[None]:
    """Within it, a forward pass of `model` over a cache attends by position.

    Its tokens stand at `positions` (1-D int64, ascending), and the keys that the cache hands out, theirs included, at
    0, 1, 2, …. For a model that `check_mergeable` does not refuse: it attends through transformers'
    interface alone.
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
    """Within it, a forward pass of one token for each of `caches`, over the cache that this gives, goes on in each.

    For a model that `by_position` is for. The tokens stand where the caches end.
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
    """Within it, the decoder uses our attention function. Several passes may be inside at a time.

    Yields the name of the decoder's own implementation, which the end of the last pass restores.
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
"""For each decoder that uses our attention function now: its own implementation, and the number of passes."""
_swapping = threading.Lock()


def put_back_attention() -> None:
    """Give every decoder its own attention back, in a forked process: the passes under way are not in it."""
    global _swapping
    _swapping = threading.Lock()
    for decoder, (own, _) in list(_swapped.items()):
        decoder.config._attn_implementation = own  # type: ignore[union-attr]
    _swapped.clear()


def _seen(positions: torch.Tensor, device: torch.device) -> list[tuple[slice, int]]:
    """The blocks of queries at `positions` that attend together, each with the number of keys that it attends to."""
    at = positions.tolist()
    has_gaps = bool(at) and at[-1] - at[0] + 1 > len(at)
    if has_gaps and device.type == "cpu":
        blocks = _near(at)
    else:
        blocks = _blocks(len(at), (_BLOCK if has_gaps else _RUN).get(device.type, 512))
    return [(block, at[block.stop - 1] + 1) for block in blocks]


def _near(at: list[int]) -> list[slice]:
    """Blocks of queries that stand near each other, so that little is above the diagonal: for a CPU.

    With 16 queries a block takes nearly as little time for each as with more.
    """
    blocks, start = [], 0
    for index, position in enumerate(at):
        if index - start == _BLOCK["cpu"] or (index - start >= 16 and position - at[start] > 256):
            blocks.append(slice(start, index))
            start = index
    return [*blocks, slice(start, len(at))]


def _blocks(queries: int, size: int) -> list[slice]:
    """Blocks of queries that attend together. Avoids blocks of 32k + 1 queries, except a single query.

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
    """The function that transformers calls. Returns `(batch, queries, heads, head_dim)`. `attention_mask` is None."""
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
    if (queries := query.shape[2]) < len(running.positions):  # Gemma 4: layers that share keys see the last token alone
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
    # Only a model's own eager function knows its attention sinks and soft caps, which sdpa cannot do.
    own = running.implementation == "eager" or bool({"softcap", "s_aux"} & {k for k in kwargs if kwargs[k] is not None})
    if read is not None and not own:
        return read
    if query.shape[2] == 1 and call.window is None and not own:
        keys = running.blocks[0][1]  # a token that is recomputed alone sees none of those behind it
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
    """KV heads are the batch, so that the keys are broadcast over the query heads that share them, not copied."""
    kv_heads, queries = k.shape[1], q.shape[2]
    mask = _additive(mask, q.dtype)
    grouped = q.reshape(kv_heads, -1, queries, q.shape[-1])
    k, v = (t[0, :, None].expand(-1, grouped.shape[1], -1, -1) for t in (k, v))
    out = scaled_dot_product_attention(grouped, k, v, attn_mask=mask[None, None], scale=scaling)
    return out.reshape(1, -1, queries, v.shape[-1]).transpose(1, 2)


def _grouped(
    call: Call, blocks: list[tuple[slice, int]], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """The heads that share a KV head are that head's queries, as in `one_query`."""
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
    """Attention as two products and a softmax, a block of queries and a KV head at a time.

    On a CPU in bf16 this takes half to two thirds of the time of PyTorch's masked attention (`benchmarks/cpu.py`), in
    fp32 a little more. The scores of a block are written to the same memory each time, which stays in the processor's
    cache, and only keys that some of its queries do not see are masked.
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
    """The heads that share a KV head are that head's queries: each key is read once, and needs no mask.

    On a CPU in bf16, PyTorch's kernel takes seven times longer for the same keys repeated once a head; two products
    take six tenths of its time over 2,000 keys or 8,000. Their scores are bf16: over 2,000 tokens SmolLM2's logits are
    1.6% off those in fp32, with the kernel 1.4%.
    """
    batch, heads, _, head_dim = q.shape
    grouped = q.view(batch, k.shape[1], -1, head_dim)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and batch == 1 and k.shape[2] >= _MANY_KEYS:
        scores = torch.bmm(k[0], (grouped[0] * scaling).transpose(1, 2)).transpose(1, 2)
        out = torch.bmm(scores.contiguous().softmax(-1), v[0])
    else:
        out = scaled_dot_product_attention(grouped, k, v, scale=scaling)
    return out.reshape(batch, 1, heads, v.shape[-1])


_MANY_KEYS = 1024
"""From so many keys on, two products of one query are quicker than PyTorch's kernel."""


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask as a term that is added to the scores, with rows at multiples of 16, as CUDA's fused kernels need.

    Given a bool mask, PyTorch makes this itself in each call, copied once more for the rows: half the call's time over
    32,855 keys on an H100 (2.9 ms against 1.6).
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

_INSTEAD = "Merge nothing with it: encode each combination of documents in its order (an exact prefix)."


@dataclass(frozen=True, slots=True)
class Rotation:
    """How one layer rotates its keys.

    Attributes:
        module: the rotary module, whose live frequencies are read at each use; None where the layer rotates nothing.
        name: the attribute of `module` with the frequencies, `(rotary_dim / 2,)`.
        interleaved: components are paired (0, 1), (2, 3), …, as in GLM and Cohere; else (0, d/2), (1, d/2 + 1), ….
        start: the first component that is rotated; those before it are not.
        of_values: what is cached in the place of values is rotated, and nothing else. So it is in latent attention
            (MLA): the latents have the place of keys, and the keys' rotated part that of values.
    """

    module: torch.nn.Module | None = None
    name: str = ""
    interleaved: bool = False
    start: int = 0
    of_values: bool = False

    @property
    def frequencies(self) -> torch.Tensor:
        """`(rotary_dim / 2,)`, fp32, as they are now: `model.to(bfloat16)` changes them."""
        frequencies: torch.Tensor = getattr(self.module, self.name)
        return frequencies.float()

    def turns_all_of(self, head_dim: int) -> bool:
        """Whether every component of a key is turned."""
        return self.module is not None and not self.of_values and 2 * len(self.frequencies) == head_dim

    def angles(self, start: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What turns keys at the positions `start` (1-D) to the positions `end`: cosine and sine, fp32.

        `(seq_len, rotary_dim / 2)` each.

        The difference is taken between the angles, each rounded to fp32 as the model rounds it: at position 100,000
        rounding the difference of the positions instead would be off by 1e-3.
        """
        f = self.frequencies
        angle = (end[:, None].to(f) * f).double() - (start[:, None].to(f) * f).double()
        return angle.cos().float(), angle.sin().float()

    def turn(self, keys: torch.Tensor, by: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor) -> None:
        """Write `keys`, `(…, seq_len, head_dim)`, turned in fp32, to `out`, which may be `keys`."""
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
    """How each layer rotates, measured once per model.

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
    """Refuse a model whose caches cannot be moved to other positions and put beside each other.

    The first call runs three forward passes of a dozen tokens, later ones nothing.

    Raises:
        UnsupportedModelError: positions are learned, ALiBi, or of a RoPE whose frequencies change with the length;
            layers keep a state or attend in chunks; or nothing that we know moves its keys.
    """
    rotations(model)
    if kinds_of(model):
        check_affine(model)


def attends_to_its_own(model: PreTrainedModel) -> bool:
    """Whether each layer attends to the very keys and values that it caches.

    Not so with latent attention, which makes keys of what is cached, nor in layers that take another layer's keys.
    """
    found = rotations(model)
    return len(found) == decoder_of(model).config.num_hidden_layers and not any(each.of_values for each in found)


class PositionShift:
    """Tokens on their way from the positions `start` to the positions `end` (1-D int64), in any layer.

    `rotated` says how each layer rotates. The angles are computed once for all layers that share their frequencies.
    """

    def __init__(self, rotated: Sequence[Rotation], start: torch.Tensor, end: torch.Tensor) -> None:
        self.start, self.end = start, end
        self._rotations = rotated
        self._angles: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def turn(self, layer_idx: int, kv: LayerKV, *, back: bool = False, to: LayerKV | None = None) -> None:
        """Turn keys, and values `(…, seq_len, head_dim)` where they are rotated, in fp32; in place, or write to `to`.

        `back`: from `end` to `start`.
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
        """`Rotation.angles` between these positions, made once for all layers that share their frequencies."""
        known = (id(rotation.module), rotation.name, device)
        if known not in self._angles:
            cos, sin = rotation.angles(self.start, self.end)
            self._angles[known] = cos.to(device), sin.to(device)
        return self._angles[known]

    def turn_all(self, layers: Layers, first: int = 0) -> None:
        """`turn` all layers' tokens from `first` on; on an NVIDIA GPU with a kernel for those that turn alike."""
        groups: dict[Rotation, list[int]] = {}
        for index, rotation in enumerate(self._rotations[: len(layers)]):
            groups.setdefault(rotation, []).append(index)
        for rotation, indices in groups.items():
            if rotation.module is None:
                continue
            rows = layers.rows
            if rows is not None:
                rows = shifted(rows, first, layers)[[2 * index + rotation.of_values for index in indices]]
            kernels = kernels_for(rows)
            if kernels is not None:
                like = layers[0][0]
                cos, sin = self.angles(rotation, like.device)
                kernels.turn(rows, like, cos, sin, start=rotation.start, interleaved=rotation.interleaved)
            else:
                for index in indices:
                    keys, values = layers[index]
                    self.turn(index, (keys[..., first:, :], values[..., first:, :]))


def _check_configuration(model: PreTrainedModel) -> None:
    config = decoder_of(model).config
    kinds, name = " ".join(_rope_kinds(model, config)), type(model).__name__
    if "dynamic" in kinds or "longrope" in kinds:
        raise UnsupportedModelError(
            f"{name} uses {'dynamic-NTK' if 'dynamic' in kinds else 'LongRoPE'} scaling: its frequencies change with "
            f"the length of the context, so a cached key cannot be moved. {_INSTEAD} "
            "Or load it with another rope_type (yarn and llama3 are fine)."
        )
    if "mrope" in kinds and not kinds_of(model):  # where text alone is read, `_measure` sees what it comes to
        raise UnsupportedModelError(
            f"{name} uses multimodal RoPE, whose positions depend on the images before them. {_INSTEAD} "
            "Or use a text model of its family."
        )
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedModelError(
            f"{name} attends in chunks: which tokens see each other depends on where a chunk starts. {_INSTEAD}"
        )


def _rope_kinds(model: PreTrainedModel, config: Any) -> Iterator[str]:
    for module in model.modules():
        yield str(getattr(module, "rope_type", ""))
    for described in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        yield str(described or "").lower()


_TOKENS = 12
_OFFSET = 57
"""Far enough that the slowest frequencies of two layer types (θ 10,000 and 1,000,000) still tell."""


def _measure(model: PreTrainedModel) -> list[Rotation]:
    token = BETWEEN_LAYERS.set(None)  # a few tokens, once per model: the caller holds a lock on the result
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
            f"{type(model).__name__} does not keep one key and one value per token in each layer. {_INSTEAD}"
        )
    # Half precision rounds cosines and sines by 1e-2; a wrong rotation is off by about 1.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    found = [_rotation(model, old, new, tolerance) for old, new in zip(here, there, strict=True)]
    if kinds:  # single tokens are not recomputed, and the recurrent layers know the order without positions
        return found
    if all(rotation is UNROTATED for rotation in found):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not rotate its keys: its positions are ALiBi biases, or none, and a token "
            f"cannot be recomputed at a position of its own. {_INSTEAD}"
        )
    _check_scatter(model, ids, here, tolerance)
    return found


def _encode(model: PreTrainedModel, ids: torch.Tensor, offset: int) -> list[LayerKV]:
    cache = generation_cache([], len(ids), kinds_of(model))
    positions = torch.arange(offset, offset + len(ids))
    decoder = decoder_of(model)
    decoder(
        input_ids=ids[None].to(device_of(model)),
        position_ids=positions[None].to(device_of(model)),
        use_cache=True,
        **cache_argument(decoder, cache),
    )
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
            f"encoded there by {least:.0%}. Its positions are learned, or rotate in a way we do not know. {_INSTEAD}"
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
    """Relative error of the median token: in half precision, a router's near tie may send one token elsewhere."""
    difference, size = ((t.float().square().sum(dim=(0, 1, 3))) for t in (a - b, b))
    return float((difference / size).sqrt().median())


def _hides_a_window(config: Any) -> bool:
    """Whether all layers have a window by the configuration, so that each of them must attend with it."""
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(slides) and not getattr(config, "layer_types", None)


def _check_scatter(model: PreTrainedModel, ids: torch.Tensor, right: list[LayerKV], tolerance: float) -> None:
    """Recompute every other token over a cache where it is missing: unknown attention arguments would show here."""
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
            f"{type(model).__name__} does not attend through transformers' AttentionInterface alone, so single tokens "
            f"cannot be recomputed. {_INSTEAD}"
        )
    if _hides_a_window(config) and not any(windows.values()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a sliding window that it does not tell its attention: which tokens it sees is "
            f"unclear. {_INSTEAD}"
        )
    for index, window in windows.items():
        if types and (types[index] == "sliding_attention") != (window is not None):
            raise UnsupportedModelError(
                f"{type(model).__name__} calls layer {index} {types[index]} and attends with a window of {window}: "
                f"which tokens it sees is unclear. {_INSTEAD}"
            )
