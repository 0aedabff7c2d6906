"""The command as a process: signals, terminals, pipes, and how long `--help` takes."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest

from kvcag.cli.app import app
from tests.commands import Kvcag, write

pytestmark = pytest.mark.skipif(os.name == "nt", reason="terminals and signals of POSIX")

PATIENCE = 60.0


class Terminal:
    """A user at a terminal: reads the screen, types, and presses Ctrl-C."""

    def __init__(self, kvcag: Kvcag, *arguments: object) -> None:
        own, theirs = pty.openpty()
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
        self.process = kvcag.process(*arguments, preexec_fn=_take_terminal, **streams)
        os.close(theirs)
        self._fd, self.shown = own, ""

    def wait_for(self, pattern: str) -> None:
        """Wait until the pattern is shown, and forget all output up to there."""
        ends = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.shown, flags=re.DOTALL)):
            assert time.monotonic() < ends, f"{pattern!r} was not shown: {self.shown!r}"
            if select.select([self._fd], [], [], 0.2)[0]:
                self.shown += self._read()
        self.shown = self.shown[found.end() :]

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C at a prompt, a moment after it was shown: before, readline does not wait for a key yet."""
        time.sleep(0.5)
        self.type("\x03")

    def leave(self) -> tuple[int, str]:
        """The exit code, and the remaining output."""
        code = self.process.wait(PATIENCE)
        while select.select([self._fd], [], [], 0)[0] and (more := self._read()):
            self.shown += more
        return code, self.shown

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self._fd)

    def _read(self) -> str:
        try:
            return os.read(self._fd, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            return ""


def _take_terminal() -> None:
    """Make the terminal the session's own, so that Ctrl-C reaches the process."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_control_c_cancels_a_turn_and_a_second_one_leaves(kvcag: Kvcag) -> None:
    kvcag("encode", "notes")
    chat = Terminal(kvcag, "chat", "--max-new-tokens", 1800)
    chat.wait_for("/help lists the commands.*> ")
    chat.type("Who?\n")
    chat.wait_for(r"Who\?\r\n.")  # the answer has begun
    chat.type("\x03")
    chat.wait_for("cancelled; press Ctrl-C again, or Ctrl-D, to leave.*> ")
    chat.type("/undo\n")
    chat.wait_for("there is no turn to remove.*> ")  # as if it was never asked
    chat.type("/what\n")
    chat.wait_for("the commands are.*> ")
    chat.interrupt()
    code, shown = chat.leave()
    assert code == 0
    assert "Traceback" not in shown
    chat.close()


def test_after_a_cancelled_turn_the_next_is_answered(kvcag: Kvcag) -> None:
    kvcag("encode", "notes")
    chat = Terminal(kvcag, "chat", "--max-new-tokens", 500)
    chat.wait_for("/help lists the commands.*> ")
    chat.interrupt()
    chat.wait_for("cancelled.*> ")
    chat.type("Who?\n")
    chat.wait_for(r"Who\?\r\n.")
    chat.type("\x03")
    chat.wait_for("cancelled.*> ")  # the first at the prompt was forgiven when something was asked
    chat.type("Where?\n")
    chat.wait_for("tokens reused.*first token after.*> ")
    chat.type("\x04")
    assert chat.leave()[0] == 0
    chat.close()


def test_the_race_is_run_side_by_side(kvcag: Kvcag) -> None:
    kvcag.environment |= {"COLUMNS": "110", "TERM": "xterm-256color"}
    race = Terminal(kvcag, "demo", "--corpus", "notes", "--question", "Who?")
    race.wait_for(r"reads everything\S* +\S*from the cache")
    race.wait_for(r"first word \S+ s, all \S+ s +first word \S+ s, all \S+ s")
    code, shown = race.leave()
    assert code == 0
    assert "s to the first word instead of" in shown
    race.close()


def test_rm_asks_a_person_and_no_means_no(kvcag: Kvcag) -> None:
    kvcag("encode", "notes")
    for answer, code, left in (("n", 1, 2), ("y", 0, 0)):
        terminal = Terminal(kvcag, "rm", "--all")
        terminal.wait_for(r"Delete 2 items.*\[y/N\]: ")
        terminal.type(f"{answer}\n")
        assert terminal.leave()[0] == code
        terminal.close()
        assert len(kvcag("ls", "--json").json) == left


def test_an_interrupted_encode_keeps_finished_items_and_can_be_continued(kvcag: Kvcag) -> None:
    for number in range(400):
        write(kvcag.folder / "many" / f"{number:03}.txt", f"{number} " + "word " * 300)
    process = kvcag.process("encode", "many", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ends = time.monotonic() + PATIENCE
    while not list((kvcag.folder / "kv").rglob("*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    kept = int(re.search(r"(\d+) of 400 items encoded and stored", err)[1])
    assert len(kvcag("ls", "--json").json) == kept > 0
    assert kvcag("verify").code == 0


@pytest.mark.parametrize("arguments", [["ls", "--json"], ["ask", "Who?", "--max-new-tokens", "400"]])
def test_a_closed_pipe_ends_it_quietly(kvcag: Kvcag, arguments: list[str]) -> None:
    kvcag("encode", "notes/a.md")
    with kvcag.process(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        assert process.wait(PATIENCE) == 141
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_commands_without_a_model_do_not_load_torch(kvcag: Kvcag) -> None:
    """Help, the version, refusals, and commands that list and delete: they take tenths of a second, not seconds."""
    kvcag("encode", "notes")
    item, _ = kvcag("ls", "--json").json
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    commands: list[tuple[list[str], int]] = [([name, "--help"], 0) for name in names]
    commands += [(["--help"], 0), (["--version"], 0), (["nosuch"], 2), (["encode", "nowhere"], 2)]
    commands += [(["ask", "nowhere", "Who?"], 2), (["ls", "--store", "nowhere"], 2)]
    commands += [(["ls"], 0), (["ls", "--source", "notes", "--json"], 0), (["rm", item["id"]], 0)]
    commands += [(["purge", "notes/a.md"], 0), (["purge", "notes/sub/b.txt"], 0), (["ls"], 0)]
    script = f"""
import sys
from typer.testing import CliRunner
from kvcag.cli.app import app
gone = 0
for typed, code in {commands!r}:
    done = CliRunner().invoke(app, typed)
    gone += typed[0] == "purge" and done.exit_code == 1  # it was the one that rm deleted
    assert done.exit_code == code or typed[0] == "purge", (typed, done.output)
    loaded = {{"torch", "transformers", "numpy"}} & set(sys.modules)
    assert not loaded, (typed, loaded)
assert gone == 1, gone
"""
    done = kvcag.run_python(script)
    assert done.returncode == 0, done.stderr
