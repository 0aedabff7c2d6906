"""Shared by all benchmarks: a description of the machine, times, medians, and lower bounds."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import kvcag


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvcag": kvcag.__version__,
        "device": device.type,
    }
    if device.type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
        facts["accelerator_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    return facts


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Wall-clock time of a call, what it left running on the device included."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def median_seconds(device: torch.device, call: Callable[[], object], repeat: int = 5, warm: int = 1) -> float:
    return statistics.median([seconds(device, call) for _ in range(repeat + warm)][warm:])


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at best, measured.

    Attributes:
        bytes_per_s: read and written by a large copy, or read by a large matrix-vector product, whichever is more.
        operations_per_s: of a large matrix product in the model's dtype.
    """

    bytes_per_s: float
    operations_per_s: float

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Ceilings:
        rows, side = (1 << 18, 8192) if device.type == "cuda" else (1 << 14, 1536)
        source, vector = torch.randn(rows, 4096, device=device).to(dtype), torch.randn(4096, device=device).to(dtype)
        target = torch.empty_like(source)
        copied = median_seconds(device, lambda: target.copy_(source), 9)
        read = median_seconds(device, lambda: source @ vector, 9)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        multiplied = median_seconds(device, lambda: a @ b, 9)
        return cls(source.nbytes * max(2 / copied, 1 / read), 2 * side**3 / multiplied)


@dataclass(frozen=True)
class Work:
    """What a forward pass cannot do without.

    Attributes:
        operations: floating-point operations, a multiplication and an addition counted as two.
        bytes: weights, and keys and values of every token seen, read once each.
    """

    operations: float
    bytes: float

    @classmethod
    def of(cls, model: PreTrainedModel, new: int, cached: int) -> Work:
        """Of `new` tokens that follow `cached` ones; logits after the last."""
        config = model.config.get_text_config(decoder=True)
        size = torch.empty(0, dtype=model.dtype).element_size()
        head = model.get_output_embeddings().weight.numel()
        layers = sum(p.numel() for p in model.get_decoder().layers.parameters())
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        seen = new * cached + new * (new + 1) / 2  # keys, summed over the new tokens
        attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim * seen
        kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * (cached + new)
        return cls(2 * layers * new + 2 * head + attention, size * (layers + head + kv))

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds: the longer of its arithmetic and its reading, since the two can overlap."""
        return max(self.operations / ceilings.operations_per_s, self.bytes / ceilings.bytes_per_s)

    def floors(self, ceilings: Ceilings) -> dict[str, float]:
        return {
            "floor_operations_s": self.operations / ceilings.operations_per_s,
            "floor_bytes_s": self.bytes / ceilings.bytes_per_s,
        }


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def ms(value: float | None) -> str:
    """Seconds as milliseconds, to three figures."""
    if value is None:
        return "–"
    return f"{value * 1e3:,.0f}" if value >= 0.0995 else f"{value * 1e3:.3g}"
