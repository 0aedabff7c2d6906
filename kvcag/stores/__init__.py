"""Where items live: in memory, on disk, in a remote, and in tiers of these."""

from kvcag.stores.base import KVStore, StoreStats
from kvcag.stores.disk import DiskStore
from kvcag.stores.format import Manifest, read_item, read_manifest, write_item
from kvcag.stores.memory import MemoryStore
from kvcag.stores.remote import ByteKVStore, FsspecStore
from kvcag.stores.tiered import StoreWarning, TieredStore
from kvcag.stores.verify import VerifyReport, verify

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
