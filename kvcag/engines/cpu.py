"""Decode steps on a CPU, for one or several answers, without the overhead of PyTorch's modules.

In a step of SmolLM2 on two cores, 10 ms are overhead: its thirty layers are 400 modules with 2,300 small operations.
`Step` computes the same in half the time, for models of the Llama family, whose layers are alike. It reads the weights
from the model's modules at each use, and calls modules that it does not know, such as those of adapters.

In bf16, PyTorch multiplies without oneDNN: the products of such a step take 9 ms then, and 24 ms with oneDNN.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import nn
from torch.nn.functional import linear, silu
from torch.nn.modules import module as hooks

from kvcag.cache.attention import one_query
from kvcag.cache.layers import BETWEEN_LAYERS, GenerationCache, decoder_of
from kvcag.engines.loading import Int8Linear, joined

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

mkldnn: Any = torch.backends.mkldnn

_FAMILY = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Models whose layers `Step` computes. Those of Qwen3 also normalise each head of queries and keys."""

_OF_LAYER = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_OF_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")

Rows: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class Step:
    """Runs one token over each of several caches. Made by `Step.of`. The caller must hold the model.

    Attributes:
        agrees: whether the step's logits equal the model's own; None before `compare`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder = decoder_of(model)
        self._embed, self._rotary = decoder.embed_tokens, decoder.rotary_emb
        self._norm = _norm_of(decoder.norm)
        self._layers = [_Layer(layer) for layer in decoder.layers]
        head = cast("nn.Module", model.get_output_embeddings())
        self._head = _product_of(head)
        self._alone = model.dtype == torch.bfloat16 and is_quick_without_onednn()
        self._children = [
            (owner._modules, name, child)
            for owner in (model, decoder, decoder.layers, *decoder.layers.modules())
            for name, child in owner.named_children()
        ]
        self._addresses = [
            (module._parameters, name, tensor.data_ptr())
            for module in decoder.layers.modules()
            if type(module) is Int8Linear
            for name, tensor in module.named_parameters()
        ]
        passed_over = [model, decoder, *(child for _, _, child in self._children)]
        self._own = [module.__dict__ for module in passed_over]
        self._hooks = [hooks._global_forward_hooks, hooks._global_forward_pre_hooks]
        self._hooks += [held for module in passed_over for held in (module._forward_hooks, module._forward_pre_hooks)]
        self.agrees: bool | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Step | None:
        """Return a step for the model; None if its layers are not known."""
        family = type(model).__name__.removesuffix("ForCausalLM")
        place = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
        if family not in _FAMILY or type(model).__module__ != place:
            return None
        return cls(model) if all(_is_known(layer, family) for layer in decoder_of(model).layers) else None

    @property
    def is_current(self) -> bool:
        """Whether the model has the same modules, and int8 weights at the same addresses, as when this was made."""
        return all(owner.get(name) is child for owner, name, child in self._children) and all(
            cast("torch.Tensor", held[name]).data_ptr() == at for held, name, at in self._addresses
        )

    @property
    def is_hooked(self) -> bool:
        """Whether there is a hook on a module whose `forward` this step does not call."""
        return any(self._hooks) or any("forward" in own for own in self._own)

    def takes(self, caches: Sequence[Cache]) -> bool:
        """Whether the step supports these caches, and no module has a hook now."""
        return not self.is_hooked and all(
            type(cache) is GenerationCache and len(cache.layers) == len(self._layers) for cache in caches
        )

    def compare(self, logits: torch.Tensor, own: torch.Tensor) -> None:
        """Set `agrees`: compare the logits of the first step with those of the model's own pass."""
        error = (logits.float() - own.float()).norm() / own.float().norm()
        self.agrees = bool(error < (1e-4 if own.dtype == torch.float32 else 5e-2))

    def __call__(self, tokens: Sequence[int], caches: Sequence[GenerationCache]) -> torch.Tensor:
        """Run a token over each cache, which grows by it; return the logits, `(caches, vocabulary)`."""
        at = torch.tensor([[cache.get_seq_length()] for cache in caches])
        hidden = self._embed(torch.tensor(tokens))
        cos, sin = self._rotary(hidden[:, None], at)  # (caches, 1, head_dim)
        half = cos.shape[-1] // 2
        turn = cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        way: Way = _without_onednn if self._alone and len(tokens) <= _FEW_ROWS else _as_it_is
        between = BETWEEN_LAYERS.get()
        for layer, *held in zip(self._layers, *(each.layers for each in caches), strict=True):
            if between is not None:
                between()
            hidden = layer(hidden, turn, held, way)
        with way:
            return self._head(self._norm(hidden))


