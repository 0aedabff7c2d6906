from __future__ import annotations

import copy
import datetime
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcag.cache.layers import layers_of
from kvcag.errors import CorruptItemError, FormatError, StoreError, TokenMismatchError, UnsafePickleError
from kvcag.stores.format import read_item, write_item
from kvcag.stores.memos import read_memos_pickle
from tests.memos_pickles import MODULE, dump, written
from tests.memos_pickles import memos as memos  # the fixture
from tests.stored import FINGERPRINT, random_item


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dump_is_read_without_memos(tmp_path: Path, protocol: int, dtype: torch.dtype) -> None:
    items = {"an id": written(dtype=dtype), "other": written("other", 1, dtype)}
    file = dump(tmp_path / "dump.pickle", {"kv_cache_memories": items}, protocol)
    del sys.modules[MODULE]

    read = read_memos_pickle(file)

    assert [item.id for item in read] == ["an id", "other"]
    for seed, item in enumerate(read):
        for ours, theirs in zip(
            layers_of(item.memory), layers_of(random_item(seed=seed, dtype=dtype).memory), strict=True
        ):
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
        assert item.records.text_memories == ["some text"]
        assert item.records.timestamp == datetime.datetime(2025, 5, 6, 7, 8, 9)
        assert item.metadata == {
            "source_text": "some text",
            "extracted_at": "2025-01-02 00:00:00+00:00",
            "tags": ["a", "b"],
            "nested": {"n": 1},
        }


def test_the_older_layout_a_list_is_read(tmp_path: Path) -> None:
    assert [item.id for item in read_memos_pickle(dump(tmp_path / "old", [written("a"), written("b")]))] == ["a", "b"]


def test_a_cache_of_transformers_before_layers_is_read(tmp_path: Path) -> None:
    old = written()
    layers = layers_of(old.memory)
    old.memory = copy.copy(old.memory)
    old.memory.__dict__.clear()
    old.memory.__dict__.update(key_cache=[k for k, _ in layers], value_cache=[v for _, v in layers], _seen_tokens=10)
    (item,) = read_memos_pickle(dump(tmp_path / "old", {"kv_cache_memories": {"a": old}}))
    assert torch.equal(layers_of(item.memory)[2][1], layers[2][1])


def test_an_imported_item_can_be_written_in_our_format(tmp_path: Path) -> None:
    (item,) = read_memos_pickle(dump(tmp_path / "dump", [written()]))
    write_item(tmp_path / "ours", item.to_item(range(10), FINGERPRINT))

    ours = read_item(tmp_path / "ours", expected=FINGERPRINT)
    assert ours.token_ids.tolist() == list(range(10))
    with pytest.raises(TokenMismatchError, match="10 tokens, not 9"):
        item.to_item(range(9), FINGERPRINT)


# --- what must not run ------------------------------------------------------------------------------------------


