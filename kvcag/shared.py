"""What the chat objects of one process share: an engine for equal settings, and what it has encoded."""

from __future__ import annotations

import json
import threading
import warnings
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from kvcag.engines.base import Engine
from kvcag.engines.hf import HFEngine
from kvcag.fingerprint import ModelFingerprint
from kvcag.notices import CacheWarning
from kvcag.stores.base import KVStore
from kvcag.stores.disk import DiskStore
from kvcag.stores.memory import MemoryStore

DEFAULT_STORE_BYTES = 4 << 30


class LazyEngine:
    """A model that is loaded when it is first needed, once for all who ask for the same one: see `of`.

    Args:
        model: a hub id or a folder.
        settings: further arguments of `HFEngine.from_pretrained`.
    """

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        self.model = model
        self._settings = settings
        self._loading = threading.Lock()
        self._engine: HFEngine | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def of(cls, model: str, **settings: Any) -> LazyEngine:
        """The same object for the same settings, as long as anyone holds it. Loads nothing."""
        key = json.dumps([model, settings], sort_keys=True, default=repr)
        with _lock:
            found = _lazy.get(key)
            if found is None:
                found = _lazy[key] = cls(model, settings)
            return found

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._engine is not None

    def engine(self) -> HFEngine:
        """The engine; loads it at the first call."""
        with self._loading:
            if self._engine is None:
                self._engine = HFEngine.from_pretrained(self.model, **self._settings)
            return self._engine

    def context_length(self) -> int | None:
        """The most tokens that the model attends to; None where its configuration is not on this machine yet."""
        if self._engine is not None:
            return self._engine.context_length
        hub = {name: self._settings[name] for name in _HUB & self._settings.keys()}
        try:
            config = AutoConfig.from_pretrained(self.model, **{**hub, "local_files_only": True})
        except OSError:
            return None
        length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        return None if length is None else int(length)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, without loading the weights."""
        if self._engine is not None:
            return self._engine.tokenizer
        if self._tokenizer is None:
            hub = {name: self._settings[name] for name in _HUB & self._settings.keys()}
            self._tokenizer = AutoTokenizer.from_pretrained(self.model, **hub)
        return self._tokenizer


def open_store(store: KVStore | str | PathLike[str] | None, engine: Engine, tenant: str = "") -> KVStore:
    """A store as it is; a `DiskStore` at a path; for None one in memory, for all of a tenant's over this engine.

    The one in memory holds `DEFAULT_STORE_BYTES` and forgets what was not used for longest; pass a `MemoryStore` for
    another budget.
    """
    if isinstance(store, KVStore):
        return store
    if store is not None:
        return DiskStore(Path(store), namespace=tenant)
    with _lock:
        return _stores.setdefault(engine, {}).setdefault(tenant, MemoryStore(DEFAULT_STORE_BYTES))


def warn_if_foreign(store: KVStore, fingerprint: ModelFingerprint) -> None:
    """Warn if what a store holds was made by another model: it will stay as it is and not be used.

    Looks at a few items, and is silent where one of them fits: models may share a store.
    """
    manifests = (store.manifest(key) for key in islice(store.keys(), _SAMPLE))
    made_by = [manifest.fingerprint for manifest in manifests if manifest and manifest.fingerprint]
    if made_by and not any(fingerprint.matches(other) for other in made_by):
        warnings.warn(
            f"the store's items were made by another model ({'; '.join(fingerprint.differences(made_by[0]))}). They "
            "stay as they are and are not used. Give each model a store of its own, or load the model that made them.",
            CacheWarning,
            stacklevel=3,
        )


_SAMPLE = 8
_HUB = {"revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder"}
_lazy: WeakValueDictionary[str, LazyEngine] = WeakValueDictionary()
_stores: WeakKeyDictionary[Engine, dict[str, MemoryStore]] = WeakKeyDictionary()
_lock = threading.Lock()
