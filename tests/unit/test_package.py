from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvcag

ROOT = Path(kvcag.__file__).parent
FLOORS = [
    {"errors", "fingerprint", "streams"},
    {"chat_template", "core"},
    {"cache"},
    {"documents", "engines", "stores"},
    {"calibration", "config", "document_cache", "sizing", "testing", "tools"},
    {"contexts"},
    {"memory"},
    {"cube", "scheduler"},
    {"langchain", "llama_index"},
    {"cli", "demo"},
]
"""From the bottom up. A module imports from its own floor and from floors below."""


def modules() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def dotted(path: Path) -> str:
    return "kvcag." + path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def floor(name: str) -> int | None:
    parts = name.split(".")
    return next((i for i, names in enumerate(FLOORS) if len(parts) > 1 and parts[1] in names), None)


def imported(path: Path) -> set[str]:
    """Modules that are imported at run time, at the top or within a function."""
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


def graph() -> dict[str, set[str]]:
    paths = {dotted(path): path for path in modules()}
    return {name: (imported(path) & paths.keys()) - {name} for name, path in paths.items()}


def test_there_are_at_most_ten_floors() -> None:
    assert len(FLOORS) <= 10


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    mine = floor(dotted(path))
    assert mine is not None, f"{dotted(path)} is on no floor: put it into FLOORS, and into docs/architecture.md"
    for name in imported(path):
        if name.startswith("kvcag."):
            theirs = floor(name)
            assert theirs is not None, name
            assert theirs <= mine, f"{dotted(path)} imports {name}, which is above it"


def test_no_module_imports_itself_through_others() -> None:
    """Not within a package either, and not by an import that hides in a function."""
    edges = {name: {other for other in others if not is_parent(other, name)} for name, others in graph().items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' → '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def is_parent(package: str, name: str) -> bool:
    return name.startswith(f"{package}.")


def test_only_one_module_touches_transformers_cache_classes() -> None:
    import transformers.cache_utils as cache_utils

    classes = {name for name, value in vars(cache_utils).items() if inspect.isclass(value) and name.endswith("Layer")}
    users = {
        path.relative_to(ROOT).as_posix()
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & classes
    }
    assert users == {"cache/layers.py"}


def test_importing_needs_no_framework_and_loads_no_weights() -> None:
    """In a process of its own, with everything optional out of reach."""
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import kvcag
assert "torch" not in sys.modules and "transformers" not in sys.modules
import torch
loaded, register = [], torch.nn.Module.register_parameter
torch.nn.Module.register_parameter = lambda self, *given: (loaded.append(type(self)), register(self, *given))
assert kvcag.HFEngine and kvcag.KVCacheMemory
assert not loaded, loaded
assert not any(name.split(".")[0] in {absent} for name in sys.modules)
"""
    absent = {"langchain", "langchain_core", "langgraph", "llama_index", "llguidance", "typer", "outlines"}
    done = subprocess.run(
        [sys.executable, "-c", script.replace("{absent}", repr(absent))],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_exported_is_listed_and_there() -> None:
    assert list(kvcag.__all__) == sorted(kvcag._HOMES)
    assert set(kvcag.__all__) <= set(dir(kvcag))
    for name in kvcag.__all__:
        assert getattr(kvcag, name).__module__ == kvcag._HOMES[name], name
    with pytest.raises(AttributeError, match="no attribute 'HFEngin'"):
        kvcag.HFEngin  # noqa: B018


@pytest.mark.parametrize("name", kvcag.__all__)
def test_what_is_exported_is_documented(name: str) -> None:
    exported = getattr(kvcag, name)
    assert inspect.getdoc(exported), name
    if inspect.isclass(exported):
        for member, value in vars(exported).items():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, classmethod | property)):
                assert inspect.getdoc(value), f"{name}.{member}"


def test_the_exception_tree_is_drawn_as_it_is() -> None:
    errors = importlib.import_module("kvcag.errors")
    drawn = errors.__doc__ or ""
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == "kvcag.errors":
            assert issubclass(value, kvcag.KVCAGError | Warning)
            assert name in drawn, f"{name} is missing from the tree in the docstring"


def test_types_ship() -> None:
    assert (ROOT / "py.typed").is_file()
    assert {module.name for module in pkgutil.iter_modules([str(ROOT)])} >= {"core", "memory", "stores"}
