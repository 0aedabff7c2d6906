"""Items to store, what it means for two to be the same, damage to files, and a store of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from kvcag.cache.layers import cache_of, layers_of
from kvcag.core import KVCacheItem
from kvcag.fingerprint import KVCacheRecords, ModelFingerprint
from kvcag.stores.base import KVStore
from kvcag.stores.files import is_instruction
from kvcag.stores.memory import MemoryStore

FINGERPRINT = ModelFingerprint(
    model_name="tiny",
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    geometry="3x2x8",
    weights="a" * 64,
    tokenizer="b" * 64,
    template="c" * 64,
)
WHEN = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc)


def random_item(
    id: str = "an id",
    *,
    tokens: int = 10,
    layers: int = 3,
    heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    text: str = "some text",
    **fields: object,
) -> KVCacheItem:
    """An item of random keys and values; `seed` decides every one of them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, heads, tokens, head_dim)
    states = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2 * layers)]
    return KVCacheItem(
        id=id,
        memory=cache_of(zip(states[::2], states[1::2], strict=True)),
        token_ids=torch.randint(0, 50_000, (tokens,), generator=generator),
        fingerprint=FINGERPRINT,
        records=KVCacheRecords(text_memories=[text], composed_text_memory=text, timestamp=WHEN),
        **fields,
    )


def assert_same(read: KVCacheItem | None, written: KVCacheItem) -> None:
    """Equal in every field, and bitwise in every tensor."""
    assert read is not None
    assert read.model_dump(exclude={"memory", "token_ids"}) == written.model_dump(exclude={"memory", "token_ids"})
    assert torch.equal(read.token_ids, written.token_ids)
    ours, theirs = layers_of(read.memory), layers_of(written.memory)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def documents_in(store: KVStore) -> list[str]:
    """The ids of all items but instructions."""
    return [key for key in iter(store.keys()) if not is_instruction(key)]


def cut(path: Path) -> None:
    """Take the end off a file."""
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 0x10
    path.write_bytes(data)


class Bytes:
    """A store of bytes as LangChain's are, over a dict."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self.data.get(key) for key in keys]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        self.data.update(key_value_pairs)

    def mdelete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.data.pop(key, None)

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        yield from [key for key in self.data if key.startswith(prefix or "")]


class AskedStore(MemoryStore):
    """Remembers of how many items it was asked, one by one or several at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def contains(self, key: str) -> bool:
        self.asked.append(1)
        return super().contains(key)

    def containing(self, keys: Iterable[str]) -> set[str]:
        wanted = list(keys)
        self.asked.append(len(wanted))
        return {key for key in wanted if super(AskedStore, self).contains(key)}
