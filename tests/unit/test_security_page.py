"""The page on security names a threat, what protects, and a test of it that exists."""

from __future__ import annotations

import re
from pathlib import Path

UNIT = Path(__file__).parent
PAGE = (UNIT.parents[1] / "docs" / "security.md").read_text()
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)


def test_each_test_that_the_page_names_exists() -> None:
    assert len(NAMED) > 25
    missing = [
        f"{file}::{name}" for file, name in NAMED if f"def {name}(" not in (UNIT / file).read_text(encoding="utf-8")
    ]
    assert not missing


def test_each_threat_has_a_test() -> None:
    rows = [line for line in PAGE[PAGE.index("## Threats") :].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    assert all("::test_" in row for row in rows)
