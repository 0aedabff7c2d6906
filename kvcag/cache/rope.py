"""Re-rotation: moving cached keys to other positions.

RoPE turns each pair of a key's components by `position * frequency`, so a key moves from one position to another by
turning it by the difference. How a model does it (which components, paired how, with which frequencies, in which
layers) is not read from its configuration but measured once on the model itself: the same tokens are encoded at two
offsets, and what moves the one's keys onto the other's is how this layer rotates. A model for which nothing does is
refused, so an architecture without a test is right or refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from kvcag.cache.attention import Call, attend, decoder_of
from kvcag.cache.layers import (
    BETWEEN_LAYERS,
    LayerKV,
    cache_argument,
    check_cacheable,
    contiguous_copy,
    device_of,
    generation_cache,
    kernels_for,
    kinds_of,
    layers_of,
    scatter_cache,
)
from kvcag.cache.states import check_affine
from kvcag.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    The angles are computed once for all layers that share their frequencies.
    """

    def __init__(self, model: PreTrainedModel, start: torch.Tensor, end: torch.Tensor) -> None:
        self.start, self.end = start, end
        self._rotations = rotations(model)
        self._angles: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def turn(self, layer_idx: int, kv: LayerKV, *, back: bool = False) -> None:
        """Turn keys, and values `(…, seq_len, head_dim)` where they are rotated, in fp32 and in place.

        `back`: from `end` to `start`.
        """
        rotation = self._rotations[layer_idx]
        if rotation.module is None:
            return
        rotated = kv[rotation.of_values]
        cos, sin = self.angles(rotation, rotated.device)
        rotation.turn(rotated, (cos, -sin if back else sin), rotated)

    def angles(self, rotation: Rotation, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`Rotation.angles` between these positions, made once for all layers that share their frequencies."""
        known = (id(rotation.module), rotation.name, device)
        if known not in self._angles:
            cos, sin = rotation.angles(self.start, self.end)
            self._angles[known] = cos.to(device), sin.to(device)
        return self._angles[known]

    def turn_all(self, layers: Sequence[LayerKV]) -> None:
        """`turn` all layers; on an NVIDIA GPU with a kernel for those that share their frequencies."""
        groups: dict[Rotation, list[int]] = {}
        for index, rotation in enumerate(self._rotations[: len(layers)]):
            groups.setdefault(rotation, []).append(index)
        for rotation, indices in groups.items():
            rotated = [layers[index][rotation.of_values] for index in indices]
            if rotation.module is None:
                continue
            kernels = kernels_for(rotated)
            if kernels is not None:
                cos, sin = self.angles(rotation, rotated[0].device)
                kernels.turn(rotated, cos, sin, start=rotation.start, interleaved=rotation.interleaved)
            else:
                for index in indices:
                    self.turn(index, layers[index])


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
