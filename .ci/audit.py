"""What pip-audit would look at, as far as it can be known without asking anybody.

    python .ci/audit.py [--no-hashes]
    python .ci/audit.py --drift

Of the environment that it runs in:

1. requirements: nothing installed contradicts what another package asks for (`pip check`);
2. lock: requirements.lock has what pyproject.toml asks for, and the versions that are installed;
3. files: every installed file has the SHA-256 that its package's RECORD gives;
4. licences: what kvcag needs at run time, its extras included, is under a licence that allows what Apache-2.0 allows;
5. advisories: no installed version is in .ci/advisories.txt, and pyproject.toml does not start at one that is.

It does not know what was published after advisories.txt was last edited. `pip-audit` does, where its service can be
reached. Exit code 1 and a line for each finding. With --drift, one line says which versions differ from the lock; that
fails nothing.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from itertools import chain, groupby
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # mypy, pytest and build bring it

ROOT = Path(__file__).parents[1]
ALLOWED = re.compile(
    r"\b(MIT(-0|-CMU)?|Apache|BSD|0BSD|ISC|PSF|Python Software Foundation|MPL|Mozilla|Unlicense|Public Domain|HPND)\b",
    re.IGNORECASE,
)
REFUSED = re.compile(r"\b(A?GPL|GNU (Affero )?General Public|SSPL|Business Source|Non-?Commercial)", re.IGNORECASE)


def requirements(lines: Iterable[str]) -> list[Requirement]:
    return [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]


def contradictions() -> Iterator[str]:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    if done.returncode:
        yield from (f"requirements: {line}" for line in (done.stdout + done.stderr).splitlines())


def lock() -> dict[str, list[Requirement]]:
    """requirements.lock by package. A package has several lines where Pythons or systems get different versions."""
    lines = requirements((ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines())
    return {name: list(group) for name, group in groupby(lines, key=lambda line: canonicalize_name(line.name))}


def direct() -> list[Requirement]:
    """What pyproject.toml asks for, all extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = requirements(chain(project["dependencies"], *project["optional-dependencies"].values()))
    return [one for one in wanted if one.name != project["name"]]


def unlocked() -> Iterator[str]:
    """What pyproject.toml asks for and the lock does not give, for any Python."""
    locked = lock()
    for wanted in direct():
        versions = [only.version for line in locked.get(canonicalize_name(wanted.name), []) for only in line.specifier]
        if not versions:
            yield f"lock: pyproject.toml asks for {wanted}, requirements.lock has no {wanted.name}: run make lock"
        for version in versions:
            if not wanted.specifier.contains(version, prereleases=True):
                yield f"lock: pyproject.toml asks for {wanted}, requirements.lock has {version}: run make lock"


def drifted() -> Iterator[tuple[str, str, str]]:
    """The packages that are installed in another version than the lock's: name, the lock's version, the other."""
    for name, lines in lock().items():
        found = version_of(name)
        for line in lines:
            if found is not None and holds(line, "") and not line.specifier.contains(found, prereleases=True):
                yield name, str(line.specifier).removeprefix("=="), found


def unlike_the_lock() -> Iterator[str]:
    for name, locked, found in drifted():
        yield f"lock: {name} {found} is installed, requirements.lock has {locked}"
    known = set(lock()) | {canonicalize_name(package.name) for package in needed("torch", set())} | {"kvcag"}
    for name in sorted({canonicalize_name(package.name) for package in needed("kvcag", {"dev"})} - known):
        yield f"lock: {name} {version_of(name)} is installed, requirements.lock has no {name}: run make lock"


def version_of(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def changed_files() -> Iterator[str]:
    for package in distributions():
        for file in package.files or []:
            path = Path(str(file.locate()))
            if file.hash is None or not path.is_file():
                continue
            digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                yield f"files: {path} is not what {package.name} {package.version} brought"


def licence_of(package: Distribution) -> str:
    """What it says of its licence: the expression, else the classifiers, else the first line of the old field."""
    about = package.metadata
    if expression := about.get("License-Expression"):
        return str(expression)
    classifiers = [c.rsplit("::", 1)[-1].strip() for c in about.get_all("Classifier", []) if c.startswith("License ::")]
    return ", ".join(classifiers) or str(about.get("License") or "").strip().split("\n")[0][:80]


def needed(name: str, extras: set[str]) -> Iterator[Distribution]:
    """The package and what it needs here, each once."""
    seen, waiting = set[str](), [(name, extras)]
    while waiting:
        name, extras = waiting.pop()
        key = f"{canonicalize_name(name)}{sorted(extras)}"
        if key in seen or version_of(name) is None:
            continue
        seen.add(key)
        package = distribution(name)
        yield package
        for wanted in requirements(package.requires or []):
            if any(holds(wanted, extra) for extra in extras | {""}):
                waiting.append((wanted.name, set(wanted.extras)))


def holds(wanted: Requirement, extra: str) -> bool:
    return wanted.marker is None or wanted.marker.evaluate({**default_environment(), "extra": extra})


def licences() -> Iterator[str]:
    said = {package.name: licence_of(package) for package in needed("kvcag", {"all"})}
    for name, licence in sorted(said.items()):
        if REFUSED.search(licence) and not ALLOWED.search(licence):
            yield f"licences: {name} is under {licence}"
        elif not ALLOWED.search(licence):
            print(f"note: {name} says of its licence: {licence or 'nothing'}")


def advisories() -> Iterator[str]:
    lowest = {canonicalize_name(one.name): s.version for one in direct() for s in one.specifier if s.operator == ">="}
    for bad in requirements((ROOT / ".ci" / "advisories.txt").read_text(encoding="utf-8").splitlines()):
        found, allowed = version_of(bad.name), lowest.get(canonicalize_name(bad.name))
        if found is not None and bad.specifier.contains(found, prereleases=True):
            yield f"advisories: {bad.name} {found} is installed, and {bad.specifier} is refused"
        if allowed is not None and bad.specifier.contains(allowed):
            yield f"advisories: pyproject.toml allows {bad.name} {allowed}, and {bad.specifier} is refused"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-hashes", action="store_true", help="leave out the files, which take longest")
    parser.add_argument("--drift", action="store_true", help="only say which versions differ from the lock")
    given = parser.parse_args()
    if given.drift:
        changes = [f"{name} {locked} → {found}" for name, locked, found in drifted()]
        print(f"drift: {len(changes)} versions differ from requirements.lock: {', '.join(changes) or 'none'}")
        return 0
    checks = [contradictions(), unlocked(), unlike_the_lock(), licences(), advisories()]
    if not given.no_hashes:
        checks.append(changed_files())
    findings = [finding for check in checks for finding in check]
    for finding in findings:
        print(finding)
    count = sum(1 for _ in distributions())
    print(f"{count} packages looked at, {len(findings)} findings; nobody was asked for newer advisories")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
