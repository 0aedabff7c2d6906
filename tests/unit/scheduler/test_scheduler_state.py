"""A scheduler's state file: reading after a restart and by the command line, and refusal of damaged files."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcag import HFEngine, KVCacheMemory
from kvcag.chat_template import Document, Prompt
from kvcag.cli.app import app
from kvcag.core import TextualMemoryItem
from kvcag.errors import InvalidInputError, SchedulerStateError, StoreUnavailableError
from kvcag.scheduler import CacheScheduler, read_texts
from kvcag.scheduler.texts import Texts
from kvcag.stores.disk import DiskStore
from kvcag.testing import byte_tokenizer, tiny_model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "scheduler.sqlite"


def scheduler_of(path: Path, **settings: object) -> CacheScheduler:
    memory = KVCacheMemory(HFEngine(tiny_model(), byte_tokenizer()), DiskStore(path.parent / "kv"))
    return CacheScheduler(memory, 1 << 20, state=path, every_s=None, quiet_s=0, **settings)  # type: ignore[arg-type]


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def test_counters_survive_a_restart(path: Path) -> None:
    with scheduler_of(path) as scheduler:
        scheduler.observe([TextualMemoryItem(id="a", memory="one", metadata={"source": "a.md"}), "two"])
        scheduler.observe("one")
        before = scheduler._texts
    with scheduler_of(path) as scheduler:
        after = scheduler._texts
        assert after.known == before.known
        assert (after.now, after._identities) == (before.now, before._identities)
        assert sorted(len(stats.sources) for stats in after.known.values()) == [0, 1]
        scheduler.observe(TextualMemoryItem(id="a", memory="another one"))
        assert len(after.known) == 2  # it is known what `a` stood for: "one" was forgotten


def test_the_file_is_for_this_user_alone(path: Path) -> None:
    with scheduler_of(path):
        assert {file.stat().st_mode & 0o777 for file in path.parent.glob(f"{path.name}*")} == {0o600}
        assert Path(f"{path}.owner").is_file()
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_one_scheduler_at_a_time(path: Path) -> None:
    with scheduler_of(path), pytest.raises(SchedulerStateError, match="in use by another scheduler"):
        scheduler_of(path)
    scheduler_of(path).close()


def test_a_program_that_locks_the_database_is_named_as_the_cause(path: Path) -> None:
    with scheduler_of(path) as scheduler:
        scheduler._texts._state._db.execute("PRAGMA busy_timeout = 10")  # type: ignore[union-attr]
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        scheduler.observe("one")
        with pytest.raises(SchedulerStateError, match="locked by another program"):
            scheduler.run_once()
        other.execute("ROLLBACK")
        other.close()
        scheduler.run_once()
    with scheduler_of(path) as scheduler:
        assert scheduler.metrics()["documents"] == 1  # what could not be written down then was written down later


def test_an_answer_comes_though_the_state_is_locked(path: Path) -> None:
    with scheduler_of(path) as scheduler:
        scheduler._texts._state._db.execute("PRAGMA busy_timeout = 10")  # type: ignore[union-attr]
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        messages = [{"role": "system", "content": [Document("A document.\n\n")]}, {"role": "user", "content": "What?"}]
        sampling = scheduler.memory.engine.sampling(max_new_tokens=2)
        assert list(scheduler.memory.stream(messages, sampling=sampling))
        assert len(scheduler.memory) == 1  # nothing was evicted, so its text need not be saved yet
        other.close()


@pytest.mark.parametrize("what", ["rubbish", "cut", "flipped"])
def test_a_damaged_database_is_named_and_what_to_do(path: Path, what: str) -> None:
    with scheduler_of(path) as scheduler:
        for number in range(300):
            scheduler.observe(f"Text {number} " * 20)
    data = path.read_bytes()
    assert len(data) > 20 * 4096
    if what == "rubbish":
        path.write_bytes(b"this is no database" * 500)
    elif what == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(
            data[:8192] + bytes(byte ^ 0x5A for byte in data[8192 : 8192 + 4096 * 8]) + data[8192 + 4096 * 8 :]
        )
    with pytest.raises(SchedulerStateError, match=r"scheduler\.sqlite is damaged.*Delete it"):
        scheduler_of(path)
    assert path.exists()  # nothing is deleted or overwritten by itself


def test_a_file_of_another_program_is_not_changed(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE mine(a)")
    other.commit()
    other.close()
    before = path.read_bytes()
    with pytest.raises(SchedulerStateError, match="another program's database"):
        scheduler_of(path)
    assert path.read_bytes() == before
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(SchedulerStateError, match="upgrade kvcag"):
        Texts(newer, "model")
    with pytest.raises(StoreUnavailableError):
        Texts(tmp_path, "model")


def test_a_save_that_fails_is_made_up_for(path: Path) -> None:
    texts = Texts(path, "model")
    texts.retrieved("one")
    texts._state._db.execute("PRAGMA busy_timeout = 10")  # type: ignore[union-attr]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(SchedulerStateError, match="locked"):
            texts.save()
    texts.save()
    texts.close()
    read = Texts(path, "model")
    assert read.known == texts.known
    assert [stats.text for stats in read.known.values()] == ["one"]
    read.close()


def test_what_prompts_look_like_survives_a_restart_for_the_same_model(path: Path) -> None:
    texts = Texts(path, "model")
    texts.asked(Prompt((1, 2), ((3,),), (9,), documents=("one\n\n",)))
    texts.save()
    texts.close()
    for model, expected in (("model", ((1, 2), "\n\n")), ("another", (None, None))):
        read = Texts(path, model)
        assert (read.head_ids, read.ending) == expected
        read.close()


def test_decisions_are_read_while_the_scheduler_works(path: Path) -> None:
    with scheduler_of(path) as scheduler:
        scheduler.observe("It was seen.")
        [key] = scheduler.promote("The tower is tall.")
        scheduler.demote(key)
        assert read_texts(path)[-1] == scheduler.why(key)
        code, out = run("scheduler", path, "--json")
        assert code == 0
        entries = [json.loads(line) for line in out.splitlines()]
        assert [(entry["action"], entry["id"]) for entry in entries] == [("seen", ""), ("demoted", key)]
        assert entries[1]["tokens"] == len("The tower is tall.\n\n")
        assert entries[1]["reason"] == "on demand"
        code, out = run("scheduler", path, "--limit", 1)
        assert code == 0
        assert "The tower is tall." in out
        assert "on demand" in out
        assert "It was seen." not in out
        scheduler.promote(key)
        for text in ("The tower is tall.", key):
            code, out = run("scheduler", path, text)
            assert code == 0
            assert out.startswith("cached: promoted at 20")
        code, out = run("scheduler", path, "It was seen.", "--json")
        assert json.loads(out)["count"] == 1
        code, out = run("scheduler", path, "Never seen.")
        assert code == 1
        assert "not known" in out
    assert [stats.is_cached for stats in read_texts(path)] == [False, True]  # also after it was closed


def test_a_file_that_is_no_state_is_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="there is no file"):
        read_texts(path)
    assert run("scheduler", path)[0] == 2
    assert not path.exists()
    with contextlib.closing(sqlite3.connect(tmp_path / "other")) as other:
        other.execute("CREATE TABLE mine(a)")
    with pytest.raises(SchedulerStateError, match="another program's database"):
        read_texts(tmp_path / "other")
    (tmp_path / "rubbish").write_text("rubbish " * 1000)
    with pytest.raises(SchedulerStateError, match="damaged"):
        read_texts(tmp_path / "rubbish")


def test_a_state_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailableError):
        Texts(tmp_path / "file" / "state.sqlite", "model")
