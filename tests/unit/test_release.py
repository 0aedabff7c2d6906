"""What a release needs: one version, a changelog that knows it, targets that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kvcag

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def headings() -> list[str]:
    return re.findall(r"^## (.+)$", read("CHANGELOG.md"), flags=re.MULTILINE)


def test_the_version_stands_in_one_place() -> None:
    assert version("kvcag") == kvcag.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", kvcag.__version__)
    assert 'dynamic = ["version"]' in read("pyproject.toml")
    said = [path for path in (ROOT / "kvcag").rglob("*.py") if f'"{kvcag.__version__}"' in path.read_text("utf-8")]
    assert said == [ROOT / "kvcag" / "__init__.py"]


def test_the_changelog_begins_with_this_version() -> None:
    newest = headings()[0]
    assert re.fullmatch(rf"{re.escape(kvcag.__version__)} \((unreleased|\d{{4}}-\d\d-\d\d)\)", newest), newest


def test_the_changelog_lists_versions_once_newest_first() -> None:
    versions = [tuple(map(int, re.findall(r"\d+", heading.split(" ")[0]))) for heading in headings()]
    assert versions == sorted(set(versions), reverse=True)


def test_the_changelog_names_every_command() -> None:
    app = pytest.importorskip("kvcag.cli.app").app
    changelog = read("CHANGELOG.md")
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert re.search(rf"`(kvcag )?{name}\b", changelog), f"CHANGELOG.md does not name the command {name}"


def test_ci_and_the_help_run_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))
    named = re.findall(r"^make ([a-z-]+)", read(".ci/run"), flags=re.MULTILINE)
    assert {"lint", "docs", "package", "audit", "test"} <= set(named) <= targets
    phony = re.search(r"^\.PHONY: (.+)$", read("Makefile"), flags=re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == targets


@pytest.mark.parametrize("text", requires("kvcag") or [])
def test_every_requirement_has_a_lowest_version(text: str) -> None:
    """Without one, `make test-min` would try the first version ever published."""
    wanted = Requirement(text)
    if wanted.name != "kvcag":
        assert {s.operator for s in wanted.specifier} & {">=", "==", "~="}, text


def test_a_known_flaw_that_is_installed_is_found(tmp_path: Path) -> None:
    """`make audit`, its list of advisories replaced by one that names a package that is here."""
    copied = tmp_path / ".ci" / "audit.py"
    copied.parent.mkdir()
    copied.write_text(read(".ci/audit.py"), encoding="utf-8")
    (tmp_path / "constraints.txt").write_text("pytest==0.1\n", encoding="utf-8")
    (copied.parent / "advisories.txt").write_text("pytest>=1  # CVE-0: none\nabsent-package<9\n", encoding="utf-8")
    command = [sys.executable, copied, "--no-hashes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    assert re.search(r"^advisories: pytest .+ is installed, and >=1 is refused$", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^constraints: pytest .+ constraints.txt says ==0.1$", done.stdout, flags=re.MULTILINE)
    assert "absent-package" not in done.stdout
