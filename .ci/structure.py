"""The size and the shape of the package: lines, files, floors and circles.

    python .ci/structure.py [PACKAGE]

A floor is a level of imports: a module stands one floor above the highest module that it imports, and the modules and
folders directly below the package are what is counted. A circle is a module that imports itself through others.
`TYPE_CHECKING` imports do not count; imports within functions do. PACKAGE is a package's folder, `kvcag` by default.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

FLOORS = [
    {"concurrency", "errors", "fingerprint"},
    {"chat_template", "core"},
    {"cache"},
    {"documents", "engines", "stores"},
    {"calibration", "config", "sizing", "telemetry", "testing", "tools", "vllm_connector"},
    {"contexts", "sync"},
    {"memory"},
    {"cube", "scheduler"},
    {"adapters", "langchain", "llama_index"},
    {"__main__", "cli", "demo"},
]
"""From the bottom up. A module imports from its own floor and from floors below. At most ten."""


def modules(root: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name, without the package's own `__init__`."""
    paths = (path for path in sorted(root.rglob("*.py")) if path != root / "__init__.py")
    return {dotted(path, root): path for path in paths}


def dotted(path: Path, root: Path) -> str:
    """The name under which a module is imported."""
    return ".".join((root.name, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """What a module imports at run time, at its top or within a function, as dotted names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def graph(root: Path) -> dict[str, set[str]]:
    """Module → the modules of the package that it imports. A package's `__init__` is not below its own modules."""
    paths = modules(root)
    return {
        name: {other for other in imported(path) & paths.keys() if other != name and not name.startswith(f"{other}.")}
        for name, path in paths.items()
    }


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Paths that lead from a module back to itself, one for each module on which one was found first."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(edges[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return found


def height(root: Path) -> int:
    """Floors that the top-level modules and packages need; those on a circle share one."""
    edges: dict[str, set[str]] = {}
    for name, others in graph(root).items():
        top = name.split(".")[1]
        edges.setdefault(top, set()).update(other.split(".")[1] for other in others)

    def below(name: str) -> set[str]:
        seen, waiting = set[str](), [name]
        while waiting:
            for other in edges[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    reach = {name: below(name) for name in edges}

    @cache
    def floor(name: str) -> int:
        lower = [other for other in reach[name] if name not in reach[other]]
        return 1 + max(map(floor, lower), default=0)

    return max(map(floor, edges))


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "kvcag")
    paths = list(root.rglob("*.py"))
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    print(f"{lines:,} lines in {len(paths)} files on {height(root)} floors")
    found = circles(graph(root))
    print(f"{len(found)} circles" + "".join(f"\n  {' → '.join(one)}" for one in found))


if __name__ == "__main__":
    main()
