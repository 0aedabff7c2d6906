from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from kvcag.cache.layers import cache_of, layers_of
from kvcag.core import KVCacheItem
from kvcag.errors import (
    CorruptItemError,
    FingerprintMismatchError,
    FormatError,
    InvalidInputError,
    StoreError,
    StoreUnavailableError,
)
from kvcag.stores.files import atomic_write, read_id, read_manifest, read_sealed, seal, sealed
from kvcag.stores.format import item_from_bytes, item_to_bytes, read_item, write_item
from tests.stored import FINGERPRINT, assert_same, random_item

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "item.safetensors"
    write_item(path, random_item(metadata={"source": "a.txt"}))
    return path


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    id=st.text(),
    metadata=st.dictionaries(st.text(), JSON, max_size=4),
    shape=st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]),
)
def test_an_item_is_read_as_it_was_written(
    tmp_path: Path,
    id: str,
    metadata: dict[str, object],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> None:
    layers, heads, tokens, head_dim = shape
    tokens = tokens if layers else 0
    item = random_item(
        id,
        tokens=tokens,
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        metadata=metadata,
        base_position=7,
    )
    path = tmp_path / "item.safetensors"

    size = write_item(path, item)

    assert size == path.stat().st_size
    assert_same(read_item(path), item)
    assert_same(item_from_bytes(item_to_bytes(item), "here"), item)
    assert read_id(path) == id
    assert read_manifest(path).metadata == metadata


def test_any_safetensors_reader_opens_it(file: Path) -> None:
    item = random_item(metadata={"source": "a.txt"})
    with safe_open(file, framework="pt") as other:
        assert torch.equal(other.get_tensor("token_ids"), item.token_ids)
        for index, (keys, values) in enumerate(layers_of(item.memory)):
            assert torch.equal(other.get_tensor(f"layers.{index}.keys"), keys)
            assert torch.equal(other.get_tensor(f"layers.{index}.values"), values)
        assert json.loads(other.metadata()["kvcag.manifest"])["metadata"] == {"source": "a.txt"}


def test_views_and_shared_tensors_are_written_by_value(tmp_path: Path) -> None:
    whole = torch.randn(1, 2, 20, 8)
    view = whole[..., 5:15, :]
    item = random_item().model_copy(
        update={"memory": cache_of([(view, view), (whole[..., :10, :], whole[:, :1].expand(1, 2, 20, 8)[..., :10, :])])}
    )

    write_item(tmp_path / "item", item)

    assert_same(read_item(tmp_path / "item"), item)


def test_a_file_takes_at_most_one_percent_more_than_its_keys_and_values(tmp_path: Path) -> None:
    text = "word " * 100
    item = random_item(tokens=100, layers=30, heads=3, head_dim=64, text=text, metadata={"source_text": text})
    keys_and_values = 100 * 2 * 30 * 3 * 64 * 2

    assert write_item(tmp_path / "item", item) <= 1.01 * keys_and_values


def test_only_its_owner_may_read_it(file: Path) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_writing_into_a_read_item_changes_neither_the_file_nor_other_readers(file: Path) -> None:
    before, other = file.read_bytes(), read_item(file)
    for keys, values in layers_of(read_item(file).memory):
        keys.zero_()
        values.fill_(7)

    assert file.read_bytes() == before
    for reader in (other, read_item(file)):
        assert_same(reader, random_item(metadata={"source": "a.txt"}))


def test_an_open_item_outlives_its_file(file: Path) -> None:
    item = random_item(metadata={"source": "a.txt"})
    opened = read_item(file)
    write_item(file, random_item(seed=1))
    replaced = read_item(file)
    file.unlink()

    assert_same(opened, item)
    assert_same(replaced, random_item(seed=1))


def test_open_items_hold_no_descriptors(file: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    items = [read_item(file) for _ in range(50)]

    assert len(os.listdir("/dev/fd")) == before
    assert len(items) == 50


# --- refusals ---------------------------------------------------------------------------------------------------


def test_a_thousand_flips_and_cuts_are_all_detected_and_named(tmp_path: Path) -> None:
    sound = bytes(item_to_bytes(random_item(metadata={"source": "ü.txt", "pages": [1, 2]})))
    random.seed(7)
    path = tmp_path / "damaged.safetensors"
    for trial in range(1000):
        at = random.randrange(len(sound))
        if trial % 5 == 0:
            damaged = sound[:at]
        else:
            damaged = sound[:at] + bytes([sound[at] ^ 1 << random.randrange(8)]) + sound[at + 1 :]
        path.write_bytes(damaged)
        with pytest.raises(StoreError) as raised:
            read_item(path)
        assert str(path) in str(raised.value)
        assert isinstance(raised.value, CorruptItemError), (at, raised.value)


def test_every_byte_of_the_head_counts(tmp_path: Path) -> None:
    sound = bytes(item_to_bytes(random_item(layers=1)))
    head = 8 + int.from_bytes(sound[:8], "little")
    for at in range(head):
        damaged = bytearray(sound)
        damaged[at] ^= 0x29  # a space becomes a tab: JSON would not mind
        with pytest.raises(CorruptItemError):
            item_from_bytes(damaged, "damaged")


def test_two_files_joined_are_not_a_file() -> None:
    data = item_to_bytes(random_item())
    with pytest.raises(CorruptItemError, match="bytes instead of"):
        item_from_bytes(data + data, "joined")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (pickle.dumps({"kv_cache_memories": {}}), "import-memos"),
        (b"PK\x03\x04 and so on, as torch.save writes it", "import-memos"),
        (b"once upon a time", "not a file of kvcag"),
    ],
)
def test_foreign_files_are_named_and_not_loaded(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=says) as raised:
        read_item(path)
    assert str(path) in str(raised.value)


