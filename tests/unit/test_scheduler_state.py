"""What a scheduler writes down: read again after a restart, by the command line, and refused where it is damaged."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvcag import HFEngine, KVCacheMemory
from kvcag.cli.app import app
from kvcag.core import TextualMemoryItem
from kvcag.errors import InvalidInputError, SchedulerStateError, StoreUnavailableError
from kvcag.scheduler import CacheScheduler, caches_of, log_of
from kvcag.scheduler.counters import Counters
from kvcag.scheduler.state import State
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
        before = scheduler._counters
    with scheduler_of(path) as scheduler:
        after = scheduler._counters
        assert {digest: known.use for digest, known in after.known.items()} == {
            digest: known.use for digest, known in before.known.items()
        }
        assert (after.now, after.identities) == (before.now, {"a": next(iter(after.identities.values()))})
        assert [known.sources for known in after.known.values()].count({"source": "a.md"}) == 1
        scheduler.observe(TextualMemoryItem(id="a", memory="another one"))
        assert len(after.changed) == 1  # it is known what `a` stood for


def test_the_file_is_for_this_user_alone(path: Path) -> None:
    with scheduler_of(path):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_one_scheduler_at_a_time(path: Path) -> None:
    with scheduler_of(path), pytest.raises(SchedulerStateError, match="in use by another scheduler"):
        scheduler_of(path)
    scheduler_of(path).close()


def test_a_program_that_locks_the_database_is_named_as_the_cause(path: Path) -> None:
    with scheduler_of(path) as scheduler:
        scheduler._state._db.execute("PRAGMA busy_timeout = 10")  # type: ignore[union-attr]
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        scheduler.observe("one")
        with pytest.raises(SchedulerStateError, match="locked by another program"):
            scheduler.run_once()
        other.execute("ROLLBACK")
        other.close()
        scheduler.run_once()
    with scheduler_of(path) as scheduler:
        assert scheduler.metrics().documents == 1  # what could not be written down then was written down later


def test_an_answer_comes_though_the_state_is_locked(path: Path) -> None:
    with scheduler_of(path) as scheduler:
        scheduler._state._db.execute("PRAGMA busy_timeout = 10")  # type: ignore[union-attr]
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        messages = [{"role": "system", "content": [scheduler_document()]}, {"role": "user", "content": "What?"}]
        sampling = scheduler.memory.engine.sampling(max_new_tokens=2)
        with pytest.warns(UserWarning, match="encoded and not kept"):
            assert list(scheduler.memory.stream(messages, sampling=sampling))
        other.close()


def scheduler_document() -> str:
    from kvcag.chat_template import Document

    return Document("A document.\n\n")


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


def test_what_is_no_scheduler_database_is_left_as_it_is(path: Path, tmp_path: Path) -> None:
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
        State(newer, "model")
    with pytest.raises(StoreUnavailableError):
        State(tmp_path, "model")


def test_a_save_that_fails_is_made_up_for(path: Path) -> None:
    counters, state = Counters(), State(path, "model")
    counters.retrieved("one")
    db, state._db = state._db, None
    with pytest.raises(SchedulerStateError, match="closed"):
        state.save(counters)
    state._db = db
    state.save(counters)
    read = Counters()
    state.load(read)
    assert read.known.keys() == counters.known.keys()
    assert [state.text(digest) for digest in read.known] == ["one"]
    state.close()


def test_the_log_is_read_while_the_scheduler_works(path: Path) -> None:
    with scheduler_of(path) as scheduler:
        [key] = scheduler.promote("The tower is tall.")
        scheduler.demote(key)
        assert log_of(path) == scheduler.log()
        code, said = run("scheduler", "log", path, "--json")
        assert code == 0
        entries = [json.loads(line) for line in said.splitlines()]
        assert [(entry["action"], entry["key"]) for entry in entries] == [("promoted", key), ("demoted", key)]
        assert entries[0]["tokens"] == len("The tower is tall.\n\n")
        assert entries[1]["reason"] == "on demand; its text was never asked for"
        code, said = run("scheduler", "log", path, "--limit", 1)
        assert code == 0
        assert "demoted" in said
        assert "on demand" in said
        assert "promoted" not in said
        code, said = run("scheduler", "show", path)
        assert code == 0
        assert "The tower is tall." in said
        assert "0 of 1 caches kept" in said
        scheduler.promote(key)
        code, said = run("scheduler", "show", path, "--json")
        [cache] = json.loads(said)
        assert (cache["key"], cache["cached"], cache["text"]) == (key, True, "The tower is tall.\n\n")
    assert [cache.cached for cache in caches_of(path)] == [True]  # and after it was closed


def test_the_log_of_what_is_no_log(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="there is no file"):
        log_of(path)
    assert run("scheduler", "log", path)[0] == 2
    assert not path.exists()
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(SchedulerStateError, match="no scheduler's database"):
        log_of(empty)
    (tmp_path / "rubbish").write_text("rubbish " * 1000)
    with pytest.raises(SchedulerStateError, match="damaged"):
        caches_of(tmp_path / "rubbish")


def test_the_log_keeps_the_last_ten_thousand(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcag.scheduler.state._LOGGED", 3)
    with scheduler_of(path) as scheduler:
        for number in range(5):
            scheduler.promote(f"Text {number}")
        assert [entry.tokens for entry in scheduler.log()] == [len("Text 0\n\n")] * 3


def test_a_state_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailableError):
        State(tmp_path / "file" / "state.sqlite", "model")
