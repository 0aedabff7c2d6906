"""Forward passes over generations' caches, captured as CUDA graphs.

A pass of a few tokens has hundreds of kernels of a few microseconds. If Python launches them one by one, the GPU waits.
A graph launches all of them at once. It is captured once per number of new tokens (`SIZES`) and works for every
generation at any length, because its kernels read the cache's addresses and positions from the device
(`kvcag.engines.cuda.attention`). So each generation has its own cache, which may grow. Other graphs run one token for
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
    addresses_in,
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
from kvcag.engines.cuda.fused import Fused
from kvcag.engines.decode import Arriving, Prediction
from kvcag.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = (1, 16, 32, 64, 128, 256)
"""The numbers of new tokens for which passes are captured. Fewer tokens are padded with copies of the last one at its
position, which compute and write the same keys and values again."""

CHOOSING = (16, 32, 64, 128, 256, 512)
"""The lengths of questions for which passes are captured that score tokens (`kvcag.cache.merge.query`)."""

RECOMPUTING = (64, 128, 256, 384, 512, 768, 1024)
"""The numbers of tokens, recomputed ones and the question's, for which merging passes are captured. Longer passes take
the device longer than their launches, and so run without a graph."""

TOGETHER = (8, 16, 32, 64)
"""The numbers of generations for which passes are captured. Fewer leave places empty, so a generation's result does not
depend on the number of others, up to eight."""

_PROBE = 24
"""The number of tokens on which captured passes are compared with the model's own."""

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""The relative error of logits that is allowed in this comparison, as rounding; a wrong mask makes errors near 1."""

_ROUNDING = 3.0
"""The allowed error, as a multiple of the error of the model's own pass over a cache. Two passes of models with random
weights, or of deep models in bf16, differ by 0.05."""


class Graphs:
    """The captured passes of one model.

    Callers of its methods must hold the model (`HFEngine.exclusive`).

    Args:
        model: a model on one CUDA device, in fp32, fp16 or bf16.

    Raises:
        UnsupportedModelError: the model cannot be captured, or its captured passes give other logits. The message says
            why.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1:
            raise UnsupportedModelError(f"its weights are on {len(devices)} devices")
        if model.dtype not in _TOLERANCE:
            raise UnsupportedModelError(f"its dtype is {model.dtype}")
        check_mergeable(model)
        if not attends_to_its_own(model):
            raise UnsupportedModelError("its layers do not attend to the keys and values that they cache")
        self._model = model
        self._fused = Fused(model)
        self._device = devices.pop()
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._merging: dict[tuple[str, int], _Pass] = {}
        self._rotations = rotations(model)
        self.merges = len({each.interleaved for each in self._rotations if each.module is not None}) == 1
        """Whether there are passes for merging. The engine switches them off if the device runs out of memory."""
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self.alone: str | None = None
        """Why passes of several generations are not captured; None if they are."""
        self._compared = False
        token = BETWEEN_LAYERS.set(None)  # no other thread may run between two layers
        try:
            self._shapes: list[tuple[int, int]] = []
            self._compare()
        finally:
            BETWEEN_LAYERS.reset(token)

    def takes(self, tokens: int, cache: Cache) -> bool:
        """Whether a captured pass can run this many tokens over this cache."""
        if not 0 < tokens <= SIZES[-1] or not isinstance(cache, GenerationCache) or cache.get_seq_length() == 0:
            return False
        table = cache.addresses(tokens)
        return table is not None and len(table) == len(self._shapes) and cache.dtype == self._model.dtype

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, token_ids: Sequence[int] | torch.Tensor, cache: GenerationCache) -> Prediction:
        """Run tokens over a cache, which grows by them, without waiting for the device.

        Args:
            token_ids: at most `SIZES[-1]` tokens, or one token on the device, int64 `(1,)`.
            cache: from `generation_cache`; `takes` must be true for it.
        """
        size = SIZES[bisect_left(SIZES, len(token_ids))]
        return self._run(1, size, [token_ids], [cache])[0]

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(
        self, token_ids: Sequence[Sequence[int] | torch.Tensor], caches: Sequence[GenerationCache]
    ) -> list[Prediction]:
        """Run one token over each cache, in one pass, without waiting for the device.

        Args:
            token_ids: one token for each cache, as in `forward`; at most `TOGETHER[-1]`.
            caches: from `generation_cache`; `takes` must be true for each.

        Raises:
            UnsupportedModelError: the model gives other logits for several generations. `alone` then has the reason.
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
            self._passes[sequences, size] = _Pass(self._model, self._fused, sequences, size, self._shapes, self._pool)
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
            self._merging["choose", size] = _Choosing(self._model, self._fused, 1, size, self._shapes, self._pool)
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
        return _Recomputing(self._model, self._fused, size, self._shapes, self._pool, correction, captured=captured)

    def _takes_merged(self, layers: Layers) -> bool:
        """Whether each layer rotates whole keys or none, and the kernels can read these layers in place."""
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
        """Refuse the model if its captured passes give other logits than its own passes."""
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
                f"captured passes change its logits by {captured:.1g}, but its own passes over a cache by {own:.1g}"
            )

    def _compare_together(self) -> None:
        """Set `alone` if a pass of several generations gives other logits than a pass for each of them."""
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
    """A captured pass of `size` new tokens for each of `sequences` generations. One of the two numbers is 1."""

    def __init__(
        self,
        model: PreTrainedModel,
        fused: Fused,
        sequences: int,
        size: int,
        shapes: Sequence[tuple[int, int]],
        pool: Any,
        *,
        cache: Cache | None = None,
        captured: bool = True,
    ) -> None:
        self._model, self._fused, self._sequences, self._size = model, fused, sequences, size
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
        scratch = torch.zeros(2, heads, size, width, dtype=model.dtype, device=self._device)  # for the capture only
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
        """Within the block, the model computes with kvcag's kernels, from this pass's inputs."""
        with _attending(self._model), self._fused.running():
            token = inputs.set(self._inputs)
            try:
                yield
            finally:
                inputs.reset(token)

    def __call__(
        self, token_ids: Sequence[Sequence[int] | torch.Tensor], caches: Sequence[GenerationCache]
    ) -> list[Prediction]:
        """Run the pass, and return the prediction for each generation; see `Graphs.forward`."""
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
        """Run tokens of one sequence at ascending positions; return the last logits and their likeliest token."""
        missing = self._size - len(positions)
        self._set(table, [*positions, *positions[-1:] * missing], [*token_ids, *token_ids[-1:] * missing])
        if self._replay is None:
            with self._ready():
                return self._run()
        self._replay()
        return self._logits.clone(), self._likeliest.clone()

    def _set(self, table: np.ndarray, positions: list[int], token_ids: list[int]) -> None:
        """Copy the inputs to the device without waiting. A shorter table leaves the rest of the old one."""
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
    """A pass that also sums how much its tokens use each earlier token."""

    def _inputs_of(self, table: torch.Tensor, positions: torch.Tensor) -> Inputs:
        self.address = torch.zeros(1, dtype=torch.long, device=self._device)
        return Inputs(table, positions, self.address)


class _Recomputing(_Pass):
    """A pass that also corrects the cache, in each layer before it attends, by the drift of its recomputed tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        fused: Fused,
        size: int,
        shapes: Sequence[tuple[int, int]],
        pool: Any,
        correction: Correction,
        *,
        captured: bool,
    ) -> None:
        self.correction = correction
        super().__init__(model, fused, 1, size, shapes, pool, cache=_Corrector(correction), captured=captured)


