from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kvcag

ROOT = Path(kvcag.__file__).parent


def structure() -> ModuleType:
    """`.ci/structure.py`, which anyone can run."""
    spec = importlib.util.spec_from_file_location("structure", ROOT.parent / ".ci" / "structure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STRUCTURE = structure()
FLOORS: list[set[str]] = STRUCTURE.FLOORS


def modules() -> list[Path]:
    return list(STRUCTURE.modules(ROOT).values())


def floor(name: str) -> int | None:
    parts = name.split(".")
    return next((i for i, names in enumerate(FLOORS) if len(parts) > 1 and parts[1] in names), None)


def test_there_are_at_most_ten_floors() -> None:
    assert STRUCTURE.height(ROOT) <= len(FLOORS) <= 10


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    name = STRUCTURE.dotted(path, ROOT)
    mine = floor(name)
    assert mine is not None, f"{name} is on no floor: put it into .ci/structure.py, and into docs/architecture.md"
    for other in STRUCTURE.imported(path):
        if other.startswith("kvcag."):
            theirs = floor(other)
            assert theirs is not None, other
            assert theirs <= mine, f"{name} imports {other}, which is above it"


def test_no_module_imports_itself_through_others() -> None:
    """Not within a package either, and not by an import that hides in a function."""
    assert STRUCTURE.circles(STRUCTURE.graph(ROOT)) == []


def test_circles_are_found(tmp_path: Path) -> None:
    package = tmp_path / "loop"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "a": "from loop import b",
        "b": "def late():\n    import loop.c",
        "c": "",
    }.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    assert STRUCTURE.circles(STRUCTURE.graph(package)) == []
    (package / "c.py").write_text("from loop.a import x", encoding="utf-8")
    assert STRUCTURE.circles(STRUCTURE.graph(package)) == [["loop.a", "loop.b", "loop.c", "loop.a"]]


def test_the_architecture_page_draws_the_floors_as_they_are() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 60
    drawn = [set(re.findall(r"`([a-z_]+)/?`", row)) for row in re.findall(r"^\| \d+ \| (.+?) \|", page, re.MULTILINE)]
    there = {path.stem if path.parent == ROOT else path.relative_to(ROOT).parts[0] for path in modules()}
    assert drawn == FLOORS[::-1]
    assert set().union(*FLOORS) == there


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


def test_langchain_core_alone_is_enough_for_the_chat_model_and_the_documents_chain() -> None:
    """In a process of its own; what needs `langchain` says so."""
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"langchain", "langchain_classic", "langgraph", "llama_index"}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from kvcag.errors import MissingExtraError
from kvcag.langchain import ChatKVCAG, CubeRetriever, SchedulerCallback, create_cag_documents_chain
from kvcag.testing import EchoEngine
prompt = ChatPromptTemplate.from_messages([("human", "{context}")])
chain = create_cag_documents_chain(ChatKVCAG(engine=EchoEngine()), prompt)
assert chain.invoke({"context": [Document("a"), Document("b")]}) == "a\\n\\nb"
try:
    from kvcag.langchain import KVCAGMiddleware
except MissingExtraError as error:
    assert "pip install 'kvcag[agents]'" in str(error), error
else:
    raise AssertionError("KVCAGMiddleware needs langchain")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
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


def test_tests_find_their_helpers_without_changing_the_path() -> None:
    """By `pythonpath` in pyproject.toml, and by the working directory of the processes that they start."""
    changed = "sys" + ".path."
    tests = [path for path in (ROOT.parent / "tests").rglob("*.py") if changed in path.read_text(encoding="utf-8")]
    assert tests == []


def test_types_ship() -> None:
    assert (ROOT / "py.typed").is_file()
    assert {module.name for module in pkgutil.iter_modules([str(ROOT)])} >= {"core", "memory", "stores"}
