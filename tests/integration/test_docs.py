"""Every Python block of the pages is executed, the site is built, and every link in it is followed."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

from kvcag.engines.loading import load
from tests.pages import ROOT, Block, blocks, named, pages_with

# --- Python ---------------------------------------------------------------------------------------------------------


FACE = "Qwen/Qwen3-4B-Instruct-2507"
"""The model that pages name. Here the embedded one takes its place: its answers are those that the pages show."""


@functools.cache
def load_once(name: str, dtype: str, device: str, settings: str) -> tuple[Any, Any]:
    return load(name, dtype, device, json.loads(settings))


@pytest.fixture
def reader(tmp_path: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A new user: an empty folder, nothing calibrated, the embedded model at hand."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "models").symlink_to(smollm2_path.parent)
    monkeypatch.setenv("KVCAG_CACHE", str(cache))
    # One copy of the weights for all pages: each has engines of its own over them.
    named = {FACE: str(smollm2_path)}
    monkeypatch.setattr(
        "kvcag.engines.hf.load",
        lambda name, *given, **_: load_once(named.get(name, name), *given[:2], json.dumps(given[2])),
    )
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    module = types.ModuleType("page")  # classes that a page defines look their annotations up in their module
    monkeypatch.setitem(sys.modules, "page", module)
    yield module
    module.__dict__.clear()
    gc.collect()


def run(block: Block, page: Path, module: types.ModuleType) -> str:
    """What a block prints. Its lines have the page's numbers in a traceback."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * (block.line - 1) + block.body, str(page), "exec"), module.__dict__)
    return out.getvalue()


def tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def shows(shown: str, printed: str) -> bool:
    """Whether a page shows what is printed; `…` in it stands for anything."""
    return re.fullmatch(".*?".join(map(re.escape, tidy(shown).split("…"))), tidy(printed), re.S) is not None


# LlamaIndex's Memory leaves the connection to its in-memory database to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("page", pages_with("python"), ids=named)
def test_the_pages_code_runs_and_prints_what_the_page_shows(page: Path, reader: types.ModuleType) -> None:
    printed = None
    for block in blocks(page):
        if block.language == "python":
            printed = run(block, page, reader)
        elif block.language == "text" and block.follows and printed is not None:
            assert shows(block.body, printed), f"{page.name}:{block.line} shows\n{block.body}\nand it prints\n{printed}"
        else:
            printed = None


def test_output_that_differs_is_noticed() -> None:
    assert shows("a … c\n", "a b c \n")
    assert not shows("a … c", "a b d")
    assert not shows("a", "a\nb")


# --- the site -------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Where a page points to, and what can be pointed to in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.add(value)
            elif name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    return out


def test_no_link_within_the_site_is_dead(site: Path) -> None:
    pages = {page: Links(page.read_text(encoding="utf-8")) for page in site.rglob("*.html") if page.name != "404.html"}
    dead = []
    for page, links in pages.items():
        for target in links.targets:
            if re.match(r"[a-z]+:|//", target):
                continue
            path, anchor = urldefrag(unquote(target))
            there = (page.parent / path).resolve() if path else page
            there = there / "index.html" if there.is_dir() else there
            if not there.is_file() or (anchor and there in pages and anchor not in pages[there].anchors):
                dead.append(f"{page.relative_to(site)} → {target}")
    assert not dead, "\n".join(dead)


def test_the_site_needs_no_network(site: Path) -> None:
    foreign = [
        f"{page.relative_to(site)}: {found}"
        for page in site.rglob("*.html")
        for found in re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?://[^\"]+)", page.read_text("utf-8"))
        if 'rel="canonical"' not in found
    ]
    assert not foreign


def test_diagrams_are_drawn(site: Path) -> None:
    drawn = (site / "architecture" / "index.html").read_text(encoding="utf-8")
    assert '<figure class="diagram"><svg' in drawn
    assert 'class="mermaid"' not in drawn
