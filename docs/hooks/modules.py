"""Which module does what: read off the modules' own first lines while the site is built.

`<!-- modules: errors stores/ -->` in a page becomes a table of `kvcag/errors.py` and of every file in `kvcag/stores/`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[2] / "kvcag"
_MARK = re.compile(r"<!-- modules: (.+?) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables in."""
    return _MARK.sub(lambda mark: _table(mark[1].split()), markdown)


def _table(names: list[str]) -> str:
    files = [file for name in names for file in _files(name)]
    return "\n".join(["| module | role |", "| --- | --- |", *map(_row, files)])


def _files(name: str) -> list[Path]:
    if not name.endswith("/"):
        return [_PACKAGE / f"{name}.py"]
    return [file for file in sorted((_PACKAGE / name).glob("*.py")) if not file.name.startswith("_")]


def _row(file: Path) -> str:
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    role = " ".join(said.split("\n\n")[0].split()).replace("|", "\\|")
    return f"| `{file.relative_to(_PACKAGE).with_suffix('').as_posix()}` | {role} |"
