"""Files with what was learned about a model, kept for later processes."""

from __future__ import annotations

import os
from pathlib import Path


def learned_file(kind: str, name: str) -> Path:
    """Where it stands: below `KVCAG_CACHE`, or else the user's cache folder."""
    root = os.environ.get("KVCAG_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvcag"
    return Path(root).expanduser() / kind / name


def write_learned(path: Path, content: bytes) -> Path:
    """In place of what stood there, so that a reader sees the one or the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
    return path
