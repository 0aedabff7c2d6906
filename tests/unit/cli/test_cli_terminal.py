"""Control characters in stored texts and answers are shown, and not executed by the terminal."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from kvcag.cli import common
from kvcag.stores.disk import DiskStore
from tests.commands import Done, Kvcag, write
from tests.stored import random_item

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08\x7f\u202eabc"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def assert_plain(done: Done, *, shows: bool = True) -> None:
    assert not OBEYED.search(done.out + done.err)
    assert ("owned" in done.out + done.err) is shows


def put(kvcag: Kvcag, id: str = "an id") -> DiskStore:
    store = DiskStore(kvcag.folder / "kv")
    store.put(random_item(id, text=f"Text {HOSTILE}", metadata={"source": f"/x/{HOSTILE}", "title": HOSTILE}))
    return store


def test_help_fills_the_lines_of_the_screen(kvcag: Kvcag) -> None:
    """Regression: help text was broken at the line ends of the source as well."""
    out = kvcag("ask", "--help").out
    _, description, *_ = re.split(r"\n\s*\n", out.partition("Answer a question")[2])
    lines, width = description.split("\n"), max(map(len, out.splitlines())) - 2
    assert len(lines) > 1
    for line, following in pairwise(map(str.strip, lines)):
        assert len(f"{line} {following.split()[0]}") > width


@pytest.mark.parametrize("command", ["ls", "ls --json", "inspect an", "inspect an --json"])
def test_escapes_of_a_stored_text_never_reach_a_terminal(kvcag: Kvcag, command: str) -> None:
    put(kvcag)
    assert_plain(kvcag(*command.split()))


def test_json_lists_the_stored_items(kvcag: Kvcag) -> None:
    put(kvcag)
    assert kvcag("inspect", "an", "--json").json["metadata"]["title"] == HOSTILE


def test_escapes_in_an_id_or_a_path_never_reach_a_terminal(kvcag: Kvcag) -> None:
    put(kvcag, HOSTILE)
    assert_plain(kvcag("rm", HOSTILE.replace("abc", "no such id")))
    assert_plain(kvcag("ls"))
    assert_plain(kvcag("encode", f"no such {HOSTILE}"))
    named = write(kvcag.folder / "notes" / f"{HOSTILE.replace('/', '')}.md", "Some text.")
    done = kvcag("encode", named)
    assert not OBEYED.search(done.out + done.err)


def test_escapes_in_a_damaged_file_never_reach_a_terminal(kvcag: Kvcag) -> None:
    store = put(kvcag)
    store.put(random_item(HOSTILE))
    store.file("an id").write_bytes(store.file(HOSTILE).read_bytes())
    assert_plain(kvcag("verify"))
    assert_plain(kvcag("verify", "--json"))


def test_escapes_in_an_answer_never_reach_a_terminal(kvcag: Kvcag, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcag.engines.decode import Detokenizer

    monkeypatch.setattr(Detokenizer, "push", lambda *_: HOSTILE)
    kvcag("encode", "notes")
    done = kvcag("ask", "What?", "--max-new-tokens", 3)
    assert done.code == 0, done.err
    assert_plain(done)


def test_only_one_module_writes_to_the_terminal() -> None:
    rooms = {path.name: path.read_text() for path in Path(common.__file__).parent.glob("*.py")}
    assert sorted(name for name, text in rooms.items() if "typer.echo" in text) == ["app.py", "common.py"]


def test_plain_text_is_not_changed() -> None:
    for text in ("Zeile\n\tzwei", "日本語 🙂 naïve", "a|b \\ u001b"):
        assert common.plain(text) == text
        assert json.loads(json.dumps(text)) == text
