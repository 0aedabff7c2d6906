"""What a model was made to run, as it happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forward_lengths(model: torch.nn.Module) -> Iterator[list[int]]:
    """The length of each forward pass from now on."""
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield lengths
    finally:
        hook.remove()
