"""Where items live: in memory, on disk, elsewhere, and in tiers of these."""

from kvcag.stores.base import KVStore, StoreStats
from kvcag.stores.bytestore import ByteKVStore
from kvcag.stores.disk import DiskStore
from kvcag.stores.format import Manifest, read_item, read_manifest, write_item
from kvcag.stores.memory import MemoryStore
from kvcag.stores.planner import LoadSpeed, Plan, Planner, measure, measure_load
from kvcag.stores.remote import FsspecStore
from kvcag.stores.tiered import StoreWarning, TieredStore
from kvcag.stores.verification import VerifyReport, verify

__all__ = [
    "ByteKVStore",
    "DiskStore",
    "FsspecStore",
    "KVStore",
    "LoadSpeed",
    "Manifest",
    "MemoryStore",
    "Plan",
    "Planner",
    "StoreStats",
    "StoreWarning",
    "TieredStore",
    "VerifyReport",
    "measure",
    "measure_load",
    "read_item",
    "read_manifest",
    "verify",
    "write_item",
]
