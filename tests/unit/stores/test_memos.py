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


def test_what_is_read_can_be_written_in_our_format(tmp_path: Path) -> None:
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
    with pytest.raises(FormatError, match="not one of a KVCacheMemory"):
        read_memos_pickle(dump(tmp_path / "other", content))


def test_what_is_no_pickle_is_named(tmp_path: Path) -> None:
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
            read_memos_pickle(file)  # a flip in a tensor's values: pickles have no checksums
        except (FormatError, CorruptItemError):
            assert True
