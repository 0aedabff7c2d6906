"""Load or encode? Whichever is sooner, from what was measured here."""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvcag.cache.layers import cache_of, layers_of, nbytes
from kvcag.core import KVCacheItem
from kvcag.errors import InvalidInputError
from kvcag.stores.base import KVStore

if TYPE_CHECKING:
    from kvcag.engines.hf import HFEngine

_SMALL, _LARGE = 4 << 10, 16 << 20
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class LoadSpeed:
    """How long a place takes to give an item: a latency in seconds, and bytes a second after it."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, size: int) -> float:
        """To load `size` bytes of keys and values."""
        return self.latency_s + size / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do for one item, and why: `load from disk: 12 ms, encoding 410 tokens takes 1640 ms`."""

    load: bool
    load_s: float
    encode_s: float
    reason: str


class Planner:
    """Decides, item by item, whether to load a cache or to encode its text again.

    Args:
        prefill_tokens_per_s: of the model, on its device.
        speeds: of each place, by its name.
    """

    def __init__(self, prefill_tokens_per_s: float, speeds: Mapping[str, LoadSpeed]) -> None:
        if not prefill_tokens_per_s > 0:
            raise InvalidInputError(f"prefill_tokens_per_s is {prefill_tokens_per_s}, and must be more than 0")
        self.prefill_tokens_per_s, self.speeds = prefill_tokens_per_s, dict(speeds)

    def plan(self, tokens: int, size: int, place: str) -> Plan:
        """For an item of so many tokens, whose keys and values take `size` bytes and lie in `place`.

        Raises:
            InvalidInputError: no speed of this place is known.
        """
        if place not in self.speeds:
            raise InvalidInputError(f"no speed is known of {place!r}, only of {sorted(self.speeds)}")
        load, encode = self.speeds[place].seconds(size), tokens / self.prefill_tokens_per_s
        chosen = f"load from {place}" if load <= encode else "encode"
        reason = f"{chosen}: loading takes {1000 * load:.1f} ms, encoding {tokens} tokens {1000 * encode:.1f} ms"
        return Plan(load <= encode, load, encode, reason)


def measure(engine: HFEngine, store: KVStore) -> Planner:
    """A planner for one engine and one store: prefill is timed over 512 tokens, loading in each of the store's places.

    Takes a second or so, and up to a few on a slow machine. Raises as `measure_load`.
    """
    length = min(512, engine.context_length)
    tokens = [next(iter(engine.eos_ids), 0)] * length
    taken = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        engine.encode_after((), tokens)
        taken.append(time.perf_counter() - begin)
    speeds = {name: measure_load(place) for name, place in store.places().items()}
    return Planner(length / statistics.median(taken), speeds)


def measure_load(store: KVStore) -> LoadSpeed:
    """Put a small and a large item into a store, take the time of reading every byte of them, and delete them.

    It takes 16 MiB and a second or so. A disk's page cache is warm for what was just written: a disk that is read
    after days is slower than this says.

    Raises:
        StoreError: the store failed, or has no room.
    """
    small, large = _probe(_SMALL), _probe(_LARGE)
    try:
        latency, seconds = _seconds_to_read(store, small), _seconds_to_read(store, large)
    finally:
        store.delete([small.id, large.id])
    more = max(seconds - latency, 1e-9)
    return LoadSpeed(latency, (_LARGE - _SMALL) / more)


def _probe(size: int) -> KVCacheItem:
    states = torch.zeros(1, 1, size // 4 // 64, 64, dtype=torch.bfloat16)
    ids = torch.zeros(states.shape[-2], dtype=torch.long)
    return KVCacheItem(id=f"kvcag-probe-{uuid.uuid4()}", memory=cache_of([(states, states)]), token_ids=ids)


def _seconds_to_read(store: KVStore, item: KVCacheItem) -> float:
    store.put(item)
    taken = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        read = store.get(item.id)
        for keys, values in layers_of(read.memory) if read is not None else []:
            keys.sum(), values.sum()
        taken.append(time.perf_counter() - begin)
    assert nbytes(layers_of(item.memory)) in (_SMALL, _LARGE)
    return statistics.median(taken)
