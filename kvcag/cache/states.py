"""Recurrent layers: a document is an affine map of the state before it, `S_after = M · S_before + U`.

`M` and `U` depend only on the layer's inputs, so documents can be composed in any order (`docs/merging.md`). `M` is
measured, not read from a kernel: the layer runs again over the same inputs, from a state to which the identity was
added, and the change of its last state is `M`. The form of `M` is measured too, once per model: a matrix per head
(gated delta nets), or a number per head (Mamba-2). A model that fits neither form is not merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache

from kvcag.cache.layers import (
    BETWEEN_LAYERS,
    States,
    decoder_of,
    generation_cache,
    kinds_of,
    lone_cache,
    row_of,
    run,
)
from kvcag.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Form: TypeAlias = Literal["number", "matrix", "ignored", "unknown"]
"""The form of `M`. `ignored`: a pass of several tokens starts from a zero state (Mamba, Jamba)."""

Row: TypeAlias = tuple[torch.Tensor | None, ...]
Maps: TypeAlias = tuple[torch.Tensor | None, ...]
"""`M` of each recurrent layer, fp32 `(1, heads, 1, 1)` or `(1, heads, key_dim, key_dim)`; None without recurrent
state."""

_measured: WeakKeyDictionary[Any, dict[int, Form]] = WeakKeyDictionary()


def ignores_states(model: PreTrainedModel) -> bool:
    """Whether a pass of several tokens ignores the states before it, so that only single tokens can continue."""
    return bool(kinds_of(model)) and "ignored" in _forms(model).values()


def check_affine(model: PreTrainedModel) -> None:
    """Refuse a model with recurrent layers whose documents are not maps of a known form.

    Raises:
        UnsupportedModelError: the form of a layer's map is `ignored` or `unknown`.
    """
    forms = set(_forms(model).values())
    if forms & {"ignored", "unknown"}:
        why = (
            "ignore the state before a pass of several tokens, in this version of transformers"
            if "ignored" in forms
            else "change their states in a way that kvcag does not support"
        )
        raise UnsupportedModelError(
            f"{type(model).__name__} has recurrent layers that {why}, so its documents cannot be merged. "
            "Use strategy='exact', which reuses the longest cached prefix."
        )


@contextmanager
def recording(model: PreTrainedModel, cache: Cache) -> Iterator[Callable[[int], Maps]]:
    """Within the block, forward passes over `cache` measure `M` for all tokens that they read.

    Yields a function that takes the number of these tokens and returns the maps of the recurrent layers.

    Raises:
        UnsupportedModelError: see `check_affine`.
    """
    check_affine(model)
    forms = _forms(model)
    maps: dict[int, torch.Tensor] = {}
    read = dict.fromkeys(forms, 0)

    def note(call: _LayerCall) -> None:
        index = call.layer_idx
        new = call.map(forms[index])
        maps[index] = _through(new, maps[index]) if index in maps else new
        read[index] += call.tokens

    def found(tokens: int) -> Maps:
        if any(seen != tokens for seen in read.values()):
            return ()  # some passes did not run the model's own modules; the document gets no maps
        return tuple(maps.get(index) for index, (_, states) in enumerate(kinds_of(model)) if states)

    with _watching(model, cache, set(forms), note):
        yield found


def behind(document: States, before: States | None, alone: States | None, tokens: int) -> States:
    """Return the states after a document at a new place, from those after the document when it was encoded.

    `M · S_before + U` is `S_document + M · (S_before - S_alone)`, so `U` need not be stored. The last inputs of a
    convolution include inputs before the document if the document is shorter than the convolution's kernel.

    Args:
        document: the states after the document when it was encoded, with its maps.
        before: the states before the new place; None for none.
        alone: the states before the document when it was encoded; None for none.
        tokens: the document's length.
    """
    rows = []
    for index, row in enumerate(document.tensors):
        half = len(row) // 2
        was, now = ([None] * len(row) if states is None else states.tensors[index] for states in (alone, before))
        made: list[torch.Tensor | None] = []
        for place, (state, old, new) in enumerate(zip(row, was, now, strict=True)):
            if state is None:
                made.append(None)
                continue
            old, new = (torch.zeros_like(state) if t is None else t.to(state.device) for t in (old, new))
            if place < half:
                made.append(torch.cat([new[..., tokens:], state[..., -min(tokens, state.shape[-1]) :]], dim=-1))
            else:
                through = document.maps[index]
                assert through is not None
                made.append((state.float() + _through(through, (new - old).float())).to(state.dtype))
        rows.append(tuple(made))
    return States(document.kinds, tuple(rows))


def _through(matrix: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Apply `M`: a number per head, or a matrix."""
    return matrix * state if matrix.shape[-1] == 1 else matrix @ state