def test_another_programs_safetensors_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(FormatError, match="no kvcag manifest"):
        read_item(path)


def test_an_empty_file_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(CorruptItemError, match="only 0 bytes"):
        read_item(tmp_path / "empty")


def test_a_newer_version_is_refused_as_such(file: Path) -> None:
    data = bytearray(file.read_bytes())
    _rewrite(data, b'"kvcag.version":"1"', b'"kvcag.version":"3"')
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"version 3.*Upgrade kvcag"):
        read_item(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'\\"tokens\\":10', b'\\"tokens\\":11'),
        (b'\\"layers\\":3', b'\\"layers\\":4'),
        (b'"dtype":"BF16"', b'"dtype":"XF16"'),
        (b'"shape":[1,2,10,8]', b'"shape":[1,2,10,9]'),
        (b'"__metadata__"', b'"__wetadata__"'),
        (b'\\"tokens\\":10', b'\\"tokens\\":[]'),
    ],
)
def test_a_sealed_header_that_makes_no_sense_is_refused(file: Path, old: bytes, new: bytes) -> None:
    data = bytearray(file.read_bytes())
    _rewrite(data, old, new)
    with pytest.raises(CorruptItemError):
        item_from_bytes(data, "forged")


def test_another_models_item_is_refused_before_its_tensors_are_read(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    other = FINGERPRINT.model_copy(update={"dtype": "float32"})
    with pytest.raises(FingerprintMismatchError, match="dtype: bfloat16, not float32") as raised:
        read_item(file, expected=other)
    assert str(file) in str(raised.value)


def test_the_same_model_under_another_name_is_accepted(file: Path) -> None:
    assert read_item(file, expected=FINGERPRINT.model_copy(update={"model_name": "moved"})).fingerprint == FINGERPRINT


def test_an_item_that_names_no_model_is_refused_where_one_is_expected(tmp_path: Path) -> None:
    write_item(tmp_path / "item", random_item().model_copy(update={"fingerprint": None}))
    with pytest.raises(FingerprintMismatchError, match="the item has no fingerprint"):
        read_item(tmp_path / "item", expected=FINGERPRINT)


def test_an_empty_item_fits_any_model(tmp_path: Path) -> None:
    write_item(tmp_path / "item", KVCacheItem(id="empty"))
    assert read_item(tmp_path / "item", expected=FINGERPRINT).id == "empty"


@pytest.mark.parametrize("value", [object(), {1, 2}, (1, 2), {1: "one"}, float("nan"), b"bytes", torch.zeros(1)])
def test_metadata_that_would_come_back_as_something_else_is_refused_before_writing(file: Path, value: object) -> None:
    before = file.read_bytes()
    with pytest.raises(InvalidInputError, match="metadata\\['odd'\\]"):
        write_item(file, random_item(metadata={"odd": value}))
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_metadata_larger_than_a_header_is_refused(file: Path) -> None:
    with pytest.raises(InvalidInputError, match="Leave large values out"):
        write_item(file, random_item(metadata={"book": "x" * (33 << 20)}))


# --- the disk ---------------------------------------------------------------------------------------------------


def test_a_missing_file_and_a_missing_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="does not exist") as raised:
        read_item(tmp_path / "none")
    assert str(tmp_path / "none") in str(raised.value)
    with pytest.raises(StoreUnavailableError):
        write_item(tmp_path / "no" / "directory", random_item())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_the_earlier_file(file: Path) -> None:
    before = file.read_bytes()
    with (
        pytest.raises(StoreUnavailableError, match="disk is full"),
        atomic_write(file),
        open("/dev/full", "wb") as full,
    ):
        full.write(b"x" * 100_000)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_write_that_fails_midway_leaves_the_earlier_file(file: Path) -> None:
    before = file.read_bytes()
    with contextlib.suppress(KeyboardInterrupt), atomic_write(file) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def _rewrite(data: bytearray, old: bytes, new: bytes) -> None:
    """Change the header of a file and seal it again, as a newer release or a forger would."""
    size = 8 + int.from_bytes(data[:8], "little")
    head = bytes(data[:size])
    assert old in head
    data[:size] = seal(head.replace(old, new))


