from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from safetensors.torch import save_file
from stored import FINGERPRINT, assert_same, random_item
from torch import zeros

from kvcag.errors import StoreUnavailableError
from kvcag.stores.folder import dump_items, load_items
from kvcag.stores.verification import verify


def test_a_dump_replaces_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    """It deleted every other safetensors file of the folder: a model's, and those of another memory's dump."""
    save_file({"weight": zeros(3)}, tmp_path / "model.safetensors")
    dump_items(tmp_path, "other.json", [random_item("of another memory")])
    dump_items(tmp_path, "ours.json", [random_item("a"), random_item("b")])
    dump_items(tmp_path, "ours.json", [random_item("c")])

    (ours,) = load_items(tmp_path, "ours.json", FINGERPRINT)
    (other,) = load_items(tmp_path, "other.json", FINGERPRINT)
    assert_same(ours, random_item("c"))
    assert_same(other, random_item("of another memory"))
    assert (tmp_path / "model.safetensors").exists()
    report = verify(tmp_path)
    assert (report.sound, len(report.foreign)) == (2, 1)


def test_a_dump_whose_folder_cannot_be_synced_keeps_what_its_manifest_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest had its name, and the files that it names were deleted."""
    dump_items(tmp_path, "ours.json", [random_item("a")])
    real, directories = os.fsync, 0

    def fails_at_the_last(descriptor: int) -> None:
        nonlocal directories
        directories += stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if directories == 2:  # the item's was the first
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fails_at_the_last)
    with pytest.raises(StoreUnavailableError):
        dump_items(tmp_path, "ours.json", [random_item("b")])
    [item] = load_items(tmp_path, "ours.json", FINGERPRINT)
    assert_same(item, random_item("b"))
