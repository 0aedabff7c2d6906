"""Reads dumps of MemOS without running code from them.

A pickle is a program that names functions and calls them. This reader interprets the program without calling anything:
names stay names, calls and objects become inert records, and containers become lists. Tensors, dates and caches are
made from the records afterwards. So a refused file has no effect on the process, and reading takes time and memory in
proportion to the file. No code of MemOS, and no code of transformers' caches, runs.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import math
import mmap
import os
import pickletools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from transformers import DynamicCache

from kvcag.cache.layers import LayerKV, cache_of
from kvcag.core import KVCacheItem
from kvcag.errors import CorruptItemError, FormatError, TokenMismatchError, UnsafePickleError
from kvcag.fingerprint import KVCacheRecords, ModelFingerprint
from kvcag.stores.files import unavailable


@dataclass(frozen=True, slots=True)
class MemosItem:
    """An item of MemOS's KVCacheMemory. MemOS does not store its token ids or its model.

    Attributes:
        id: the item's id.
        memory: the keys and values, `(1, kv_heads, seq_len, head_dim)` per layer. Positions begin at 0.
        records: the texts that the item was made from. The safest way to import an item is to encode them again.
        metadata: the item's metadata, with dates as ISO strings.
    """

    id: str
    memory: DynamicCache
    records: KVCacheRecords
    metadata: dict[str, Any]

    def to_item(self, token_ids: Sequence[int], fingerprint: ModelFingerprint) -> KVCacheItem:
        """Convert to a kvcag item. The caller must know the tokens and the model.

        Args:
            token_ids: the token ids that the item was made from.
            fingerprint: the model that made the item.

        Raises:
            TokenMismatchError: the number of tokens differs. Different tokens of the same number are not detected.
        """
        length = self.memory.get_seq_length()
        if length != len(token_ids):
            raise TokenMismatchError(
                f"item {self.id!r} has {length} tokens, not {len(token_ids)}: it was made from another text or with "
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
        UnsafePickleError: the file names a function that no such dump needs. The function was not called.
        FormatError: the file is not a pickle, or not the pickle of a KVCacheMemory.
        CorruptItemError: the file was truncated or changed, or asks for more work than its size explains.
        StoreUnavailableError: the file does not exist, or cannot be read.
    """
    name = os.fspath(path)
    with unavailable(path), open(path, "rb") as file, _understood(name):
        if file.peek(1)[:1] != b"\x80":
            raise FormatError(f"{name} is not a pickle. Pass a file that MemOS's KVCacheMemory.dump wrote.")
        # Reading a mapping cannot allocate more than the file has.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            items = _items(_Pickle(mapped, name).load(), name)
            values = _Values(len(mapped))
        return [_item(each, values) for each in items]


# --- a pickle as inert records -------------------------------------------------------------------------------------


class _Dict(list[Any]):
    """A dict as a list of alternating keys and values: hashing keys that an attacker chose can take quadratic time."""

    def get(self, key: str) -> Any:
        """The last value of a key; None if the key is missing."""
        return next((value for name, value in zip(self[-2::-2], self[::-2], strict=True) if name == key), None)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A name that the pickle uses, and the arguments of its call; None for a name that is not called."""

    name: str
    args: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class _Object:
    """An object of MemOS or transformers, as its pickled fields."""

    fields: _Dict = field(default_factory=_Dict)

    def set_state(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):  # (__dict__, __slots__)
            if isinstance(part, _Dict):
                nested = part.get("__dict__")  # pydantic nests its fields
                self.fields.extend(nested if isinstance(nested, _Dict) else part)


_OBJECTS = {
    "transformers.cache_utils.DynamicCache",
    "transformers.cache_utils.DynamicLayer",
    *(
        f"memos.memories.activation.{module}.{name}"
        for module in ("item", "kv")
        for name in ("KVCacheItem", "KVCacheRecords", "ActivationMemoryItem")
    ),
}
_DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
_NAMES = {*_OBJECTS, *_DTYPES} | {
    *("torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes", "torch.device", "torch.Size"),
    *("collections.OrderedDict", "builtins.set", "builtins.frozenset", "builtins.object", "copyreg._reconstructor"),
    *("_codecs.encode", "datetime.datetime", "datetime.timedelta", "datetime.timezone"),
}
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # the names in protocols below 3

_MOST_STEPS = 2_000_000
"""The maximum number of instructions of a file. Each makes at most one small object in addition to the file's data."""


