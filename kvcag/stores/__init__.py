"""Stores hold items: in memory, on disk, in a remote, or in tiers of several stores."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvcag.stores.base import KVStore, StoreStats
from kvcag.stores.disk import DiskStore
from kvcag.stores.files import Manifest, read_manifest
from kvcag.stores.remote import ByteKVStore, FsspecStore
from kvcag.stores.verify import VerifyReport, verify

if TYPE_CHECKING:
    from kvcag.stores.format import read_item as read_item
    from kvcag.stores.format import write_item as write_item
    from kvcag.stores.memory import MemoryStore as MemoryStore
    from kvcag.stores.tiered import StoreWarning as StoreWarning
    from kvcag.stores.tiered import TieredStore as TieredStore

_HOMES = {
    "MemoryStore": "kvcag.stores.memory",
    "StoreWarning": "kvcag.stores.tiered",
    "TieredStore": "kvcag.stores.tiered",
    "read_item": "kvcag.stores.format",
    "write_item": "kvcag.stores.format",
}
"""Names whose modules import torch. They are imported on first use, since listing a store does not need torch."""

__all__ = [
    "ByteKVStore",
    "DiskStore",
    "FsspecStore",
    "KVStore",
    "Manifest",
    "MemoryStore",
    "StoreStats",
    "StoreWarning",
    "TieredStore",
    "VerifyReport",
    "read_item",
    "read_manifest",
    "verify",
    "write_item",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvcag.stores' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value
