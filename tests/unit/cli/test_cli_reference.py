"""docs/cli.md lists exactly the existing commands and options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from kvcag.cli.app import app

PAGE = Path(__file__).parents[3] / "docs" / "cli.md"
TEXT = PAGE.read_text(encoding="utf-8")


def commands(group: Any, prefix: str = "kvcag") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        yield f"{prefix} {name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")


COMMANDS = dict(commands(typer.main.get_command(app)))


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")} - {"--help"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_named(name: str) -> None:
    assert f"`{name}" in TEXT, f"docs/cli.md does not name {name}"
    missing = [option for option in options(COMMANDS[name]) if not re.search(rf"`[^`]*{option}\b", TEXT)]
    assert not missing, f"docs/cli.md does not name {missing} of {name}"


def test_nothing_is_named_that_is_not_there() -> None:
    there = set().union(*map(options, COMMANDS.values())) | {"--version", "--debug", "--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) <= there
    for heading in re.findall(r"### `kvcag ([a-z-]+)", TEXT):
        assert f"kvcag {heading}" in COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_an_example(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    if not hasattr(command, "commands"):
        assert "For example:" in command.help
        assert f"\n{' ' * 4}{name}" in command.help, f"{name} --help has no example of itself"
    if not hasattr(command, "commands"):
        assert "--json" in options(command)


def test_the_exit_codes_are_those_of_the_code() -> None:
    from kvcag.cli import common

    codes = {common.NEGATIVE, common.USAGE, common.FAILED, common.INTERRUPTED, common.CLOSED_PIPE, 0}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", TEXT, flags=re.MULTILINE)} == codes
