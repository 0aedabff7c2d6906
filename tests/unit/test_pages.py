"""What the pages name is there: commands and options, public names, messages of errors, figures of results."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import pydoc
import re
import shlex
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from tests.pages import ROOT, Block, blocks, named, pages_with


@pytest.mark.parametrize("page", pages_with("py"), ids=named)
def test_fragments_are_python(page: Path) -> None:
    for block in blocks(page, "py"):
        compile("\n" * (block.line - 1) + block.body, str(page), "exec")


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

MINUS = "\N{MINUS SIGN}"
RESULTS = ROOT / "benchmarks" / "results"


def rows(page: str) -> set[tuple[str, ...]]:
    """The rows of a page's tables."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("| ")}


def first_tokens() -> list[tuple[str, str, str]]:
    """Of each length in the report: the context's tokens, a full prefill, and kvcag over a context that is known."""
    report = json.loads((RESULTS / "report" / "report.json").read_text())
    found = []
    for row in report["rows"]:
        full, exact = (row["systems"][name]["ttft_s"] for name in ("transformers, full prefill", "kvcag, exact"))
        found.append((f"{row['context_tokens']:,}", f"{full:.2f} s", f"{exact:.2f} s"))
    return found


def test_times_to_first_token_are_those_of_the_last_report() -> None:
    assert set(first_tokens()) <= {row[:3] for row in rows("docs/rag-or-cag.md")}


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_pages_quote_the_last_report(page: str) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    quoted = [
        f"over {tokens} tokens" in text and f"{exact} instead of {full}" in text
        for tokens, full, exact in first_tokens()
    ]
    assert sum(quoted) == 2


def test_the_first_minutes_are_those_of_the_last_run() -> None:
    run = json.loads((RESULTS / "first-minutes.json").read_text())
    page = (ROOT / "docs" / "first-minutes.md").read_text(encoding="utf-8")
    assert f"{run['changed_lines']} marked lines" in page
    *typed, chains = run["journeys"]
    taken = [f"{step['s']:.3g} s" for journey in typed for step in journey["steps"]]
    assert re.findall(r"\| ([\d.]+ s) \|$", page, re.M)[: len(taken)] == taken
    for step in chains["steps"][1:]:
        assert " | ".join(f"{each} s" for each in step["each_s"]) in page


def test_the_race_is_run_by_the_last_report() -> None:
    drawn = (ROOT / "docs" / "img" / "race.svg").read_text(encoding="utf-8")
    assert any(
        f"reads {tokens} tokens" in drawn
        and f"after {float(full[:-2]):.1f} s" in drawn
        and f"after {exact}: {float(full[:-2]) / float(exact[:-2]):.0f} ×" in drawn
        for tokens, full, exact in first_tokens()
    )


def test_the_sessions_on_cag_or_rag_are_those_of_the_last_run() -> None:
    page = (ROOT / "docs" / "rag-or-cag.md").read_text(encoding="utf-8")
    shown = {row[1] for row in rows("docs/rag-or-cag.md") if len(row) == 3}
    session = json.loads((RESULTS / "langchain_rag.json").read_text())["summary"]
    assert {f"{system['later_ttft_s']:.2f} s" for system in session.values()} <= shown
    made = json.loads((RESULTS / "llama_index_rag.json").read_text())
    rag, cag = (made["systems"][name]["ttft_s"] for name in ("rag", "cag"))
    even = made["ingestion_s"] / (rag - cag)
    assert f"{made['ingestion_s']:.1f} / ({rag:.2f} {MINUS} {cag:.2f}) = {even:.0f} questions" in page
    for row in json.loads((RESULTS / "fidelity" / "cpu-3000.json").read_text())["rows"]:
        if row["strategy"] == "query":
            assert f'{row["ratio"]:.0%} recomputed, 3,107 tokens": {row["ttft_over_full_prefill"]:.3f},' in page


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "package",
    ["kvcag", "kvcag.stores", "kvcag.scheduler", "kvcag.langchain", "kvcag.llama_index", "kvcag.tools", "kvcag.sizing"],
)
def test_the_reference_names_everything_public(package: str) -> None:
    module = importlib.import_module(package)
    page = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = [pydoc.locate(path) for path in re.findall(r"^::: (\S+)", page, re.M)]
    for whole in [entry for entry in shown if isinstance(entry, types.ModuleType)]:
        shown += vars(whole).values()
    public = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == package and name[0] != "_"
    ]
    missing = [name for name in public if not any(entry is getattr(module, name) for entry in shown)]
    assert not missing, f"docs/api/ lacks {package}: {', '.join(missing)}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "examples/README.md"])
def test_links_outside_of_the_site_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    assert not [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()]


@pytest.mark.parametrize(
    ("word", "pages"),
    {
        "GPU": ("index", "quickstart", "benchmarks", "rag-or-cag", "models", "sizing"),
        "speed": ("benchmarks", "rag-or-cag"),
        "latency": ("benchmarks", "rag-or-cag"),
        "TTFT": ("benchmarks",),
        "RAG": ("index", "rag-or-cag", "quickstart"),
        "FAQ": ("index", "faq-bot"),
        "cache": ("index", "concepts", "operations"),
        "faster": ("index", "rag-or-cag"),
    }.items(),
)
def test_the_site_s_search_finds_what_people_type(word: str, pages: tuple[str, ...]) -> None:
    """It reads titles and text; what stands in a page's front matter alone is not found."""
    for page in pages:
        _, _, text = re.sub(r"\A---.*?^---$", "", read_page(page), flags=re.S | re.M).partition("# ")
        assert re.search(rf"\b{word}", text), f"docs/{page}.md does not say {word}"


def read_page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


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
