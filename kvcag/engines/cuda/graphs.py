"""Forward passes over generations' caches, captured as CUDA graphs.

A pass of a few tokens is hundreds of kernels of a few microseconds: launched one by one from Python, they keep the GPU
waiting. A graph launches all of them at once. It is captured once for each number of new tokens (`SIZES`) and serves
every generation at any length, since its kernels read the cache's addresses and positions from the device
(`kvcag.engines.cuda.attention`): the cache of a generation stays its own, and may grow. Other graphs take one token for
each of several generations (`TOGETHER`).
"""

from __future__ import annotations

import gc
import inspect
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvcag.cache.attention import attends_to_its_own, check_mergeable, rotations
from kvcag.cache.layers import (
    BETWEEN_LAYERS,
    GenerationCache,
    Layers,
    cache_argument,
    cache_of,
    crop,
    cut,
    decoder_of,
    generation_cache,
    readable,
)
from kvcag.cache.merge import Layout
from kvcag.core import ReadTail
from kvcag.engines.cuda.attention import NAME, Inputs, append, inputs
from kvcag.engines.cuda.drift import PARTS, Correction
from kvcag.engines.cuda.fused import fused
from kvcag.engines.decode import Arriving, Prediction
from kvcag.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = (1, 16, 32, 64, 128, 256)
"""New tokens of a pass. Fewer are filled up with copies of the last one, at its position: they compute the same once
more, and write the same keys and values to the same place."""

CHOOSING = (16, 32, 64, 128, 256, 512)
"""Tokens of a question whose pass sums up what they attend to."""

RECOMPUTING = (64, 128, 256, 384, 512, 768, 1024)
"""Tokens of a pass that recomputes some of a merged context and reads the question. Longer passes keep the device busy
for longer than their launches take: they run without a graph."""

TOGETHER = (8, 16, 32, 64)
"""Generations of a pass. With fewer, the other places are empty: what a generation computes does not depend on how many
of up to eight there are."""

