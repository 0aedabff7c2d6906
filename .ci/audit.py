"""What pip-audit would look at, as far as it can be known without asking anybody.

    python .ci/audit.py [--no-hashes]

Of the environment that it runs in:

1. requirements: nothing installed contradicts what another package asks for (`pip check`);
2. constraints: the versions are those of constraints.txt;
3. files: every installed file has the SHA-256 that its package's RECORD gives;
4. licences: what kvcag needs at run time, its extras included, is under a licence that allows what Apache-2.0 allows;
5. advisories: no installed version is in .ci/advisories.txt. That pyproject.toml would allow one is noted.

It does not know what was published after advisories.txt was last edited. `pip-audit` does, where its service can be
reached. Exit code 1 and a line for each finding.
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
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def unconstrained() -> Iterator[str]:
    for wanted in requirements((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()):
        found = version_of(wanted.name)
        if found is not None and not wanted.specifier.contains(found, prereleases=True):
            yield f"constraints: {wanted.name} {found} is installed, constraints.txt says {wanted.specifier}"


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
    direct = {canonicalize_name(wanted.name): wanted for wanted in requirements(distribution("kvcag").requires or [])}
    for bad in requirements((ROOT / ".ci" / "advisories.txt").read_text(encoding="utf-8").splitlines()):
        found = version_of(bad.name)
        if found is not None and bad.specifier.contains(found, prereleases=True):
            yield f"advisories: {bad.name} {found} is installed, and {bad.specifier} is refused"
        wanted = direct.get(canonicalize_name(bad.name))
        lowest = [s.version for s in wanted.specifier if s.operator == ">="] if wanted else []
        if lowest and bad.specifier.contains(lowest[0]):
            print(f"note: kvcag allows {bad.name} from {lowest[0]} on; {bad.specifier} has a published flaw")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-hashes", action="store_true", help="leave out the files, which take longest")
    given = parser.parse_args()
    checks = [contradictions(), unconstrained(), licences(), advisories()]
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
