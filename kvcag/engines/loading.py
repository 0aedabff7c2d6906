"""A model that is loaded when it is first needed, once for all who ask for the same one."""

from __future__ import annotations

import json
import threading
from typing import Any
from weakref import WeakValueDictionary

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from kvcag.engines.hf import HUB_ARGUMENTS, HFEngine


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
        hub = {name: self._settings[name] for name in HUB_ARGUMENTS if name in self._settings}
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
            hub = {name: self._settings[name] for name in HUB_ARGUMENTS if name in self._settings}
            self._tokenizer = AutoTokenizer.from_pretrained(self.model, **hub)
        return self._tokenizer


_lazy: WeakValueDictionary[str, LazyEngine] = WeakValueDictionary()
_lock = threading.Lock()
