"""The lists of mutants hold edits of lines that are there: one that is not would break nothing, and prove nothing."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "safety"))

from gate_list import GATES
from mutants import MUTANTS

PACKAGE = Path(__file__).parents[1] / "qd2mora"
EDITS = [(name, *mutant) for name, gate in GATES.items() for mutant in gate.mutants] + MUTANTS


@pytest.mark.parametrize("name", GATES)
def test_a_gate_names_tests_that_are_there(name: str) -> None:
    for test in GATES[name].tests:
        file, _, function = test.partition("::")
        text = (PACKAGE.parent / file).read_text(encoding="utf-8")
        assert f"def {function}(" in text if function else text


def test_every_mutant_changes_one_place_of_the_package() -> None:
    assert len(EDITS) >= 40
    wrong = [edit for edit in EDITS if (PACKAGE / edit[1]).read_text(encoding="utf-8").count(edit[2]) != 1]
    assert wrong == []
