"""Forward passes over generations' caches, captured as CUDA graphs.

A pass of a few tokens is hundreds of kernels of a few microseconds: launched one by one from Python, they keep the GPU
waiting. A graph launches all of them at once. It is captured once for each number of new tokens (`SIZES`) and serves
every generation at any length, since its kernels read the cache's addresses and positions from the device
(`kvcag.engines.cuda.attention`): the cache of a generation stays its own, and may grow.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvcag.cache.attention import decoder_of
from kvcag.cache.layers import BETWEEN_LAYERS, LayerKV, advance, cache_argument, crop, generation_cache, roomy_buffers
from kvcag.cache.rope import check_mergeable
from kvcag.engines.cuda.attention import NAME, Inputs, append, inputs
from kvcag.engines.cuda.fused import fused
from kvcag.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = (1, 16, 32, 64, 128, 256)
"""New tokens of a pass. Fewer are filled up with copies of the last one, at its position: they compute the same once
more, and write the same keys and values to the same place."""

_PROBE = 24
"""Tokens on which a model's captured passes are compared with its ordinary ones."""

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""The relative error of logits in that comparison that is always rounding; a wrong mask is near 1."""

_ROUNDING = 3.0
"""How many times the error of the model's own pass over a cache is still rounding. Random weights, and deep models in
bf16, differ by 0.05 between two passes of their own."""


class Graphs:
    """The captured passes of one model.

    Whoever calls it keeps other threads from the model.

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
        self._model = model
        self._device = devices.pop()
        self._passes: dict[int, _Pass] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        token = BETWEEN_LAYERS.set(None)  # no other thread comes in between
        try:
            self._shapes: list[tuple[int, int]] = []
            self._compare()
        finally:
            BETWEEN_LAYERS.reset(token)

    def takes(self, tokens: int, cache: Cache) -> bool:
        """Whether a pass of so many tokens over this cache can be a captured one."""
        if not 0 < tokens <= SIZES[-1] or cache.get_seq_length() == 0:
            return False
        buffers = roomy_buffers(cache, tokens)
        return buffers is not None and len(buffers) == len(self._shapes) and _dtype_of(buffers) == self._model.dtype

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, token_ids: Sequence[int] | torch.Tensor, cache: Cache) -> torch.Tensor:
        """Run tokens over `cache`, which grows by them, and return the logits after the last, `(1, vocabulary)`.

        Nothing waits for the device.

        Args:
            token_ids: at most `SIZES[-1]`, or `(1,)` int64 on the device.
            cache: of `generation_cache`; `takes` said yes.
        """
        buffers = roomy_buffers(cache, len(token_ids))
        assert buffers is not None
        start, size = cache.get_seq_length(), SIZES[bisect_left(SIZES, len(token_ids))]
        if size not in self._passes:
            self._passes[size] = _Pass(self._model, size, self._shapes, self._pool)
        logits = self._passes[size](token_ids, start, buffers)
        advance(cache, len(token_ids))
        return logits

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
        run(ids[:-1], cache)
        own = error(run(ids[-1:], cache))
        crop(cache, _PROBE - 8)
        buffers = roomy_buffers(cache, 8)
        assert buffers is not None
        self._shapes = [(keys.shape[1], keys.shape[-1]) for keys, _ in buffers]
        self.forward(ids[_PROBE - 8 : -1].tolist(), cache)
        captured = error(self.forward(ids[-1:].tolist(), cache)[0])
        if not captured <= max(_TOLERANCE[model.dtype], min(_ROUNDING * own, 0.3)):
            raise UnsupportedModelError(
                f"captured passes change its logits by {captured:.1g}, its own passes over a cache by {own:.1g}"
            )


class _Pass:
    """A captured pass of `size` new tokens."""

    def __init__(self, model: PreTrainedModel, size: int, shapes: Sequence[tuple[int, int]], pool: Any) -> None:
        self._model, self._size = model, size
        self._device = model.device
        layers = len(shapes)
        self._given = torch.zeros(4 * layers + 2 * size, dtype=torch.long, device=self._device)
        table, positions, self._token_ids = self._given.split([4 * layers, size, size])
        self._inputs = Inputs(table.view(1, layers, 4), positions[None])
        self._cache = _Writer()
        last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._arguments: dict[str, Any] = {"logits_to_keep": 1} if last else {}
        heads, width = max(heads for heads, _ in shapes), max(width for _, width in shapes)
        scratch = torch.zeros(2, 1, heads, size, width, dtype=model.dtype, device=self._device)  # for this method only
        self._set(list(range(size)), [1] * size, [(scratch[0], scratch[1])] * layers)
        with _attending(model), fused(model):
            token = inputs.set(self._inputs)
            try:
                with _NeverWaiting():
                    self._run()
                self._replay, self._logits = capture(self._run, pool)
            finally:
                inputs.reset(token)

    def __call__(self, token_ids: Sequence[int] | torch.Tensor, start: int, buffers: Sequence[LayerKV]) -> torch.Tensor:
        """Logits after the last of `token_ids`, which are at positions from `start`; see `Graphs.forward`."""
        new = len(token_ids)
        positions = [*range(start, start + new), *[start + new - 1] * (self._size - new)]
        if isinstance(token_ids, torch.Tensor):
            self._set(positions, [], buffers)
            self._token_ids.copy_(token_ids)
        else:
            self._set(positions, [*token_ids, *[token_ids[-1]] * (self._size - new)], buffers)
        self._replay()
        return self._logits.clone()

    def _set(self, positions: list[int], token_ids: list[int], buffers: Sequence[LayerKV]) -> None:
        """One copy to the device, which does not wait for it."""
        table = [n for k, v in buffers for n in (k.data_ptr(), v.data_ptr(), k.shape[-2], 0)]
        given = torch.tensor([*table, *positions, *token_ids], device="cpu", pin_memory=self._device.type == "cuda")
        self._given[: len(given)].copy_(given, non_blocking=True)

    def _run(self) -> torch.Tensor:
        logits: torch.Tensor = self._model(
            input_ids=self._token_ids[None],
            position_ids=self._inputs.positions,
            use_cache=True,
            **self._arguments,
            **cache_argument(self._model, self._cache),
        ).logits
        return logits[:, -1]


def capture(run: Any, pool: Any) -> tuple[Any, torch.Tensor]:
    """What launches `run` as one graph, and the tensor in which its result is then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # libraries allocate at their first call
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


class _Writer(DynamicCache):
    """The cache that a captured pass sees. New keys and values go where the table says."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = inputs.get()
        append(key_states, value_states, given.table[:, layer_idx], given.positions)
        return key_states, value_states


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


def _dtype_of(buffers: Sequence[LayerKV]) -> torch.dtype:
    return buffers[0][0].dtype