def _table_of(layers: Layers) -> np.ndarray:
    """Return the table of `GenerationCache.addresses` for layers without lent parts."""
    assert layers.rows is not None  # `readable` was true
    table = np.zeros((len(layers), 8), dtype=np.int64)
    table[:, :3] = addresses_in(layers.rows)
    return table


def _second(model: PreTrainedModel) -> torch.nn.Module | None:
    """Return the layer with which the second graph of a pass begins.

    The launch of a graph of 700 kernels takes a millisecond, in which the device works on the first, short graph.
    """
    layers = getattr(decoder_of(model), "layers", ())
    return layers[len(layers) // 9] if len(layers) > 9 else None


def capture(run: Any, pool: Any, second: torch.nn.Module | None = None) -> tuple[Any, Any]:
    """Capture `run` as a graph. Returns a function that launches it, and the tensors of its result.

    If `second` is given, a module that `run` calls once, there are two graphs, and the second begins with that module.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # libraries allocate memory at their first call
    torch.cuda.current_stream().wait_stream(side)
    graphs: list[torch.cuda.CUDAGraph] = []

    def begin(*_: object) -> None:
        if graphs:
            graphs[-1].capture_end()
        graphs.append(torch.cuda.CUDAGraph())
        graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")

    torch.cuda.synchronize()
    gc.collect()  # collecting another graph during a capture would break the capture
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
    """The cache of a captured pass. It writes new keys and values to the addresses in the table."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = inputs.get()
        append(key_states, value_states, given.table[:, layer_idx], given.positions)
        return key_states, value_states


class _Corrector(_Writer):
    """A `_Writer` that also corrects the rest of the context by the drift of the new keys and values."""

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
    """Refuses operations that wait for the device. They cannot be captured, and trying would break CUDA's state."""

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
    """Within the block, the model attends by `kvcag.engines.cuda.attention`."""
    config = decoder_of(model).config
    own = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own