class _Pickle:
    """Interprets the pickles of a file one after another. Refuses every name that is not in `names`."""

    def __init__(self, file: Any, name: str, names: Collection[str] = _NAMES) -> None:
        self.file, self.name, self.names, self.steps = file, name, names, 0

    def load(self) -> Any:
        """The next pickle's value: plain values, lists, tuples and the records above."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def marked() -> list[Any]:
            start = marks.pop()
            taken = stack[start:]
            del stack[start:]
            return taken

        def add(values: list[Any], kind: type[list[Any]]) -> None:
            if type(stack[-1]) is not kind or (kind is _Dict and len(values) % 2):
                raise TypeError(f"it adds to a {type(stack[-1]).__name__}")
            stack[-1].extend(values)

        argument: Any
        for opcode, argument, _ in pickletools.genops(self.file):
            self.steps += 1
            if self.steps > _MOST_STEPS:
                raise ValueError(f"it has more than {_MOST_STEPS:,} instructions")
            match opcode.name:
                case "STOP":
                    return stack.pop()
                case "PROTO" | "FRAME":
                    pass
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "EMPTY_LIST" | "EMPTY_SET":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append(_Dict())
                case "MARK":
                    marks.append(len(stack))
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    marked()
                case "LIST" | "FROZENSET":
                    stack.append(marked())
                case "DICT":
                    stack.append(_Dict(marked()))
                case "TUPLE":
                    stack.append(tuple(marked()))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as made:
                    stack[-int(made[-1]) :] = [tuple(stack[-int(made[-1]) :])]
                case "APPEND":
                    add([stack.pop()], list)
                case "APPENDS" | "ADDITEMS":
                    add(marked(), list)
                case "SETITEM":
                    add([stack.pop(), stack.pop()][::-1], _Dict)
                case "SETITEMS":
                    add(marked(), _Dict)
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(self._named(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    stack.append(self._named(*[stack.pop(), stack.pop()][::-1]))
                case "REDUCE" | "NEWOBJ":
                    args, called = stack.pop(), stack.pop()
                    if not isinstance(called, _Call) or called.args is not None or not isinstance(args, tuple):
                        raise TypeError(f"it calls a {type(called).__name__}")
                    stack.append(_called(called.name, args))
                case "BUILD":
                    state = stack.pop()
                    if not isinstance(stack[-1], _Object):
                        raise TypeError(f"it sets the state of a {type(stack[-1]).__name__}")
                    stack[-1].set_state(state)
                case "BINPERSID":
                    if self.names is not _STORAGES:
                        raise UnsafePickleError(
                            f"{self.name} refers to an outside object, which no dump does. Encode the texts again."
                        )
                    stack.append(_Call("storage", stack.pop()))
                case literal if literal in _LITERALS:
                    stack.append(argument)
                case other:
                    raise ValueError(f"it uses {other}, which no dump needs")
        raise EOFError("it has no end")

    def _named(self, module: Any, name: Any) -> _Call:
        full = f"{_PYTHON_2.get(module, module)}.{name}" if isinstance(module, str) else str(type(module))
        if full not in self.names:
            raise UnsafePickleError(
                f"{self.name} uses {full}, which no dump of a KVCacheMemory needs. It was not called. Do not unpickle "
                "this file by other means; encode the texts again from their source."
            )
        return _Call(full)


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


def _called(name: str, args: tuple[Any, ...]) -> Any:
    """The container or object that a call makes; a record of any other call."""
    match name, args:
        case "copyreg._reconstructor", (_Call(name=cls, args=None), *_) if cls in _OBJECTS:
            return _Object()
        case "collections.OrderedDict", ():
            return _Dict()
        case (("builtins.set" | "builtins.frozenset"), ([*values],)):
            return list(values)
        case "torch.Size", (tuple() as size,):
            return size
        case "_codecs.encode", (str() as text, "latin1"):  # bytes, in protocols below 3
            return text.encode("latin1")
    return _Object() if name in _OBJECTS else _Call(name, args)


# --- records as values ---------------------------------------------------------------------------------------------


class _Values:
    """Makes tensors and JSON values from the records of one file.

    A record may be used in several places, so a short file can describe more than fits into memory. Therefore at most
    `MOST` values are made, and tensors of at most the file's size.
    """

    MOST = 1_000_000

    def __init__(self, file_bytes: int) -> None:
        self.left, self.bytes_left = self.MOST, file_bytes
        self.storages: dict[int, torch.Tensor] = {}  # by the id() of their bytes, which the records keep alive

    def plain(self, value: Any) -> Any:
        """Convert to a JSON value. A value that JSON does not have becomes a str."""
        self.left -= 1 + (len(value) // 64 if isinstance(value, str | bytes) else 0)
        if self.left < 0:
            raise ValueError(f"its texts and metadata have more than {self.MOST:,} values")
        match value:
            case _Dict():
                keys = (key if isinstance(key, str | int | float | None) else "object" for key in value[::2])
                return {str(key): self.plain(each) for key, each in zip(keys, value[1::2], strict=True)}
            case list() | tuple():
                return [self.plain(each) for each in value]
            case _Call():
                return str(_date(value) or value.name)
            case str() | int() | float() | None:
                return value
        return str(value) if isinstance(value, bytes) else "object"

    def tensor(self, value: Any) -> torch.Tensor | None:
        """A copy of the tensor that a call of `_rebuild_tensor_v2` describes; None for any other value."""
        match value:
            case _Call(
                name="torch._utils._rebuild_tensor_v2", args=(_Call(args=(bytes() as data,)), offset, size, stride, *_)
            ):
                numbers = (offset, *size, *stride)
                if not all(isinstance(each, int) and each >= 0 for each in numbers):
                    raise ValueError("the sizes of a tensor are not whole numbers")
                flat = self.storages[id(data)] if id(data) in self.storages else _storage(data)
                self.storages[id(data)] = flat
                self.bytes_left -= math.prod(size) * flat.itemsize
                if self.bytes_left < 0:
                    raise ValueError("its tensors are larger than the file")
                return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)
        return None


def _storage(data: bytes) -> torch.Tensor:
    """The values of a pickled storage, in torch's format before archives: five pickles, then the values."""
    file = io.BytesIO(data)
    pickles = _Pickle(file, "a storage", _STORAGES)
    _magic, _protocol, _system, described, _keys = (pickles.load() for _ in range(5))
    match described:
        case _Call(name="storage", args=("storage", _Call(name=kind), _, _, int() as count, *_)):
            values = data[file.tell() + 8 :]  # the values follow their number, which takes 8 bytes
            if len(values) != count * _STORAGES[kind].itemsize:
                raise ValueError("the length of a storage differs from its description")
            return torch.frombuffer(bytearray(values or 8), dtype=_STORAGES[kind])[:count]
    raise ValueError("a storage is not described")


