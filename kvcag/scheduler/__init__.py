"""CacheScheduler: encodes hot texts ahead of questions and keeps a memory's caches within a byte budget."""

from kvcag.scheduler.scheduler import CacheScheduler, PassReport
from kvcag.scheduler.store import Policy, gdsf
from kvcag.scheduler.texts import TextStats, read_texts

__all__ = ["CacheScheduler", "PassReport", "Policy", "TextStats", "gdsf", "read_texts"]
