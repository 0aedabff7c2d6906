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
LAYERS = [
    {"errors", "notices"},
    {"fingerprint"},
    {"items"},
    {"cache"},
    {"context"},
    {"prompt"},
    {"engines"},
    {"call_format", "tools"},
    {"aio", "compose", "config", "sizing", "stores", "texts"},
    {"shared"},
    {"keeping"},
    {"served"},
    {"corpus"},
    {"merging"},
    {"memory"},
    {"handles"},
    {"cube", "scheduler"},
    {"langchain", "llama_index"},
    {"cli", "demo"},
]
"""From the bottom up. A module imports from its own layer's package and from layers below."""


def modules() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def layer(dotted: str) -> int | None:
    parts = dotted.split(".")
    name = parts[1] if len(parts) > 1 else None
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    dotted = "kvcag." + path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    mine = layer(dotted)
    assert mine is not None, f"{dotted} is in no layer: put it into LAYERS, and into docs/architecture.md"
    for name in imported(path):
        if name.startswith("kvcag."):
            theirs = layer(name)
            assert theirs is not None, name
            assert theirs <= mine, f"{dotted} imports {name}, which is above it"


def test_only_one_module_touches_transformers_cache_classes() -> None:
    import transformers.cache_utils as cache_utils

    classes = {name for name, value in vars(cache_utils).items() if inspect.isclass(value) and name.endswith("Layer")}
    users = {
        path.relative_to(ROOT).as_posix()
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & classes
    }
    assert users == {"cache/hf.py"}


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
            assert issubclass(value, kvcag.KVCAGError)
            assert name in drawn, f"{name} is missing from the tree in the docstring"


def test_types_ship() -> None:
    assert (ROOT / "py.typed").is_file()
    assert {module.name for module in pkgutil.iter_modules([str(ROOT)])} >= {"memory", "prompt", "items"}
