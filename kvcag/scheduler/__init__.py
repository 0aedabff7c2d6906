"""Which caches are kept, and which are made before anybody asks: see `CacheScheduler`."""

from kvcag.scheduler.log import CacheEntry, LogEntry, caches_of, log_of
from kvcag.scheduler.metrics import SchedulerMetrics
from kvcag.scheduler.policy import GDSF, LFU, LRU, Policy, Use
from kvcag.scheduler.scheduler import CacheScheduler, PassReport

__all__ = [
    "GDSF",
    "LFU",
    "LRU",
    "CacheEntry",
    "CacheScheduler",
    "LogEntry",
    "PassReport",
    "Policy",
    "SchedulerMetrics",
    "Use",
    "caches_of",
    "log_of",
]
