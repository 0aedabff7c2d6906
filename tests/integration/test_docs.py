"""Everything that the pages show is run: Python is executed, shell commands are parsed, links are followed."""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib
import io
import itertools
import json
import os
import pydoc
import re
import shlex
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
import typer.main

from kvcag.engines.loading import load

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    line: int
    """Of its first line, in the page."""
    follows: bool
    """Nothing but white space stands between the block before and this one."""


def blocks(page: Path, *languages: str) -> list[Block]:
    text, end, found = page.read_text(encoding="utf-8"), 0, []
    for fence in FENCE.finditer(text):
        follows = bool(found) and not text[end : fence.start()].strip()
        end = fence.end()
        line = text.count("\n", 0, fence.start("body")) + 1
        found.append(Block(fence["language"], textwrap.dedent(fence["body"]), line, follows))
    return [block for block in found if not languages or block.language in languages]


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, *languages)]


def named(page: Path) -> str:
    return page.name


# --- Python ---------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("kvcag.engines.hf.load", lambda *given: load_once(*given[:3], json.dumps(given[3])))
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


@pytest.mark.parametrize("page", pages_with("py"), ids=named)
def test_fragments_are_python(page: Path) -> None:
    for block in blocks(page, "py"):
        compile("\n" * (block.line - 1) + block.body, str(page), "exec")


def test_output_that_differs_is_noticed() -> None:
    assert shows("a … c\n", "a b c \n")
    assert not shows("a … c", "a b d")
    assert not shows("a", "a\nb")


# --- the shell ------------------------------------------------------------------------------------------------------


def commands(block: Block) -> Iterator[list[str]]:
    """Each command of a block: what a pipe, `&&` or `;` separates, without redirections and assignments."""
    for line in re.sub(r"\\\n", " ", block.body).splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word in ("|", "||", "&&", ";", "&"):
                words = list(itertools.takewhile(lambda word: not re.match(r"\d?[<>]", word), words))
                words = list(itertools.dropwhile(lambda word: re.match(r"\w+=|\$$", word), words))
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def check_kvcag(words: list[str]) -> None:
    """That the command is there, and takes these options and this many arguments."""
    from kvcag.cli.app import app

    command = typer.main.get_command(app)
    if words and words[0] in ("--version", "--help"):
        return
    assert words, "kvcag without a command"
    assert words[0] in command.commands, f"there is no command {words[0]!r}"
    inner = command.commands[words[0]]
    while len(words) > 1 and words[1] in getattr(inner, "commands", {}):  # `kvcag scheduler log`
        words = words[1:]
        inner = inner.commands[words[0]]
    context = inner.context_class(inner, info_name=words[0])
    given, rest, _ = inner.make_parser(context).parse_args(words[1:])
    assert not rest, f"{words}: {rest} is too much"
    missing = [p.name for p in inner.params if p.required and given.get(p.name) in (None, ())]
    assert not missing or "--help" in words, f"{words}: {missing} is missing"


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    wanted = [word for word in words if "=" not in word]
    assert wanted
    assert set(wanted) <= set(targets), f"make {wanted}: targets are {targets}"


