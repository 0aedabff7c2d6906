"""Loads models for `HFEngine.from_pretrained`: chooses the device and the dtype, and makes int8 weights."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvcag.errors import InvalidInputError, UnsupportedModelError

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")
"""The arguments of `from_pretrained` about the hub, which configurations and tokenizers need too."""


def load(
    name: str,
    dtype: str | torch.dtype,
    device: str | torch.device,
    settings: Mapping[str, Any],
    *,
    int8_weights: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer: see `HFEngine.from_pretrained`.

    `settings` are passed to the model, and `HUB_ARGUMENTS` among them also to the tokenizer.
    """
    target = None if "device_map" in settings else _best_device() if device == "auto" else torch.device(device)
    on_cpu = target is not None and target.type == "cpu"
    if int8_weights and not on_cpu:
        raise InvalidInputError(
            f"int8_weights needs a CPU, but the model goes to {target or 'a device_map'}. Pass device='cpu', or a "
            "quantization_config of transformers instead."
        )
    hub = {key: settings[key] for key in HUB_ARGUMENTS if key in settings}
    tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    if on_cpu and dtype == "auto" and not {"quantization_config", "gguf_file"} & settings.keys():
        config = settings.get("config") or AutoConfig.from_pretrained(name, **hub)
        if int8_weights or _is_half(config):
            dtype = torch.bfloat16 if is_quick_at_bf16() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **settings)
    if target is not None:
        nn.Module.to(model, target)
    if int8_weights:
        quantize_weights(model)
    return model, tokenizer


def _is_half(config: Any) -> bool:
    """Whether a checkpoint's weights are 16-bit floats, and not quantised."""
    found = config.dtype or config.get_text_config(decoder=True).dtype
    return found in (torch.bfloat16, torch.float16) and not getattr(config, "quantization_config", None)


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@cache
def is_quick_at_bf16() -> bool:
    """Whether this CPU multiplies in bf16 at least as fast as in fp32. Measured once, in about 20 ms.

    With instructions for bf16 (AVX512-BF16, AMX), it takes half the time or less; without, several times as long.
    """
    products = [(torch.ones(128, 1024, dtype=dtype), torch.ones(1024, 512, dtype=dtype)) for dtype in _COMPARED]
    seconds = [float("inf")] * len(products)
    for _ in range(6):
        for index, (a, b) in enumerate(products):
            started = time.perf_counter()
            torch.mm(a, b)
            seconds[index] = min(seconds[index], time.perf_counter() - started)
    return seconds[0] <= seconds[1]


_COMPARED = (torch.bfloat16, torch.float32)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale per output.

    The scale has the inputs' dtype. The codes are computed from the scale after it was rounded to this dtype.

    Args:
        weight: the codes, int8 `(out_features, in_features)`.
        scale: the scale of each output, `(out_features,)`.
        bias: `(out_features,)`, or None.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.scale = (nn.Parameter(each, requires_grad=False) for each in (weight, scale))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """Convert a linear layer."""
        weight = linear.weight.detach()
        scale = (weight.abs().amax(1).float() / 127).clamp(min=torch.finfo(torch.float16).tiny).to(weight.dtype)
        codes = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        return cls(codes, scale, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply `(…, in_features)` by the weights: `(…, out_features)`."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= _FEW_ROWS:
            out = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale)
        else:
            out = torch.mm(rows, self.weight.to(x.dtype).t()).mul_(self.scale)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """Return the layer's text in `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


_FEW_ROWS = 8
"""With more rows, it is faster to unpack the weights first."""

_MULTIPLE = 32
"""Sizes must be multiples of 32. With others, PyTorch's kernel for a few rows goes out of bounds (seen with 2.13)."""


@torch.no_grad()
def quantize_weights(model: PreTrainedModel) -> None:
    """Replace the linear layers of a model on a CPU, in place, by layers with int8 weights.

    Raises:
        UnsupportedModelError: no linear layer has sizes that are multiples of 32.
    """
    found = [
        (module, name, linear)
        for module in model.modules()
        for name, linear in module.named_children()
        if type(linear) is nn.Linear
        and linear.weight.is_floating_point()
        and not (linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no plain linear layer whose sizes are multiples of {_MULTIPLE}, so "
            "int8_weights has no effect. Load the model without it."
        )
    alike: dict[tuple[nn.Module, int], list[Int8Linear]] = defaultdict(list)
    for module, name, linear in found:
        layer = Int8Linear.of(linear)
        setattr(module, name, layer)
        alike[module, layer.in_features].append(layer)
    for layers in alike.values():
        _lay_side_by_side(layers)


_TENSORS = ("weight", "scale", "bias")


def _lay_side_by_side(layers: Sequence[Int8Linear]) -> None:
    """Store the tensors of several layers one after another in one memory, as `joined` needs them."""
    for name in _TENSORS:
        tensors = [tensor for layer in layers if (tensor := getattr(layer, name)) is not None]
        whole = torch.cat(tensors) if tensors else torch.empty(0)
        for tensor, view in zip(tensors, whole.split_with_sizes([len(t) for t in tensors]), strict=True):
            tensor.data = view


def joined(layers: Sequence[nn.Module]) -> Int8Linear | None:
    """Return one layer that computes the concatenated outputs of several, over the same memory.

    None unless the layers have int8 weights that are stored one after another, as `quantize_weights` stores them.
    """
    if not all(type(layer) is Int8Linear for layer in layers):
        return None
    whole: list[Any] = []
    for name in _TENSORS:
        tensors = [getattr(layer, name) for layer in layers]
        if all(tensor is None for tensor in tensors):
            whole.append(None)
        elif any(tensor is None for tensor in tensors) or not _adjoin(tensors):
            return None
        else:
            first = tensors[0].detach()
            whole.append(first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride()))
    return Int8Linear(*whole)


def _adjoin(tensors: Sequence[torch.Tensor]) -> bool:
    ends = list(accumulate((tensor.nbytes for tensor in tensors), initial=tensors[0].data_ptr()))
    of_one = len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    return of_one and all(t.is_contiguous() and t.data_ptr() == at for t, at in zip(tensors, ends, strict=False))
