"""Reads dumps of MemOS without running code from them.

A pickle names functions to call. The unpickler here finds only a dozen, which build tensors, dates and plain
containers. Objects of MemOS's and transformers' classes become inert records: neither package has to be installed, and
none of their code runs. Every other name is refused.
"""

from __future__ import annotations

import collections
import contextlib
import copyreg
import datetime
import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch._utils import _rebuild_tensor_v2
from transformers import DynamicCache

from kvcag.cache.layers import LayerKV, cache_of, contiguous_copy
from kvcag.core import KVCacheItem, KVCacheRecords
from kvcag.errors import CorruptItemError, FormatError, TokenMismatchError, UnsafePickleError
from kvcag.fingerprint import ModelFingerprint
from kvcag.stores.files import unavailable


@dataclass(frozen=True, slots=True)
class MemosItem:
    """An item of MemOS's KVCacheMemory. It does not hold its token ids or its model.

    Attributes:
        id: the item's id.
        memory: its keys and values, `(1, kv_heads, seq_len, head_dim)` per layer. Positions begin at 0.
        records: the texts it was made from. The safest way to import an item is to encode these again.
        metadata: its metadata, with dates as ISO strings.
    """

    id: str
    memory: DynamicCache
    records: KVCacheRecords
    metadata: dict[str, Any]

    def to_item(self, token_ids: Sequence[int], fingerprint: ModelFingerprint) -> KVCacheItem:
        """A kvcag item, for a caller who knows the tokens and the model.

        Args:
            token_ids: the tokens that the item was made from.
            fingerprint: the model that made it.

        Raises:
            TokenMismatchError: the number of tokens differs. Whether the tokens are the same cannot be checked.
        """
        length = self.memory.get_seq_length()
        if length != len(token_ids):
            raise TokenMismatchError(
                f"item {self.id!r} holds {length} tokens, not {len(token_ids)}: it was made from another text or with "
                "another template. Encode its text again."
            )
        return KVCacheItem(
            id=self.id,
            memory=self.memory,
            records=self.records,
            metadata=self.metadata,
            token_ids=torch.tensor(token_ids, dtype=torch.long),
            fingerprint=fingerprint,
        )


def read_memos_pickle(path: str | os.PathLike[str]) -> list[MemosItem]:
    """The items of a file that MemOS's `KVCacheMemory.dump` wrote, in either of its layouts.

    Raises:
        UnsafePickleError: the file names a function that no such dump needs. It was not called.
        FormatError: it is not a pickle, or not one of a KVCacheMemory.
        CorruptItemError: it was cut or changed.
        StoreUnavailableError: it does not exist, or cannot be read.
    """
    name = os.fspath(path)
    with unavailable(path), open(path, "rb") as file, _understood(name):
        if file.peek(1)[:1] != b"\x80":
            raise FormatError(f"{name} is not a pickle. Give the file that MemOS's KVCacheMemory.dump wrote.")
        dumped = _Unpickler(file, name).load()
        return [_item(each) for each in _items(dumped, name)]


class _Record:
    """The pickled fields of an object of another library, without its code."""

    fields: dict[str, Any]

    def __new__(cls, *args: object) -> _Record:  # a pickle creates objects without __init__
        made = super().__new__(cls)
        made.fields = {}
        return made

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, __slots__)
            state = {**(state[0] or {}), **(state[1] or {})}
        fields = state.get("__dict__", state)  # pydantic nests its fields
        self.fields.update(fields)


def _storage(data: bytes) -> Any:
    """Stands for `torch.storage._load_from_bytes`, which would unpickle any object."""
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for `_codecs.encode`, with which old pickles hold bytes."""
    if encoding != "latin1":
        raise ValueError(f"it uses the codec {encoding!r}, not latin1")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch", "device"): torch.device,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "object"): object,
    ("copyreg", "_reconstructor"): copyreg._reconstructor,  # type: ignore[attr-defined]
    ("_codecs", "encode"): _latin1,
    ("datetime", "datetime"): datetime.datetime,
    ("datetime", "timedelta"): datetime.timedelta,
    ("datetime", "timezone"): datetime.timezone,
}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # the names in protocols below 3
_RECORDS = {
    "transformers.cache_utils": {"DynamicCache", "DynamicLayer"},
    "memos.memories.activation.item": {"KVCacheItem", "KVCacheRecords", "ActivationMemoryItem"},
    "memos.memories.activation.kv": {"KVCacheItem", "KVCacheRecords", "ActivationMemoryItem"},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader, name: str) -> None:
        super().__init__(file)
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        """The function, class or dtype of this name, if a dump needs it."""
        module = _PYTHON_2.get(module, module)
        if name in _RECORDS.get(module, ()):
            return _Record
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafePickleError(
            f"{self.name} uses {module}.{name}, which no dump of a KVCacheMemory needs. It was not called. Do not "
            "unpickle this file by other means; encode the texts again from their source."
        )

    def persistent_load(self, pid: Any) -> Any:
        """Refuses objects outside the pickle, as in archives of torch.save. A dump has none."""
        raise UnsafePickleError(
            f"{self.name} refers to the outside object {str(pid)[:80]!r}, and no dump does. Encode the texts again."
        )


@contextlib.contextmanager
def _understood(name: str) -> Iterator[None]:
    """Turn every error of the unpickler and of torch into a `CorruptItemError`: the file is damaged."""
    try:
        yield
    except (FormatError, CorruptItemError, OSError):
        raise
    except Exception as error:
        raise CorruptItemError(name, f"it cannot be unpickled ({type(error).__name__}: {error})") from error


def _items(dumped: Any, name: str) -> list[_Record]:
    kept = dumped.get("kv_cache_memories") if isinstance(dumped, Mapping) else dumped
    items = list(kept.values()) if isinstance(kept, Mapping) else kept
    if not isinstance(items, list) or not all(isinstance(item, _Record) for item in items):
        raise FormatError(f"{name} is a pickle, but not one of a KVCacheMemory: it has no kv_cache_memories.")
    return items


def _item(record: _Record) -> MemosItem:
    fields = record.fields
    records = fields.get("records")
    try:
        return MemosItem(
            id=str(fields["id"]),
            memory=cache_of(contiguous_copy(_layers(fields["memory"]))),
            records=KVCacheRecords.model_validate(records.fields if isinstance(records, _Record) else {}),
            metadata=_plain(fields.get("metadata") or {}),
        )
    except (KeyError, AttributeError, TypeError, ValidationError) as error:
        raise FormatError(f"item {fields.get('id')!r} is not a KVCacheItem of MemOS: {error!r}") from error


def _layers(cache: _Record) -> list[LayerKV]:
    """The keys and values of a DynamicCache of transformers 5, or of transformers 4 before it had layers."""
    if "layers" in cache.fields:
        pairs = [(layer.fields.get("keys"), layer.fields.get("values")) for layer in cache.fields["layers"]]
    else:
        pairs = list(zip(cache.fields["key_cache"], cache.fields["value_cache"], strict=True))
    kept = [(k, v) for k, v in pairs if isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor) and k.ndim == 4]
    if len({(keys.shape[-2], values.shape[-2]) for keys, values in kept}) > 1:
        raise TypeError("its layers differ in length")
    return kept


def _plain(value: Any) -> Any:
    """A JSON value. What JSON cannot hold becomes a str."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
