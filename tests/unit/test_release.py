"""What a release needs: one version, a changelog that knows it, targets that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kvcag

ROOT = Path(__file__).parents[2]
UTF8 = {"PYTHONUTF8": "1"}


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


def audit(folder: Path, lock: str, project: str = "", advisories: str = "", option: str = "--no-hashes") -> list[str]:
    """The lines that `make audit` says where requirements.lock and the other files that it reads have this text."""
    copied = folder / ".ci" / "audit.py"
    copied.parent.mkdir()
    copied.write_text(read(".ci/audit.py"), encoding="utf-8")
    (folder / "requirements.lock").write_text(lock, encoding="utf-8")
    (folder / "pyproject.toml").write_text(project or read("pyproject.toml"), encoding="utf-8")
    (copied.parent / "advisories.txt").write_text(advisories, encoding="utf-8")
    command = [sys.executable, copied, option]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", check=False, timeout=60, env={**os.environ, **UTF8}
    )
    assert not done.stderr
    found = [line for line in done.stdout.splitlines() if re.match("(lock|advisories|requirements|licences): ", line)]
    assert done.returncode == bool(found), done.stdout
    return done.stdout.splitlines()


def test_a_known_flaw_that_is_installed_or_allowed_is_found(tmp_path: Path) -> None:
    project = """
    [project]
    name = "kvcag"
    dependencies = ["numpy>=1.26"]
    [project.optional-dependencies]
    vllm = ["httpx>=0.27,<1"]
    """
    advisories = "pytest>=1  # CVE-0: none\nabsent-package<9\nhttpx<0.27.1\nnumpy<1.26\n"
    said = audit(tmp_path, read("requirements.lock"), project, advisories)
    assert [line for line in said if line.startswith("advisories: ")] == [
        f"advisories: pytest {version('pytest')} is installed, and >=1 is refused",
        "advisories: pyproject.toml allows httpx 0.27, and <0.27.1 is refused",
    ]


def test_a_version_that_is_not_the_locks_is_found(tmp_path: Path) -> None:
    """Also the version of what only other packages ask for; a line for another Python or system is no matter."""
    changed = re.sub(r"^pluggy==.*$", "pluggy==0.1", read("requirements.lock"), flags=re.MULTILINE)
    changed = changed.replace("iniconfig==", "another-package==")
    said = audit(tmp_path, changed + "pygments==0.1 ; sys_platform == 'emscripten'\n")
    assert f"lock: pluggy {version('pluggy')} is installed, requirements.lock has 0.1" in said
    missing = f"lock: iniconfig {version('iniconfig')} is installed, requirements.lock has no iniconfig: run make lock"
    assert missing in said
    assert not [line for line in said if "pygments" in line]


def test_a_requirement_that_the_lock_does_not_give_is_found(tmp_path: Path) -> None:
    project = """
    [project]
    name = "kvcag"
    dependencies = ["numpy>=99"]
    [project.optional-dependencies]
    docs = ["kvcag[test]", "absent-package>=1", "mkdocs>=1"]
    """
    said = audit(
        tmp_path, lock="mkdocs==1.6.1\nnumpy==2.2.6 ; python_version < '3.11'\nnumpy==2.4.6\n", project=project
    )
    found = [line for line in said if line.startswith("lock: pyproject.toml")]
    assert found == [
        "lock: pyproject.toml asks for numpy>=99, requirements.lock has 2.2.6: run make lock",
        "lock: pyproject.toml asks for numpy>=99, requirements.lock has 2.4.6: run make lock",
        "lock: pyproject.toml asks for absent-package>=1, requirements.lock has no absent-package: run make lock",
    ]


def test_drift_is_told_and_fails_nothing(tmp_path: Path) -> None:
    said = audit(tmp_path, "pluggy==0.1\nabsent-package==1\n", option="--drift")
    assert said == [f"drift: 1 versions differ from requirements.lock: pluggy 0.1 → {version('pluggy')}"]


def test_the_lock_names_no_index_and_no_build_of_torch() -> None:
    lock = read("requirements.lock")
    assert not re.search(r"https?://|--(extra-)?index|--find-links", lock)
    assert re.findall(r"^torch==.*?(?= |$)", lock, flags=re.MULTILINE) == [f"torch=={version('torch').split('+')[0]}"]
    assert not re.search(r"^(nvidia-|cuda-|triton)", lock, flags=re.MULTILINE)


def test_what_cites_the_project_has_its_version_and_licence() -> None:
    cited = dict(re.findall(r"^([a-z-]+): (.+)$", read("CITATION.cff"), flags=re.MULTILINE))
    assert cited["version"] == kvcag.__version__
    assert cited["license"] in read("pyproject.toml")


def test_the_workflow_and_the_hooks_run_what_a_developer_runs() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))
    workflow = read(".github/workflows/ci.yml")
    matrix = re.search(r"target: \[(.+)\]", workflow)
    assert matrix is not None
    assert set(matrix[1].split(", ")) == set(re.findall(r"^make ([a-z-]+)$", read(".ci/run"), flags=re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", workflow)) - {"targets"} <= targets
    lint = re.search(r"^lint:.*\n((?:\t.+\n)+)", read("Makefile"), flags=re.MULTILINE)
    assert lint is not None
    linters = set(re.findall(r"-m (\w+)", lint[1]))
    assert linters == set(re.findall(r"-m (\w+)", read(".pre-commit-config.yaml")))


def test_the_release_list_was_walked_for_this_version() -> None:
    """Each line has what was seen, the targets and files that it names are there, and so are those of `.ci/run`."""
    page = read("RELEASING.md")
    rows = re.findall(r"^\| (.+) \| (.*) \|$", page, flags=re.MULTILINE)[2:]
    assert len(rows) > 12
    assert all(seen.strip() for _, seen in rows)
    assert f"{kvcag.__version__} (" in page
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", page))
    assert set(re.findall(r"^make ([a-z-]+)$", read(".ci/run"), flags=re.MULTILINE)) <= named <= targets
    for file in re.findall(r"`(?:python )?((?:\.ci|benchmarks|tests|distributions)/[\w./-]*)`", page):
        assert (ROOT / file).exists(), file


def test_pages_for_people_who_join_name_files_that_are_there() -> None:
    for page in (
        "CODE_OF_CONDUCT.md",
        "CONTRIBUTING.md",
        "RELEASING.md",
        "SECURITY.md",
        ".github/pull_request_template.md",
    ):
        for target in re.findall(r"\]\(([^):#]+)\)", read(page)):
            assert (ROOT / target).exists(), f"{page}: {target}"