# --- manifests of several files -----------------------------------------------------------------------------------


def test_a_sealed_manifest_is_read_unchanged(tmp_path: Path) -> None:
    content = {"items": ["ü", "\ud800"], "about": {"b": 1.5, "a": None}}
    (tmp_path / "m.json").write_text(sealed("a kind", 3, content))

    assert read_sealed(tmp_path / "m.json", "a kind", 3) == content


def test_a_manifest_of_version_infinity_is_damaged(tmp_path: Path) -> None:
    """Regression, found by fuzzing: an OverflowError."""
    (tmp_path / "m.json").write_text('{"format": "a kind", "version": Infinity, "checksum": ""}')
    with pytest.raises(CorruptItemError, match="not a manifest"):
        read_sealed(tmp_path / "m.json", "a kind", 3)


def test_each_value_of_a_sealed_manifest_is_under_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(sealed("a kind", 3, {"items": ["a"], "count": 1}))
    sound = json.loads(path.read_text())
    for changed in ({"version": 2}, {"items": []}, {"count": True}, {"more": 1}, {"checksum": "0" * 16}):
        path.write_text(json.dumps({**sound, **changed}))
        with pytest.raises(CorruptItemError, match="checksum"):
            read_sealed(path, "a kind", 3)


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"[]", CorruptItemError, "not a manifest"),
        (b"{}", CorruptItemError, "not a manifest"),
        (b"", CorruptItemError, "not a manifest"),
        (b"[" * 100_000, CorruptItemError, "not a manifest"),
        (pickle.dumps({}), FormatError, "import-memos"),
        (b'{"format": "another", "version": 1, "checksum": ""}', FormatError, "not of kind 'a kind'"),
        (b'{"format": "a kind", "version": 4, "checksum": ""}', FormatError, "Upgrade kvcag"),
    ],
)
def test_files_that_are_not_sealed_manifests_are_refused(
    tmp_path: Path, data: bytes, error: type[StoreError], says: str
) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(data)
    with pytest.raises(error, match=says):
        read_sealed(path, "a kind", 3)
    with pytest.raises(StoreUnavailableError):
        read_sealed(tmp_path / "none", "a kind", 3)