class Runs:
    """A pickle that calls a function with arguments when it is loaded."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.system, "system"),
        (subprocess.Popen, "subprocess.Popen"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (__import__, "builtins.__import__"),
        (torch.load, "torch.*load"),
        (pickle.loads, "pickle.*loads"),
        (torch.hub.load, "torch.hub.load"),
    ],
)
@pytest.mark.parametrize("where", ["alone", "in metadata", "in a tensor's bytes"])
def test_a_pickle_that_tries_to_run_code_is_refused_by_name(
    tmp_path: Path, function: object, named: str, where: str
) -> None:
    proof = tmp_path / "it ran"
    bad: object = Runs(function, f"touch '{proof}'")
    if where == "in metadata":
        item = written()
        item.metadata["x"] = bad
        bad = {"kv_cache_memories": {"a": item}}
    elif where == "in a tensor's bytes":
        bad = [Runs(torch.storage._load_from_bytes, pickle.dumps(bad))]
    file = dump(tmp_path / "bad", bad)

    refusal = StoreError if where == "in a tensor's bytes" else UnsafePickleError
    with pytest.raises(refusal, match=None if refusal is StoreError else named) as raised:
        read_memos_pickle(file)
    assert str(file) in str(raised.value)
    assert not proof.exists()


def test_the_proof_would_have_shown(tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Runs(os.system, f"touch '{proof}'")))
    assert proof.exists()


def test_persistent_objects_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\x80\x04\x8c\x03abcQ.")
    with pytest.raises(UnsafePickleError, match="outside"):
        read_memos_pickle(tmp_path / "bad")


@pytest.mark.parametrize("content", [{"something": 1}, 7, ["text"], {"kv_cache_memories": [1]}])
def test_another_pickle_is_not_a_dump(tmp_path: Path, content: object) -> None:
    with pytest.raises(FormatError, match="not of a KVCacheMemory"):
        read_memos_pickle(dump(tmp_path / "other", content))


def test_a_file_that_is_not_a_pickle_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FormatError, match="not a pickle"):
        read_memos_pickle(tmp_path / "text")


def test_a_damaged_dump_never_crashes_the_reader(tmp_path: Path) -> None:
    sound = pickle.dumps([written()])
    random.seed(3)
    file = tmp_path / "damaged"
    for _ in range(300):
        at = random.randrange(2, len(sound))
        cut = random.random() < 0.3
        file.write_bytes(sound[:at] if cut else sound[:at] + bytes([sound[at] ^ 0x55]) + sound[at + 1 :])
        try:
            read_memos_pickle(file)
        except (FormatError, CorruptItemError):
            continue
        assert not cut, at  # a flip in a tensor's values is not seen: pickles have no checksums


# --- what must not change anything, or take long -------------------------------------------------------------------


def pickled(*parts: bytes | str) -> bytes:
    """A pickle of protocol 4 of these parts; a str becomes `module name` of a global."""
    return (
        b"\x80\x04"
        + b"".join(
            part if isinstance(part, bytes) else b"c" + part.replace(" ", "\n").encode() + b"\n" for part in parts
        )
        + b"."
    )


TENSOR, DATE = "torch._utils _rebuild_tensor_v2", "datetime datetime"
SET_DEFAULTS = b"N}\x8c\x0c__defaults__K\x01\x85s\x86b"  # BUILD with (None, {"__defaults__": (1,)})


@pytest.mark.parametrize("function", [TENSOR, "torch.storage _load_from_bytes", "_codecs encode"])
def test_a_refused_pickle_changes_no_function_of_this_process(tmp_path: Path, function: str) -> None:
    """Regression: BUILD set the `__defaults__` of `_rebuild_tensor_v2`, which changed torch.load in this process."""
    before = torch._utils._rebuild_tensor_v2.__defaults__, dict(vars(torch._utils._rebuild_tensor_v2))
    (tmp_path / "bad").write_bytes(pickled(function, SET_DEFAULTS))
    with pytest.raises(StoreError):
        read_memos_pickle(tmp_path / "bad")
    after = torch._utils._rebuild_tensor_v2.__defaults__, dict(vars(torch._utils._rebuild_tensor_v2))
    torch._utils._rebuild_tensor_v2.__defaults__ = before[0]  # for the tests after this one
    assert after == before


def item_with(metadata: bytes) -> bytes:
    """A dump of one item without layers, with this metadata."""
    cls = "memos.memories.activation.item KVCacheItem"
    cache = b"ctransformers.cache_utils\nDynamicCache\n)\x81}\x8c\x06layers]sb"
    fields = b"}(\x8c\x02id\x8c\x01a\x8c\x06memory" + cache + b"\x8c\x08metadata}\x8c\x01m" + metadata + b"su"
    return pickled(b"]", cls, b")\x81", fields, b"ba")


def colliding() -> bytes:
    """A dict of 100,000 whole numbers that have one hash."""
    packed = [pickle.encode_long(number * sys.hash_info.modulus) for number in range(1, 100_000)]
    return b"}(" + b"".join(b"\x8a" + bytes([len(number)]) + number + b"N" for number in packed) + b"u"


BOMBS = {
    "nine bytes that wanted 4.3 GB of memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "a bytearray that is longer than the file": pickled(b"\x96" + (1 << 33).to_bytes(8, "little")),
    "bytes that are longer than the file": pickled(b"\x8e" + (1 << 33).to_bytes(8, "little")),
    "lists of lists in metadata": item_with(b"]\x94" + b"".join(b"0](h%ch%ce\x94" % (n, n) for n in range(60))),
    "colliding keys in metadata": item_with(colliding()),
    "nested keys in metadata": item_with(b"N\x94" + b"".join(b"0}h%cNs\x94" % n for n in range(200))),
    "three million lists": pickled(b"]" * 3_000_000),
    "deep metadata": item_with(b"](" * 100_000 + b"e" * 100_000),
}


def test_a_small_file_takes_little_time_and_memory(tmp_path: Path) -> None:
    """Regression: nine bytes allocated 4.3 GB, and reading metadata took 25 s."""
    for name, bomb in BOMBS.items():
        (tmp_path / name).write_bytes(bomb)
    reader = (
        "import resource, sys, time\n"
        "from kvcag.errors import StoreError\n"
        "from kvcag.stores.memos import read_memos_pickle\n"
        "for name in sys.argv[1:]:\n"
        "    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()\n"
        "    try:\n        read_memos_pickle(name)\n"
        "    except StoreError:\n        pass\n"
        "    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, time.process_time() - began)\n"
    )
    command = [sys.executable, "-c", reader, *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    taken = {
        name: tuple(map(float, line.split()))
        for name, line in zip(sorted(BOMBS), done.stdout.splitlines(), strict=True)
    }
    assert len(taken) == len(BOMBS)
    assert all(megabytes < 500 and seconds < 10 for megabytes, seconds in taken.values()), taken


def test_a_tensor_that_repeats_its_values_is_no_larger_than_the_file(tmp_path: Path) -> None:
    item = written()
    item.memory.layers[0].keys = torch.zeros(1, 1, 1, 1).expand(1, 1 << 20, 10, 8)
    with pytest.raises(CorruptItemError, match="larger than the file"):
        read_memos_pickle(dump(tmp_path / "bomb", [item]))
