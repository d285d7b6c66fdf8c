"""Mutants lose guards that are there: an edit that changes nothing would break nothing, and prove nothing."""

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "safety"))

from gate_list import GATES
from mutants import MUTANTS
from mutation import Mutant, always, doing, ignoring, instead, never, uncaught, unfinished, without

PACKAGE = Path(__file__).parents[1] / "qd2mora"
EDITS = [(name, mutant) for name, gate in GATES.items() for mutant in gate.mutants] + MUTANTS
SOURCE = """
def guard(rows, limit):
    if rows > limit and limit != 3:
        raise ValueError(rows)
    try:
        return read(rows, [row for row in rows if row.is_good])
    except OSError as error:
        close(rows)
    finally:
        log("done")
"""


@pytest.mark.parametrize("name", GATES)
def test_a_gate_names_tests_that_are_there(name: str) -> None:
    for test in GATES[name].tests:
        file, _, function = test.partition("::")
        text = (PACKAGE.parent / file).read_text(encoding="utf-8")
        assert f"def {function}(" in text if function else text


@pytest.mark.parametrize("gate, mutant", EDITS, ids=[f"{gate}-{mutant}" for gate, mutant in EDITS])
def test_a_mutant_loses_one_guard_that_is_there(gate: str, mutant: Mutant) -> None:
    source = (PACKAGE / mutant.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(mutant.applied(source))) != ast.dump(ast.parse(source))


def test_every_gate_has_mutants() -> None:
    assert len(EDITS) >= 100


@pytest.mark.parametrize(
    "mutant, expected",
    [
        (never("x.py:guard", "rows", "limit"), "    if False:\n"),
        (always("x.py:guard", "is_good"), "[row for row in rows if True]"),
        (ignoring("x.py:guard", "!="), "    if rows > limit and False:\n"),
        (without("x.py:guard", "close"), "        pass\n    finally"),
        (unfinished("x.py:guard", "log"), "    finally:\n        pass\n"),
        (uncaught("x.py:guard", "OSError"), "except ZeroDivisionError as error"),
        (instead("x.py:guard", "done", by="rows"), "log(rows)"),
        (doing("x.py:guard", "read", by="return rows"), "        return rows\n    except"),
    ],
    ids=str,
)
def test_an_edit_changes_the_node_that_its_words_name(mutant: Mutant, expected: str) -> None:
    assert expected in mutant.applied(SOURCE)


@pytest.mark.parametrize(
    "mutant", [never("x.py:guard", "absent"), without("x.py:other", "close"), instead("x.py", "rows", by="1")]
)
def test_an_anchor_that_finds_not_one_node_is_an_error(mutant: Mutant) -> None:
    with pytest.raises(LookupError):
        mutant.applied(SOURCE)