def _date(call: _Call) -> datetime.datetime | None:
    """The date that a call of `datetime` would make; None for other calls."""
    unpacked: Callable[..., datetime.datetime] = datetime.datetime  # its stubs do not declare the pickled form
    match call:
        case _Call(name="datetime.datetime", args=(bytes() as packed,)):
            return unpacked(packed)
        case _Call(
            name="datetime.datetime",
            args=(
                bytes() as packed,
                _Call(
                    name="datetime.timezone",
                    args=(_Call(name="datetime.timedelta", args=(int(), int(), int()) as offset),),
                ),
            ),
        ):
            zone = datetime.timezone(datetime.timedelta(*offset))
            return unpacked(packed, zone)
    return None


@contextlib.contextmanager
def _understood(name: str) -> Iterator[None]:
    """Turn every error of the interpretation into a `CorruptItemError`: such a file is damaged."""
    try:
        yield
    except (FormatError, CorruptItemError, OSError):
        raise
    except Exception as error:
        raise CorruptItemError(name, f"it cannot be unpickled ({type(error).__name__}: {error})") from error


def _items(dumped: Any, name: str) -> list[_Object]:
    held = dumped.get("kv_cache_memories") if isinstance(dumped, _Dict) else dumped
    items = held[1::2] if isinstance(held, _Dict) else held
    if not isinstance(items, list) or not all(isinstance(item, _Object) for item in items):
        raise FormatError(
            f"{name} is a pickle, but not of a KVCacheMemory: it has no kv_cache_memories. Pass a file that MemOS's "
            "KVCacheMemory.dump wrote."
        )
    return items


def _item(record: _Object, values: _Values) -> MemosItem:
    fields = record.fields
    records, memory, id = fields.get("records"), fields.get("memory"), fields.get("id")
    try:
        if not isinstance(id, str) or not isinstance(memory, _Object):
            raise TypeError("it has no id or no cache")
        return MemosItem(
            id=id,
            memory=cache_of(_layers(memory.fields, values)),
            records=_records(records.fields, values) if isinstance(records, _Object) else KVCacheRecords(),
            metadata=values.plain(fields.get("metadata") or _Dict()),
        )
    except (AttributeError, TypeError, ValidationError) as error:
        raise FormatError(f"item {id!r:.80} is not a KVCacheItem of MemOS: {error!r}") from error


def _records(fields: _Dict, values: _Values) -> KVCacheRecords:
    when = fields.get("timestamp")
    made = {**values.plain(fields), "timestamp": _date(when) if isinstance(when, _Call) else None}
    return KVCacheRecords.model_validate({key: value for key, value in made.items() if value is not None})


def _layers(cache: _Dict, values: _Values) -> list[LayerKV]:
    """The keys and values of a DynamicCache of transformers 5, or of an early transformers 4 without `layers`."""
    layers = cache.get("layers")
    if layers is not None:
        pairs = [(layer.fields.get("keys"), layer.fields.get("values")) for layer in layers]
    else:
        pairs = list(zip(cache.get("key_cache"), cache.get("value_cache"), strict=True))
    tensors = [(values.tensor(k), values.tensor(v)) for k, v in pairs]
    kept = [(k, v) for k, v in tensors if k is not None and v is not None and k.ndim == v.ndim == 4]
    if len({(keys.shape[-2], states.shape[-2]) for keys, states in kept}) > 1:
        raise TypeError("its layers differ in length")
    return kept
