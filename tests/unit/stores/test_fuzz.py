"""Reading any file returns the item that was written, or raises an error of kvcag."""

from __future__ import annotations

import contextlib
import json
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from kvcag.core import KVCacheItem
from kvcag.errors import StoreError
from kvcag.stores.dump import read_dump, write_dump
from kvcag.stores.files import parse_id, read_manifest, seal, sealed
from kvcag.stores.format import item_from_bytes, item_to_bytes, read_item
from kvcag.stores.memos import read_memos_pickle
from kvcag.stores.verify import verify
from tests.fuzzing import SECONDS, changed_bytes, changed_json, fuzz
from tests.memos_pickles import memos as memos  # the fixture
from tests.memos_pickles import written
from tests.stored import assert_same, random_item

pytestmark = pytest.mark.timeout(SECONDS + 240)

ITEM = random_item("a", metadata={"source": "x", "n": [1, 2.5, None]})
SOUND = bytes(item_to_bytes(ITEM))
HEADER = 8 + int.from_bytes(SOUND[:8], "little")
DEEP = st.sampled_from(["[", '{"a":']).map(lambda opening: opening * 60_000)


def with_header(header: Any) -> bytes:
    """The sound file with another header, whose checksum is correct if it has one."""
    body = json.dumps(header, separators=(",", ":")).encode()
    head = len(body).to_bytes(8, "little") + body
    with contextlib.suppress(ValueError):
        head = seal(head)
    return head + SOUND[HEADER:]


def with_manifest(manifest: Any) -> bytes:
    header = json.loads(SOUND[8:HEADER])
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    header["__metadata__"]["kvcag.manifest"] = text
    return with_header(header)


def test_any_file_gives_its_item_or_an_error_of_ours(tmp_path: Path) -> None:
    header = json.loads(SOUND[8:HEADER])
    manifest = json.loads(header["__metadata__"]["kvcag.manifest"])
    file = tmp_path / "file.safetensors"

    def check(data: bytes) -> None:
        file.write_bytes(data)
        for read in (
            lambda: item_from_bytes(bytearray(data), "bytes"),
            lambda: read_item(file),
            lambda: read_manifest(file),
            lambda: parse_id(data, "bytes"),
            lambda: verify(tmp_path),
        ):
            try:
                found = read()
            except StoreError:
                continue
            if isinstance(found, KVCacheItem) and data[:HEADER] == SOUND[:HEADER]:
                assert_same(found, ITEM)

    inputs = (
        changed_bytes(SOUND)
        | st.binary(max_size=200)
        | changed_json(header).map(with_header)
        | changed_json(manifest).map(with_manifest)
        | DEEP.map(with_manifest)
        | DEEP.map(lambda text: len(text).to_bytes(8, "little") + b'{"kvcag.":' + text.encode())
    )
    fuzz(inputs, check)


def test_any_manifest_gives_its_dump_or_an_error_of_ours(tmp_path: Path) -> None:
    write_dump(tmp_path, "m", [random_item("a")], files={"t": b"text"}, about={"n": None})
    sound = (tmp_path / "m").read_bytes()
    content = {key: value for key, value in json.loads(sound).items() if key not in ("format", "version", "checksum")}

    def resealed(content: Any) -> bytes:
        return sealed("kvcag-memory", 1, content if isinstance(content, dict) else {"items": content}).encode()

    def check(data: bytes) -> None:
        (tmp_path / "m").write_bytes(data)
        try:
            dump = read_dump(tmp_path, "m")
        except StoreError:
            return
        finally:
            verify(tmp_path)
        assert dump is not None
        if data == sound:
            assert [item.id for item in dump.items] == ["a"]

    inputs = (
        changed_bytes(sound)
        | st.binary(max_size=200)
        | changed_json(content).map(resealed)
        | changed_json(json.loads(sound)).map(lambda body: json.dumps(body).encode())
        | DEEP.map(str.encode)
    )
    fuzz(inputs, check)


NAMES = ["torch._utils _rebuild_tensor_v2", "torch.storage _load_from_bytes", "datetime datetime", "torch float32"]
NAMES += ["memos.memories.activation.item KVCacheItem", "transformers.cache_utils DynamicCache", "builtins set"]
NAMES += ["collections OrderedDict", "copyreg _reconstructor", "_codecs encode", "os system"]


@st.composite
def instructions(draw: st.DrawFn) -> bytes:
    """A pickle of any instructions with plausible arguments."""
    made = bytearray(b"\x80\x04")
    for _ in range(draw(st.integers(1, 40))):
        opcode = draw(st.sampled_from(pickletools.opcodes))
        made += opcode.code.encode("latin1")
        if opcode.name == "GLOBAL":
            made += draw(st.sampled_from(NAMES)).replace(" ", "\n").encode() + b"\n"
        elif opcode.arg is not None and opcode.arg.n > 0:
            made += draw(st.binary(min_size=opcode.arg.n, max_size=opcode.arg.n))
        elif opcode.arg is not None and opcode.arg.n == pickletools.UP_TO_NEWLINE:
            made += draw(st.sampled_from([b"1", b"fields", b"'x'", b"", b"-9", b"1e9"])) + b"\n"
        elif opcode.arg is not None:
            size = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(opcode.arg.n, 4)
            text = draw(st.sampled_from([b"", b"id", b"memory", b"layers", b"\x00\x01"]))
            made += draw(st.just(len(text)) | st.integers(0, 255)).to_bytes(size, "little") + text
    return bytes(made + b".")


def test_any_pickle_gives_items_or_an_error_of_ours(tmp_path: Path) -> None:
    sound = [pickle.dumps({"kv_cache_memories": {"a": written()}}, protocol) for protocol in (2, 4)]
    before = torch._utils._rebuild_tensor_v2.__defaults__, torch.load

    def check(data: bytes) -> None:
        (tmp_path / "file").write_bytes(data)
        try:
            items = read_memos_pickle(tmp_path / "file")
        except StoreError:
            items = []
        for item in items:
            json.dumps(item.metadata)
        assert (torch._utils._rebuild_tensor_v2.__defaults__, torch.load) == before

    fuzz(changed_bytes(sound[0]) | changed_bytes(sound[1]) | instructions() | st.binary(max_size=200), check)