_PROBE = 24
"""Tokens on which a model's captured passes are compared with its ordinary ones."""

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""The relative error of logits in that comparison that is always rounding; a wrong mask is near 1."""

_ROUNDING = 3.0
"""How many times the error of the model's own pass over a cache is still rounding. Random weights, and deep models in
bf16, differ by 0.05 between two passes of their own."""


class Graphs:
    """The captured passes of one model.

    The caller of its methods holds the model (`HFEngine.exclusive`).

    Args:
        model: on one CUDA device, in fp32, fp16 or bf16.

    Raises:
        UnsupportedModelError: the model cannot be captured, or computes something else when it is. The message says
            why.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1:
            raise UnsupportedModelError(f"its weights lie on {len(devices)} devices")
        if model.dtype not in _TOLERANCE:
            raise UnsupportedModelError(f"its dtype is {model.dtype}")
        check_mergeable(model)
        if not attends_to_its_own(model):
            raise UnsupportedModelError("its layers attend to something else than the keys and values that they cache")
        self._model = model
        self._device = devices.pop()
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._merging: dict[tuple[str, int], _Pass] = {}
        self._rotations = rotations(model)
        self.merges = len({each.interleaved for each in self._rotations if each.module is not None}) == 1
        """Whether it has passes for merging. The engine switches them off where they ran out of memory."""
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self.alone: str | None = None
        """Why passes of several generations are not captured; None where they are."""
        self._compared = False
        token = BETWEEN_LAYERS.set(None)  # no other thread comes in between
        try:
            self._shapes: list[tuple[int, int]] = []
            self._compare()
        finally:
            BETWEEN_LAYERS.reset(token)

    def takes(self, tokens: int, cache: Cache) -> bool:
        """Whether a pass of so many tokens over this cache can be a captured one."""
        if not 0 < tokens <= SIZES[-1] or not isinstance(cache, GenerationCache) or cache.get_seq_length() == 0:
            return False
        table = cache.addresses(tokens)
        return table is not None and len(table) == len(self._shapes) and cache.dtype == self._model.dtype

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, token_ids: Sequence[int] | torch.Tensor, cache: GenerationCache) -> Prediction:
        """Run tokens over `cache`, which grows by them. Nothing waits for the device.

        Args:
            token_ids: at most `SIZES[-1]`, or `(1,)` int64 on the device.
            cache: of `generation_cache`; `takes` said yes.
        """
        size = SIZES[bisect_left(SIZES, len(token_ids))]
        return self._run(1, size, [token_ids], [cache])[0]

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(
        self, token_ids: Sequence[Sequence[int] | torch.Tensor], caches: Sequence[GenerationCache]
    ) -> list[Prediction]:
        """Run one token over each cache, in one pass. Nothing waits for the device.

        Args:
            token_ids: one token each, as in `forward`; at most `TOGETHER[-1]`.
            caches: of `generation_cache`; `takes` said yes.

        Raises:
            UnsupportedModelError: the model computes something else for several generations; `alone` says so from now
                on.
        """
        if not self._compared:
            self._compare_together()
        if self.alone is not None:
            raise UnsupportedModelError(self.alone)
        return self._run(TOGETHER[bisect_left(TOGETHER, len(caches))], 1, token_ids, caches)

    def _run(
        self,
        sequences: int,
        size: int,
        token_ids: Sequence[Sequence[int] | torch.Tensor],
        caches: Sequence[GenerationCache],
    ) -> list[Prediction]:
        if (sequences, size) not in self._passes:
            self._passes[sequences, size] = _Pass(self._model, sequences, size, self._shapes, self._pool)
        predictions = self._passes[sequences, size](token_ids, caches)
        for tokens, cache in zip(token_ids, caches, strict=True):
            cache.advance(len(tokens))
        return predictions

    # --- merging: `kvcag.cache.merge.Passes` ------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def scores(self, layers: Layers, length: int, tail_ids: torch.Tensor) -> torch.Tensor | None:
        """See `kvcag.cache.merge.Passes`."""
        if not self._takes_merged(layers) or not 0 < len(tail_ids) <= CHOOSING[-1]:
            return None
        size = CHOOSING[bisect_left(CHOOSING, len(tail_ids))]
        if ("choose", size) not in self._merging:
            self._merging["choose", size] = _Choosing(self._model, 1, size, self._shapes, self._pool)
        choosing = cast("_Choosing", self._merging["choose", size])
        found = torch.zeros(max(heads for heads, _ in self._shapes), length, device=self._device)
        choosing.address.copy_(torch.tensor([found.data_ptr()]).pin_memory(), non_blocking=True)
        choosing.launch(_table_of(layers), [*range(length, length + len(tail_ids))], tail_ids.tolist())
        return found.sum(0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def recompute_and_read(
        self, layers: Layers, layout: Layout, positions: torch.Tensor, tail_ids: torch.Tensor
    ) -> ReadTail | None:
        """See `kvcag.cache.merge.Passes`."""
        length, parts = len(layout.token_ids), int(layout.part_of[-1]) + 1
        if not self._takes_merged(layers) or parts > PARTS:
            return None
        at = [*positions.tolist(), *range(length, length + len(tail_ids))]
        token_ids = [*layout.token_ids[positions].tolist(), *tail_ids.tolist()]
        recomputing: _Recomputing
        if len(at) > RECOMPUTING[-1]:
            recomputing = self._recomputing(len(at), captured=False)
        else:
            size = RECOMPUTING[bisect_left(RECOMPUTING, len(at))]
            if ("recompute", size) not in self._merging:
                self._merging["recompute", size] = self._recomputing(size, captured=True)
            recomputing = cast("_Recomputing", self._merging["recompute", size])
        features = max(keys.shape[1] * (keys.shape[-1] + values.shape[-1]) for keys, values in layers)
        recomputing.correction.take(layout, positions, features, self._model.dtype)
        logits, _ = recomputing.launch(_table_of(layers), at, token_ids)
        return ReadTail(cache_of(cut(layers, length, length + len(tail_ids))), logits)

    def _recomputing(self, size: int, *, captured: bool) -> _Recomputing:
        frequencies = [
            torch.zeros(width // 2, device=self._device) if rotation.module is None else rotation.frequencies
            for rotation, (_, width) in zip(self._rotations, self._shapes, strict=True)
        ]
        interleaved = any(each.interleaved for each in self._rotations)
        correction = Correction.of(size, frequencies, self._device, interleaved=interleaved)
        return _Recomputing(self._model, size, self._shapes, self._pool, correction, captured=captured)

    def _takes_merged(self, layers: Layers) -> bool:
        """Whether each layer turns all of its keys, and the kernels can read what is merged."""
        return (
            self.merges
            and readable(layers)
            and layers[0][0].dtype == self._model.dtype
            and all(
                rotation.module is None or rotation.turns_all_of(width)
                for rotation, (_, width) in zip(self._rotations, self._shapes, strict=True)
            )
        )

    def _compare(self) -> None:
        """Refuse the model unless captured passes give what ordinary ones give."""
        model = self._model
        vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        ids = (torch.arange(_PROBE) * 7 + 1) % vocabulary
        expected = model(input_ids=ids[None].to(self._device), use_cache=False).logits[0, -1].float()

        def error(logits: torch.Tensor) -> float:
            return float((logits.float() - expected).norm() / expected.norm())

        def run(some: torch.Tensor, cache: Cache) -> torch.Tensor:
            given = some[None].to(self._device)
            return model(input_ids=given, use_cache=True, **cache_argument(model, cache)).logits[0, -1]  # type: ignore[no-any-return]

        cache = generation_cache([], room=_PROBE)
        assert isinstance(cache, GenerationCache)
        run(ids[:-1], cache)
        own = error(run(ids[-1:], cache))
        crop(cache, _PROBE - 8)
        self._shapes = cache.shapes()
        self.forward(ids[_PROBE - 8 : -1].tolist(), cache)
        captured = error(self.forward(ids[-1:].tolist(), cache).logits[0])
        self._tolerance = max(_TOLERANCE[model.dtype], min(_ROUNDING * own, 0.3))
        if not captured <= self._tolerance:
            raise UnsupportedModelError(
                f"captured passes change its logits by {captured:.1g}, its own passes over a cache by {own:.1g}"
            )

    def _compare_together(self) -> None:
        """Leave several generations alone unless their passes together give what each one's own gives."""
        self._compared = True
        vocabulary = int(self._model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        ids = ((torch.arange(_PROBE) * 7 + 1) % vocabulary).tolist()

        def made(length: int) -> GenerationCache:
            cache = generation_cache([], room=_PROBE)
            assert isinstance(cache, GenerationCache)
            self._model(
                input_ids=torch.tensor([ids[:length]], device=self._device),
                use_cache=True,
                **cache_argument(self._model, cache),
            )
            return cache

        token = BETWEEN_LAYERS.set(None)
        try:
            lengths = [_PROBE - 1, _PROBE // 2]
            apart = [self.forward([ids[n]], made(n)).logits.float() for n in lengths]
            joined = self._run(TOGETHER[0], 1, [[ids[n]] for n in lengths], [made(n) for n in lengths])
            errors = [
                float((got.logits.float() - own).norm() / own.norm()) for got, own in zip(joined, apart, strict=True)
            ]
            if not max(errors) <= self._tolerance:
                self.alone = f"a pass of several generations changes its logits by {max(errors):.1g}"
        except UnsupportedModelError as error:
            self.alone = str(error)
        finally:
            BETWEEN_LAYERS.reset(token)


class _Pass:
    """A captured pass of `size` new tokens for each of `sequences` generations; either is one."""

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: int,
        size: int,
        shapes: Sequence[tuple[int, int]],
        pool: Any,
        *,
        cache: Cache | None = None,
        captured: bool = True,
    ) -> None:
        self._model, self._sequences, self._size = model, sequences, size
        self._device = model.device
        layers, self._places = len(shapes), sequences * size
        self._given = torch.zeros((8 * layers + 2 * size) * sequences, dtype=torch.long, device=self._device)
        table, positions, self._token_ids = self._given.split([8 * layers * sequences, self._places, self._places])
        self._inputs = self._inputs_of(table.view(sequences, layers, 8), positions.view(sequences, size))
        self._cache = _Writer() if cache is None else cache
        last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._arguments: dict[str, Any] = {"logits_to_keep": 1} if last else {}
        self._replay: Any = None
        if not captured:
            return
        heads, width = max(heads for heads, _ in shapes), max(width for _, width in shapes)
        scratch = torch.zeros(2, heads, size, width, dtype=model.dtype, device=self._device)  # for this method only
        row = [scratch[0].data_ptr(), scratch[1].data_ptr(), size, 0, 0, 0, 0, 0]
        self._set(np.array([row] * (layers * sequences)), [*range(size)] * sequences, [1] * self._places)
        with self._ready(), _NeverWaiting():
            self._run()
        with self._ready():
            self._replay, (self._logits, self._likeliest) = capture(self._run, pool, _second(model))

    def _inputs_of(self, table: torch.Tensor, positions: torch.Tensor) -> Inputs:
        return Inputs(table, positions)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Within it, the model computes by our kernels, from this pass's inputs."""
        with _attending(self._model), fused(self._model):
            token = inputs.set(self._inputs)
            try:
                yield
            finally:
                inputs.reset(token)

    def __call__(
        self, token_ids: Sequence[Sequence[int] | torch.Tensor], caches: Sequence[GenerationCache]
    ) -> list[Prediction]:
        """The prediction for each generation; see `Graphs.forward`."""
        tables = [cache.addresses(len(tokens)) for tokens, cache in zip(token_ids, caches, strict=True)]
        order = sorted(range(len(caches)), key=lambda i: tables[i][0, 3:7].tolist())  # type: ignore[index]
        positions: list[int] = []
        given: list[int] = []
        for i in order:
            new, start = len(token_ids[i]), caches[i].get_seq_length()
            positions += [*range(start, start + new), *[start + new - 1] * (self._size - new)]
            if not isinstance(token_ids[i], torch.Tensor):
                given += [*token_ids[i], *[token_ids[i][-1]] * (self._size - new)]  # type: ignore[list-item]
        positions += [-1] * (self._places - len(positions))
        if len(given) == len(order) * self._size:
            self._set(np.concatenate([tables[i] for i in order]), positions, given)
        else:
            self._set(np.concatenate([tables[i] for i in order]), positions, [])
            here = [torch.as_tensor(token_ids[i], device=self._device) for i in order]
            torch.cat(here, out=self._token_ids[: len(here)])
        self._replay()
        logits, likeliest = self._logits.clone(), self._likeliest.clone()
        arriving = Arriving(likeliest)
        rows = [Prediction(logits[j : j + 1], likeliest[j : j + 1], arriving, j) for j in range(len(order))]
        return [rows[order.index(i)] for i in range(len(order))]

    def launch(
        self, table: np.ndarray, positions: list[int], token_ids: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run tokens of one sequence at any ascending positions; logits after the last, and the likeliest token."""
        missing = self._size - len(positions)
        self._set(table, [*positions, *positions[-1:] * missing], [*token_ids, *token_ids[-1:] * missing])
        if self._replay is None:
            with self._ready():
                return self._run()
        self._replay()
        return self._logits.clone(), self._likeliest.clone()

    def _set(self, table: np.ndarray, positions: list[int], token_ids: list[int]) -> None:
        """Copies to the device, which do not wait for it. What the table lacks is left as it is."""
        entries = 8 * len(table)
        behind = np.array([*positions, *token_ids])
        given = torch.empty(entries + len(behind), dtype=torch.long, pin_memory=self._device.type == "cuda")
        given.numpy()[:entries], given.numpy()[entries:] = table.reshape(-1), behind
        if entries == len(self._given) - 2 * self._places:
            self._given[: len(given)].copy_(given, non_blocking=True)
        else:
            self._given[:entries].copy_(given[:entries], non_blocking=True)
            start = len(self._given) - 2 * self._places
            self._given[start : start + len(behind)].copy_(given[entries:], non_blocking=True)

    def _run(self) -> tuple[torch.Tensor, torch.Tensor]:
        logits: torch.Tensor = self._model(
            input_ids=self._token_ids.view(self._sequences, self._size),
            position_ids=self._inputs.positions,
            use_cache=True,
            **self._arguments,
            **cache_argument(self._model, self._cache),
        ).logits[:, -1]
        return logits, logits.argmax(-1)


class _Choosing(_Pass):
    """A pass that adds up how much its tokens use those before them."""

    def _inputs_of(self, table: torch.Tensor, positions: torch.Tensor) -> Inputs:
        self.address = torch.zeros(1, dtype=torch.long, device=self._device)
        return Inputs(table, positions, self.address)


class _Recomputing(_Pass):
    """A pass that corrects the cache by what its tokens show, layer by layer, before it attends to it."""

    def __init__(
        self,
        model: PreTrainedModel,
        size: int,
        shapes: Sequence[tuple[int, int]],
        pool: Any,
        correction: Correction,
        *,
        captured: bool,
    ) -> None:
        self.correction = correction
        super().__init__(model, 1, size, shapes, pool, cache=_Corrector(correction), captured=captured)


def _table_of(layers: Layers) -> np.ndarray:
    """As `GenerationCache.addresses`, of layers that were lent nothing."""
    assert layers.rows is not None  # `readable` said so
    keys, values = layers.rows[::2], layers.rows[1::2]
    table = np.zeros((len(layers), 8), dtype=np.int64)
    table[:, 0], table[:, 1], table[:, 2] = keys[:, 0], values[:, 0], keys[:, 1] // keys[:, 3]
    return table


def _second(model: PreTrainedModel) -> torch.nn.Module | None:
    """The layer with which the second graph of a pass begins: a launch takes the device a millisecond for 700 kernels.

    Meanwhile it works on the first graph, which is short.
    """
    layers = getattr(decoder_of(model), "layers", ())
    return layers[len(layers) // 9] if len(layers) > 9 else None


def capture(run: Any, pool: Any, second: torch.nn.Module | None = None) -> tuple[Any, Any]:
    """A function that launches `run` as a graph, and the tensors that then hold its result.

    It is two graphs if `second` is given, a module which `run` calls once: the second begins there.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # libraries allocate at their first call
    torch.cuda.current_stream().wait_stream(side)
    graphs: list[torch.cuda.CUDAGraph] = []

    def begin(*_: object) -> None:
        if graphs:
            graphs[-1].capture_end()
        graphs.append(torch.cuda.CUDAGraph())
        graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")

    torch.cuda.synchronize()
    gc.collect()  # graphs that are collected during a capture break it
    torch.cuda.empty_cache()
    with torch.cuda.stream(side):
        begin()
        hook = second.register_forward_pre_hook(begin) if second is not None else None
        try:
            result = run()
        finally:
            graphs[-1].capture_end()
            if hook is not None:
                hook.remove()

    def replay() -> None:
        for graph in graphs:
            graph.replay()

    return replay, result


class _Writer(DynamicCache):
    """The cache that a captured pass sees. New keys and values go where the table says."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = inputs.get()
        append(key_states, value_states, given.table[:, layer_idx], given.positions)
        return key_states, value_states


class _Corrector(_Writer):
    """As `_Writer`; the rest of the context is corrected by what new keys and values differ from the old ones."""

    def __init__(self, correction: Correction) -> None:
        super().__init__()
        self._correction = correction

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = inputs.get()
        entry, positions = given.table[0, layer_idx], given.positions[0]
        if value_states.stride(-1) != 1 or key_states.stride(-1) != 1:
            key_states, value_states = key_states.contiguous(), value_states.contiguous()
        self._correction.correct(layer_idx, key_states, value_states, entry, positions)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class _NeverWaiting(TorchDispatchMode):
    """Refuses what waits for the device: it cannot be captured, and an attempt would leave CUDA's state broken."""

    _WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        masks = name.startswith(("aten.index.", "aten.index_put")) and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if masks or name.startswith(self._WAITS):
            raise UnsupportedModelError(f"its forward pass waits for the device ({name})")
        return func(*args, **(kwargs or {}))


@contextmanager
def _attending(model: PreTrainedModel) -> Iterator[None]:
    """The model attends by `kvcag.engines.cuda.attention`."""
    config = decoder_of(model).config
    own = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own
