"""A cube in a folder: a dump (`kvcag.stores.dump`) of its items, with a file of its texts.

```
dump/
├── cube.json               the manifest: the current directory, its items and files, and the cube's settings
└── cube.json-3f9c…/        a directory of a DiskStore, one for each dump
    └── texts.jsonl         one text per line: id, memory, metadata
```
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvcag.core import KVCacheItem, TextualMemoryItem
from kvcag.errors import StoreUnavailableError
from kvcag.stores import dump

_MANIFEST, _TEXTS, _KIND = "cube.json", "texts.jsonl", "kvcag-cube"


@dataclass(frozen=True, slots=True)
class CubeDump:
    """The content of a cube's dump. Items that were read have tensors memory-mapped from their files."""

    namespace: str
    instruction: str | None
    texts: Sequence[TextualMemoryItem]
    items: Iterable[KVCacheItem]


def write_dump(dir: str | os.PathLike[str], cube: CubeDump) -> None:
    """Write a cube to a folder, and replace an earlier dump.

    Raises:
        StoreUnavailableError: the folder cannot be written, for example because the disk is full. The earlier dump is
            unchanged.
    """
    lines = "".join(json.dumps(text.model_dump(mode="json")) + "\n" for text in cube.texts)
    about = {"namespace": cube.namespace, "instruction": cube.instruction}
    dump.write_dump(dir, _MANIFEST, cube.items, kind=_KIND, files={_TEXTS: lines.encode("ascii")}, about=about)


def read_dump(dir: str | os.PathLike[str]) -> CubeDump:
    """Read and verify the dump of a cube.

    Raises:
        StoreUnavailableError: the folder has no dump, or cannot be read.
        CorruptItemError: a file was truncated or changed, or is missing.
        FormatError: a newer release wrote the dump, or it is not the dump of a cube.
    """
    read = dump.read_dump(dir, _MANIFEST, kind=_KIND)
    if read is None:
        raise StoreUnavailableError(
            errno.ENOENT, f"it contains no {_MANIFEST}: pass the folder of a dump", os.fspath(dir)
        )
    texts = [TextualMemoryItem.model_validate_json(line) for line in read.files[_TEXTS].splitlines()]
    return CubeDump(**read.about, texts=texts, items=read.items)
