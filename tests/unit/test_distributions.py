"""The thin distributions under the frameworks' names: built, and imported from a clean folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kvcag
import kvcag.llama_index

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LLAMA_INDEX = ROOT / "distributions" / "llama-index-llms-kvcag"


def test_llama_indexs_is_imports_and_metadata(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = shutil.copytree(LLAMA_INDEX, tmp_path / "source")  # setuptools builds where the source is
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True, timeout=200)
    [wheel] = tmp_path.glob("*.whl")
    target = tmp_path / "target"
    with zipfile.ZipFile(wheel) as archive:
        code = [name for name in archive.namelist() if ".dist-info/" not in name]
        archive.extractall(target)
    assert code == ["llama_index/llms/kvcag/__init__.py", "llama_index/llms/kvcag/py.typed"]
    seen = subprocess.run(
        [sys.executable, "-c", "import json, llama_index.llms.kvcag as k; print(json.dumps([k.__file__, *k.__all__]))"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=200,
    )
    file, *names = json.loads(seen.stdout)
    assert Path(file).is_relative_to(target)
    assert names == kvcag.llama_index.__all__


def test_llama_indexs_metadata_is_that_of_an_integration() -> None:
    about = tomllib.loads((LLAMA_INDEX / "pyproject.toml").read_text())
    assert about["project"]["version"] == kvcag.__version__
    assert about["project"]["dependencies"] == [f"kvcag[llama-index]=={kvcag.__version__}"]
    assert about["tool"]["llamahub"]["import_path"] == "llama_index.llms.kvcag"
    assert set(about["tool"]["llamahub"]["class_authors"]) <= set(kvcag.llama_index.__all__)
