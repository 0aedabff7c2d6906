"""The pages of the documentation, and the fenced blocks in them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    line: int
    """Of its first line, in the page."""
    follows: bool
    """Nothing but white space stands between the block before and this one."""


def blocks(page: Path, *languages: str) -> list[Block]:
    text, end, found = page.read_text(encoding="utf-8"), 0, []
    for fence in FENCE.finditer(text):
        follows = bool(found) and not text[end : fence.start()].strip()
        end = fence.end()
        line = text.count("\n", 0, fence.start("body")) + 1
        found.append(Block(fence["language"], textwrap.dedent(fence["body"]), line, follows))
    return [block for block in found if not languages or block.language in languages]


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, *languages)]


def named(page: Path) -> str:
    return page.name
