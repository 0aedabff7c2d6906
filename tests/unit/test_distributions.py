"""The thin distributions under the frameworks' names: built, and imported from a clean folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import kvcag
import kvcag.langchain
import kvcag.llama_index

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LLAMA_INDEX = ROOT / "distributions" / "llama-index-llms-kvcag"
LANGCHAIN = ROOT / "distributions" / "langchain-kvcag"


@pytest.mark.parametrize(
    ("home", "module", "expected"),
    [
        (LLAMA_INDEX, "llama_index.llms.kvcag", kvcag.llama_index.__all__),
        (LANGCHAIN, "langchain_kvcag", kvcag.langchain.__all__),
    ],
    ids=["llama_index", "langchain"],
)
def test_it_is_imports_and_metadata(tmp_path: Path, home: Path, module: str, expected: list[str]) -> None:
    if find_spec("setuptools") is None:  # not imported here: it refuses to be, once distutils is
        pytest.skip("needs setuptools")
    source = shutil.copytree(home, tmp_path / "source")  # setuptools builds where the source is
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True, timeout=200)
    [wheel] = tmp_path.glob("*.whl")
    target = tmp_path / "target"
    with zipfile.ZipFile(wheel) as archive:
        code = [name for name in archive.namelist() if ".dist-info/" not in name]
        archive.extractall(target)
    folder = module.replace(".", "/")
    assert code == [f"{folder}/__init__.py", f"{folder}/py.typed"]
    script = f"import json, {module} as k; print(json.dumps([k.__file__, *(n for n in k.__all__ if getattr(k, n))]))"
    seen = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=200,
    )
    file, *names = json.loads(seen.stdout)
    assert Path(file).is_relative_to(target)
    assert names == expected


def test_llama_indexs_metadata_is_that_of_an_integration() -> None:
    about = tomllib.loads((LLAMA_INDEX / "pyproject.toml").read_text())
    assert about["project"]["version"] == kvcag.__version__
    assert about["project"]["dependencies"] == [f"kvcag[llama-index]=={kvcag.__version__}"]
    assert about["tool"]["llamahub"]["import_path"] == "llama_index.llms.kvcag"
    assert set(about["tool"]["llamahub"]["class_authors"]) <= set(kvcag.llama_index.__all__)


def test_langchains_metadata_is_that_of_an_integration() -> None:
    about = tomllib.loads((LANGCHAIN / "pyproject.toml").read_text())["project"]
    assert about["version"] == kvcag.__version__
    assert about["dependencies"] == [f"kvcag[langchain]=={kvcag.__version__}"]
