"""Every command ends with a suggested command that can be typed unchanged."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvcag import HFEngine, KVCacheMemory
from kvcag.cli.app import app
from kvcag.scheduler import CacheScheduler
from kvcag.testing import byte_tokenizer, tiny_model
from tests.commands import Done, Kvcag, write
from tests.memos_pickles import dump, written
from tests.memos_pickles import memos as memos  # the fixture

ASK = ["ask", "Your question?"]


def following(done: Done) -> list[str]:
    """The words of the last line on stderr, without `next: kvcag`."""
    last = done.err.splitlines()[-1].removeprefix("kvcag: ")
    assert last.startswith("next: "), done.err
    return shlex.split(last.removeprefix("next: ").removeprefix("kvcag "))


@pytest.fixture
def ready(kvcag: Kvcag) -> Kvcag:
    """With `notes` encoded, a store in which a file is damaged, and documents for the doctor."""
    kvcag("encode", "notes")
    for number in range(4):
        write(kvcag.folder / "corpus" / f"{number}.txt", f"{number} " * 100)
    return kvcag


def test_each_command_suggests_a_next_command_that_works(ready: Kvcag) -> None:
    item = ready("ls", "--json").json[0]["id"].removeprefix("kv:sha256:")[:12]
    few = ["--max-new-tokens", 2]
    said: dict[Sequence[object], list[str]] = {
        ("encode", "notes"): ASK,
        ("sync", "notes"): ASK,
        ("ls",): ["inspect", item],
        ("inspect", item): [*ASK, "--id", item],
        ("ask", "Who?", *few): ["chat"],
        ("ask", "Who?", *few, "--strategy", "rotate"): ["chat", "--strategy", "rotate"],
        ("ask", "notes", "Who?", *few): ["chat", "--source", "notes"],
        ("ask", "Who?", "--id", item, *few): ["chat", "--id", item],
        ("verify",): ["ls"],
        ("demo", "--corpus", "notes", "--question", "Who?", *few): ["ask", "notes", "Your question?"],
        ("bench", "--tokens", 64, "--repeat", 1, "--corpus", "notes"): ["doctor", "--corpus", "notes"],
        ("size",): ["bench"],
        ("size", "--prefill-tokens-per-s", 9000, "--load-bytes-per-s", 3e9): ["encode", "PATH"],
        ("doctor", "--corpus", "corpus", "--probes", 1): ["ask", "corpus", "Your question?"],
    }
    for typed, expected in said.items():
        assert following(ready(*typed)) == expected, typed


def test_chat_suggests_a_command_at_its_end(ready: Kvcag) -> None:
    asked = ready("chat", "--source", "notes", "--max-new-tokens", 2, input="Who?\n")
    assert following(asked) == ["doctor", "--corpus", "notes"], "merged, and nobody measured what that costs"
    assert following(ready("chat", "--strategy", "exact", "--max-new-tokens", 2, input="Who?\n")) == ["ls"]


def test_the_suggestion_takes_over_typed_options(ready: Kvcag) -> None:
    model = ready.environment.pop("KVCAG_MODEL")
    place = ["--store", "a folder", "--namespace", "ada"]
    done = ready("encode", "notes", "--model", model, *place, "--split", 100)
    assert following(done) == [*ASK, "--model", model, *place]
    assert following(ready("ls", *place))[2:] == place, "ls takes no model"
    assert following(ready("rm", "--all", "--yes", *place)) == ["ls", *place]


def test_after_a_dry_run_the_real_run_is_suggested(ready: Kvcag) -> None:
    assert following(ready("sync", "notes", "--dry-run")) == ASK, "nothing would change"
    write(ready.folder / "notes" / "new.md", "New.")
    rehearsed = ready("sync", "notes", "--dry-run", "--split", 64)
    assert following(rehearsed) == ["sync", "notes", "--split", "64"]
    assert following(ready(*following(rehearsed))) == ASK


def test_damage_is_repaired_next_and_then_encoded_again(ready: Kvcag) -> None:
    file = next((ready.folder / "kv").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    found = ready("verify")
    assert found.code == 1
    assert "After --repair, `kvcag encode` or `sync` encodes the texts again" in found.err
    assert following(found) == ["verify", "--repair"]
    assert following(ready(*following(found))) == ["encode", "PATH"]


def test_where_nothing_is_found_too(ready: Kvcag) -> None:
    for typed in (["ls", "--source", "nowhere"], ["rm", "--source", "nowhere"], ["purge", "nowhere to be found"]):
        assert following(ready(*typed)) == ["ls"], typed
    assert following(ready("purge", "notes/a.md")) == ["ls"]
    assert following(ready("rm", "--all", "--yes")) == ["ls"]
    assert following(ready("ls")) == ["encode", "PATH"]


def test_a_next_step_in_python_is_suggested_as_python_code(ready: Kvcag) -> None:
    file = dump(ready.folder / "memos.pickle", {"kv_cache_memories": {"an id": written()}})
    done = ready("import-memos", file, "--out", "out")
    assert following(done)[0].startswith("KVCacheMemory(")


def test_a_scheduler_says_how_to_ask_why(ready: Kvcag) -> None:
    state = ready.folder / "state.sqlite"
    memory = KVCacheMemory(HFEngine(tiny_model(), byte_tokenizer()))
    with CacheScheduler(memory, 1 << 20, state=state, every_s=None, quiet_s=0) as scheduler:
        scheduler.observe("The library opens at nine.")
    listed = ready("scheduler", state)
    assert following(listed) == ["scheduler", str(state), "TEXT"]
    assert following(ready("scheduler", state, "unknown")) == ["scheduler", str(state)]


def test_json_is_for_programs(ready: Kvcag) -> None:
    for typed in (["ls"], ["encode", "notes"], ["verify"], ["size"], ["purge", "notes/a.md"]):
        assert "next:" not in ready(*typed, "--json").err


def test_this_page_knows_every_command() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert f'("{name}"' in text or f'["{name}"' in text, name
