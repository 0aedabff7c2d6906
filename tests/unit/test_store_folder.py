from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from stored import FINGERPRINT, assert_same, random_item
from torch import zeros

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