def check_pip(words: list[str]) -> None:
    described = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^([\w-]+) = \[", described.split("[project.optional-dependencies]")[1], re.M))
    for word in words:
        if found := re.fullmatch(r"kvcag\[(.+)\]", word):
            assert set(found[1].split(",")) <= extras, f"{word}: extras are {sorted(extras)}"


def check_python(words: list[str]) -> None:
    for word in words:
        if word.endswith(".py"):
            assert (ROOT / word).is_file(), f"there is no {word}"


CHECKS = {"kvcag": check_kvcag, "make": check_make, "pip": check_pip, "python": check_python}


@pytest.mark.parametrize("page", pages_with("sh"), ids=named)
def test_the_pages_commands_can_be_given(page: Path) -> None:
    for block in blocks(page, "sh"):
        for program, *words in commands(block):
            if program in CHECKS:
                CHECKS[program](words)


@pytest.mark.parametrize(
    "wrong",
    ["kvcag nosuch", "kvcag verify --nosuch .", "kvcag import-memos x", "make nosuch", "pip install 'kvcag[nosuch]'"],
)
def test_a_command_that_cannot_be_given_is_noticed(wrong: str) -> None:
    [[program, *words]] = commands(Block("sh", wrong, 1, False))
    with pytest.raises(Exception, match=r"no command|No such option|missing|targets|extras"):
        CHECKS[program](words)


# --- figures --------------------------------------------------------------------------------------------------------

RESULTS = ROOT / "benchmarks" / "results"


def rows(page: str) -> set[tuple[str, ...]]:
    """The rows of a page's tables."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("| ")}


@pytest.mark.parametrize("page", ["README.md", "docs/rag-or-cag.md"])
def test_times_to_first_token_are_those_of_the_last_run(page: str) -> None:
    shown = {row[:3] for row in rows(page)}
    for row in json.loads((RESULTS / "ttft.json").read_text())["rows"]:
        assert (f"{row['context_tokens']:,}", f"{row['full_s']:.2f} s", f"{row['cached_s']:.2f} s") in shown


def test_the_sessions_on_cag_or_rag_are_those_of_the_last_run() -> None:
    page = (ROOT / "docs" / "rag-or-cag.md").read_text(encoding="utf-8")
    shown = {row[1] for row in rows("docs/rag-or-cag.md") if len(row) == 3}
    session = json.loads((RESULTS / "langchain_rag.json").read_text())["summary"]
    assert {f"{system['later_ttft_s']:.2f} s" for system in session.values()} <= shown
    made = json.loads((RESULTS / "llama_index_rag.json").read_text())
    rag, cag = (made["systems"][name]["ttft_s"] for name in ("rag", "cag"))
    even = made["ingestion_s"] / (rag - cag)
    assert f"{made['ingestion_s']:.1f} / ({rag:.2f} − {cag:.2f}) = {even:.0f} questions" in page
    for row in json.loads((RESULTS / "fidelity" / "cpu-3000.json").read_text())["rows"]:
        if row["strategy"] == "query":
            assert f'{row["ratio"]:.0%} recomputed, 3,046 tokens": {row["ttft_over_full_prefill"]:.3f},' in page


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "package",
    ["kvcag", "kvcag.stores", "kvcag.scheduler", "kvcag.langchain", "kvcag.llama_index", "kvcag.tools", "kvcag.sizing"],
)
def test_the_reference_names_everything_public(package: str) -> None:
    module = importlib.import_module(package)
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = [pydoc.locate(path) for path in re.findall(r"^::: (\S+)", page, re.M)]
    for whole in [entry for entry in shown if isinstance(entry, types.ModuleType)]:
        shown += vars(whole).values()
    public = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == package and name[0] != "_"
    ]
    missing = [name for name in public if not any(entry is getattr(module, name) for entry in shown)]
    assert not missing, f"docs/api.md lacks {package}: {', '.join(missing)}"


def test_troubleshooting_has_every_error() -> None:
    import kvcag.errors as errors

    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = {name for line in re.findall(r"^#+ (.+)$", page, re.M) for name in re.findall(r"`(\w+)`", line)}
    ours = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.KVCAGError)}
    assert ours - headings <= {"KVCAGError"}


def said() -> str:
    """Every text in the package's code, a `\0` in the place of each value that is put into it."""
    texts = []
    for path in (ROOT / "kvcag").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_troubleshooting_quotes_what_is_said() -> None:
    code = said()
    for block in blocks(ROOT / "docs" / "troubleshooting.md", "text"):
        for part in re.split(r"…|\. ", " ".join(block.body.split())):  # a sentence may be another text in the code
            quoted = part.strip(" .()")
            assert quoted in code, f"troubleshooting.md:{block.line}: nothing says {quoted!r}"


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


def test_the_architecture_page_says_what_every_module_does(site: Path) -> None:
    shown = (site / "architecture" / "index.html").read_text(encoding="utf-8")
    package = ROOT / "kvcag"
    names = {file.relative_to(package).with_suffix("").as_posix() for file in package.rglob("[!_]*.py")}
    assert not {name for name in names if f"<td><code>{name}</code></td>" not in shown}


def test_diagrams_are_drawn(site: Path) -> None:
    drawn = (site / "architecture" / "index.html").read_text(encoding="utf-8")
    assert '<figure class="diagram"><svg' in drawn
    assert 'class="mermaid"' not in drawn