_FEW_ROWS = 2
"""Up to this many rows are multiplied faster without oneDNN. Four rows take as long with it."""


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._norm, self._norm_behind = _norm_of(layer.input_layernorm), _norm_of(layer.post_attention_layernorm)
        self._qkv = _product_of(*(getattr(attention, name) for name in _OF_ATTENTION[:3]))
        self._gate_up = _product_of(*(getattr(mlp, name) for name in _OF_MLP[:2]))
        self._o, self._down = _product_of(attention.o_proj), _product_of(mlp.down_proj)
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self._q_norm, self._k_norm = (norm and _norm_of(norm) for norm in norms)
        self._act = silu if type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") else mlp.act_fn
        self._scaling, self._head_dim = attention.scaling, attention.head_dim
        config = attention.config
        self._heads = config.num_attention_heads, config.num_key_value_heads

    def __call__(
        self, hidden: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], held: Sequence[Any], way: Way
    ) -> torch.Tensor:
        """Return the tokens' hidden states after the layer, `(caches, hidden_size)`.

        Args:
            hidden: the hidden states before the layer, `(caches, hidden_size)`.
            turn: cosine and signed sine, `(caches, 1, head_dim)` each.
            held: this layer of each cache, which grows by a token.
            way: the context in which linear layers multiply.
        """
        rows, dim = len(hidden), self._head_dim
        heads, kv_heads = self._heads
        with way:
            qkv = self._qkv(self._norm(hidden)).view(rows, -1, dim)
        qk, v = qkv.split_with_sizes((heads + kv_heads, kv_heads), 1)
        if self._q_norm is not None and self._k_norm is not None:
            q, k = (part.reshape(-1, dim) for part in qk.split_with_sizes(self._heads, 1))
            qk = torch.cat([self._q_norm(q).view(rows, -1, dim), self._k_norm(k).view(rows, -1, dim)], 1)
        cos, sin = turn
        qk = torch.addcmul(qk * cos, qk.roll(dim // 2, -1), sin)
        q, k = qk.view(rows, 1, -1, 1, dim).split_with_sizes(self._heads, 2)
        attended = []
        for each_q, each_k, each_v, own in zip(q, k, v.view(rows, 1, -1, 1, dim), held, strict=True):
            keys, values = own.update(each_k, each_v)
            attended.append(one_query(each_q, keys, values, self._scaling).view(1, -1))
        with way:
            hidden = hidden + self._o(attended[0] if rows == 1 else torch.cat(attended))
            gate, up = self._gate_up(self._norm_behind(hidden)).chunk(2, -1)
            return hidden + self._down(self._act(gate) * up)


def _is_known(layer: Any, family: str) -> bool:
    attention = layer.self_attn
    norms = ("q_norm", "k_norm") if family == "Qwen3" else ()
    config = attention.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return (
        {name for name, _ in layer.named_children()} == set(_OF_LAYER)
        and {name for name, _ in attention.named_children()} == {*_OF_ATTENTION, *norms}
        and {name for name, _ in layer.mlp.named_children()} == set(_OF_MLP)
        and getattr(attention, "sliding_window", window) is None
    )


def _norm_of(norm: Any) -> Rows:
    """Return a function that computes RMSNorm of each row. It reads the module's current weight at each call."""
    weights: dict[str, Any] = norm._parameters
    eps = float(norm.variance_epsilon)

    def norm_rows(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:  # with a Python number instead of a tensor, fewer operations
            size = torch.linalg.vector_norm(x, dtype=torch.float32).item()
            out = x * (size * size / x.shape[-1] + eps) ** -0.5
        else:
            wide = x.float()
            out = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
        normed: torch.Tensor = out.mul_(weights["weight"])
        return normed

    return norm_rows


def _product_of(*modules: nn.Module) -> Rows:
    """Return a function that computes a linear layer, or the outputs of several, concatenated.

    It reads the modules' current weights at each call.
    """
    if len(modules) > 1:
        whole = joined(modules)
        if whole is None:
            products = [_product_of(module) for module in modules]
            return lambda x: torch.cat([product(x) for product in products], -1)
        modules = (whole,)
    module = modules[0]
    held: dict[str, Any] = module._parameters
    if type(module) is nn.Linear:
        product: Rows = lambda x: linear(x, held["weight"])  # noqa: E731
    elif type(module) is Int8Linear:

        def product(x: torch.Tensor) -> torch.Tensor:
            if len(x) > 1:
                return cast("torch.Tensor", module(x))  # includes the bias
            out = torch._weight_int8pack_mm(x, held["weight"], held["scale"])
            return out if held.get("bias") is None else out.add_(held["bias"])

        return product
    else:
        return module
    return product if held.get("bias") is None else lambda x: product(x).add_(held["bias"])


# --- products without oneDNN ---------------------------------------------------------------------------------------


class _WithoutOneDNN:
    """Within the block, PyTorch does not use oneDNN. Of several threads, the last one to leave restores the setting.

    The setting belongs to the process: it makes products of several rows in other threads slower, but not wrong. So it
    is used only around linear layers, and never while another pass of the engine runs.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._lock, self._inside, self._used = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._used = bool(mkldnn.enabled)
                mkldnn.enabled = False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                mkldnn.enabled = self._used


class _AsItIs:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


Way: TypeAlias = _WithoutOneDNN | _AsItIs

_without_onednn, _as_it_is = _WithoutOneDNN(), _AsItIs()


def put_back_onednn() -> None:
    """Restore the setting in a forked process, which has none of the threads that changed it."""
    inside, used = _without_onednn._inside, _without_onednn._used
    _without_onednn.begin()
    if inside:
        mkldnn.enabled = used


@cache
def is_quick_without_onednn() -> bool:
    """Whether PyTorch multiplies one bf16 row faster without oneDNN on this CPU. Measured once, in 5 ms."""
    row, weight = torch.ones(1, 1024, dtype=torch.bfloat16), torch.ones(1024, 1024, dtype=torch.bfloat16)
    ways: tuple[Way, ...] = _without_onednn, _as_it_is
    seconds = [float("inf")] * 2
    for _ in range(8):
        for index, way in enumerate(ways):
            with way:
                started = time.perf_counter()
                linear(row, weight)
                seconds[index] = min(seconds[index], time.perf_counter() - started)
    return seconds[0] < seconds[1]
