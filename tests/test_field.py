"""The page on the field: every system has a line, and every command, option, method and test that it names is there."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from qd2mora.cli import app
from qd2mora.composition import OPERATIONS
from qd2mora.mixture.presets import METHODS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "field.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if re.match(r"\| \d+ \|", line)
]
COMMANDS = sorted(set(re.findall(r"`(qd2mora [^`]+)`", PAGE)))
GROUP = typer.main.get_command(app)


def test_every_system_has_a_row_with_a_line_and_its_test_or_says_why_there_is_none() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, 50))
    for _, system, line, test, here in ROWS:
        assert (line == "-") == (test == "-"), system
        assert line == "-" or line.startswith("`qd2mora "), system
        assert here, system
    assert len({row[1] for row in ROWS}) == 49


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_named_is_there_with_its_options(command: str) -> None:
    _, verb, *rest = shlex.split(command)
    assert isinstance(GROUP, typer.core.TyperGroup)
    there = GROUP.commands[verb]
    options = {name for parameter in there.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in rest if word.startswith("--")} <= options
    for word in rest:
        if word.startswith("adapter.method="):
            assert word == "adapter.method=NAME" or word.partition("=")[2] in METHODS
    if verb == "compose":
        assert rest[0] in OPERATIONS


def test_the_tests_that_are_named_are_there() -> None:
    for row in ROWS:
        if row[3] != "-":
            path, _, name = row[3].strip("`").partition("::")
            assert re.search(rf"^def {re.escape(name)}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (
                row[3]
            )


def test_every_method_that_is_not_ours_has_a_place_on_the_page() -> None:
    missing = [name for name, method in METHODS.items() if method.mark != "ours" and f"={name}`" not in PAGE]
    assert [name for name in missing if name != "rocket"] == []