class _LayerCall:
    """A recurrent layer's forward call over some tokens, which can be repeated from another state."""

    def __init__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Cache, before: Row, after: Row
    ) -> None:
        self.module, self.args, self.kwargs, self.cache = module, args, kwargs, cache
        self.layer_idx = int(module.layer_idx)
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        self.tokens = hidden.shape[1]
        half = len(after) // 2
        last, end = after[0], after[half]
        assert last is not None
        assert end is not None
        self.end = end.float().clone()
        conv, start = before[0], before[half]
        self.conv = torch.zeros_like(last) if conv is None else conv
        self.start = torch.zeros_like(end) if start is None else start
        self.size = float(torch.maximum(self.start.abs().max(), end.abs().max()).float()) or 1.0
        """The size of the states. Tensors of this size are added to them, so that little is lost to rounding."""

    def response(self, added: torch.Tensor) -> torch.Tensor:
        """Return the change of the last state, in fp32, when `added` is added to the first state."""
        cache = lone_cache(self.layer_idx, self.conv.clone(), self.start + added)
        args = tuple(cache if each is self.cache else each for each in self.args)
        kwargs = {name: cache if each is self.cache else each for name, each in self.kwargs.items()}
        self.module.forward(*args, **kwargs)
        end = row_of(cache, self.layer_idx)[1]
        assert end is not None
        return end.float() - self.end

    def map(self, form: Form) -> torch.Tensor:
        """Measure `M`, assuming this form."""
        if form == "number":
            return (self.response(torch.full_like(self.start, self.size)) / self.size).mean((-1, -2), keepdim=True)
        keys, values = self.start.shape[-2:]
        columns = []
        for at in range(0, keys, values):  # a state has room for `values` columns of the identity
            eye = torch.zeros_like(self.start)
            width = min(values, keys - at)
            eye[..., at : at + width, :width].diagonal(dim1=-2, dim2=-1).fill_(self.size)
            columns.append(self.response(eye)[..., :width] / self.size)
        return torch.cat(columns, dim=-1)

    def form(self) -> Form:
        """Return the form of `M` that predicts the response to a random state."""
        noise = torch.randn(self.start.shape, generator=torch.Generator().manual_seed(0)) * self.size
        added = noise.to(self.start)
        response = self.response(added)
        if not response.any():
            return "ignored"
        if self.start.ndim == 4:
            rounding = _ROUNDING * added.norm()  # the whole response of a layer that forgets at once
            for form, allowed in _FORMS.items():
                error = _through(self.map(form), added.float()) - response
                if error.norm() < _TOLERANCE * response.norm() + allowed * rounding:
                    return form
        return "unknown"


_FORMS: dict[Form, int] = {"number": 0, "matrix": 1}
"""The forms in the order in which they are tried, and whether rounding errors are allowed. A number per head is also a
matrix, so a response that is all rounding counts as a matrix."""
_TOLERANCE, _ROUNDING = 0.01, 1e-5
_TOKENS = 2


def _forms(model: PreTrainedModel) -> dict[int, Form]:
    """Return the form of `M` of each layer with a recurrent state, measured once per model in two short passes."""
    found = _measured.get(model)
    if found is None:
        token = BETWEEN_LAYERS.set(None)
        try:
            found = _measured[model] = _measure(model)
        finally:
            BETWEEN_LAYERS.reset(token)
    return found


@torch.no_grad()
def _measure(model: PreTrainedModel) -> dict[int, Form]:
    decoder = decoder_of(model)
    kinds = kinds_of(model)
    cache = generation_cache([], 2 * _TOKENS, kinds)
    ids = (torch.arange(2 * _TOKENS) * 7919 + 11) % decoder.config.vocab_size
    found: dict[int, Form] = {}

    def note(call: _LayerCall) -> None:
        found[call.layer_idx] = call.form()

    run(decoder, ids[:_TOKENS], cache)
    keeps = {index for index, (_, states) in enumerate(kinds) if states and _recurs(row_of(cache, index))}
    simple = {index for index in keeps if len(row_of(cache, index)) == 2}
    with _watching(model, cache, simple, note):
        run(decoder, ids[_TOKENS:], cache)
    return {index: found.get(index, "unknown") for index in keeps}


def _recurs(row: Row) -> bool:
    return any(state is not None for state in row[len(row) // 2 :])


@contextmanager
def _watching(
    model: PreTrainedModel, cache: Cache, indices: set[int], note: Callable[[_LayerCall], None]
) -> Iterator[None]:
    """Within the block, `note` is called after each of these layers' passes over `cache`, but not over other caches."""
    before: dict[int, Row] = {}

    def is_ours(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(each is cache for each in (*args, *kwargs.values()))

    # While another thread removes its hooks, torch may call these hooks without the keyword arguments.
    def enter(module: Any, args: tuple[Any, ...], *rest: dict[str, Any]) -> None:
        if rest and is_ours(args, rest[0]):
            row = row_of(cache, module.layer_idx)
            before[module.layer_idx] = tuple(t if t is None else t.clone() for t in row)

    def leave(module: Any, args: tuple[Any, ...], *rest: Any) -> None:
        if len(rest) == 2 and is_ours(args, rest[0]):
            row = row_of(cache, module.layer_idx)
            note(_LayerCall(module, args, rest[0], cache, before.pop(module.layer_idx), row))

    handles = []
    try:
        for module in decoder_of(model).modules():
            if getattr(module, "layer_idx", None) in indices and _convolves(module):
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _convolves(module: torch.nn.Module) -> bool:
    """Whether a module is the part of a layer with recurrent states, which is the part with a convolution."""
    return any(isinstance(child, torch.nn.Conv1d) for child in module.children())
