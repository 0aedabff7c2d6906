"""Dumps as MemOS writes them, without MemOS."""

from __future__ import annotations

import datetime
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, Field
from transformers import DynamicCache

from kvcag.cache.layers import layers_of
from tests.stored import random_item

MODULE = "memos.memories.activation.item"


class KVCacheRecords(BaseModel):
    text_memories: list[str] = []
    composed_text_memory: str = ""
    timestamp: datetime.datetime = Field(default_factory=lambda: datetime.datetime(2025, 5, 6, 7, 8, 9))


class KVCacheItem(BaseModel):
    """MemOS's item: its fields, and its module's name."""

    model_config = {"arbitrary_types_allowed": True}
    id: str
    memory: Any = None
    metadata: dict[str, Any] = {}
    records: KVCacheRecords = Field(default_factory=KVCacheRecords)


@pytest.fixture(autouse=True)
def memos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for MemOS's modules, which `pickle.dump` looks up."""
    module = types.ModuleType(MODULE)
    for cls in (KVCacheItem, KVCacheRecords):
        monkeypatch.setattr(cls, "__module__", MODULE)
        setattr(module, cls.__name__, cls)
    for name in ("memos", "memos.memories", "memos.memories.activation"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, MODULE, module)


def written(id: str = "an id", seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> KVCacheItem:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers_of(random_item(seed=seed, dtype=dtype).memory)):
        cache.update(keys, values, index)
    now = datetime.datetime(2025, 1, 2, tzinfo=datetime.timezone.utc)
    return KVCacheItem(
        id=id,
        memory=cache,
        metadata={"source_text": "some text", "extracted_at": now, "tags": ("a", "b"), "nested": {"n": 1}},
        records=KVCacheRecords(text_memories=["some text"], composed_text_memory="some text"),
    )


def dump(path: Path, content: object, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path
