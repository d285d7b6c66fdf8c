"""The gates on input, in brief; `python scripts/gates_input.py` runs the long ones, and mutants on the quick ones."""

from pathlib import Path

import input_gates as gates
import pytest

CLAIMS = {
    "R1": "a mangled recipe is accepted or refused in one line that names its place",
    "D1": "a row without room for its answer is dropped and counted, or refused",
    "D2": "a bad row is refused by its number or left out and counted",
    "D2 before the model": "a bad row is answered before any weights are read",
    "P1": "a payload in any file slot runs nothing",
    "V1": "a name leads out of no folder",
    "Y1": "a config brings no code",
    "J1": "a chat template escapes nothing and stops nothing",
    "BM1": "a header that lies is refused at once and in little memory",
    "NB1": "a number at the edge of what machines count with is answered",
    "CF1": "a configuration that no library wrote is taken or refused in one line, in seconds and in little memory",
    "NF1": "a number that is not finite in any tensor that a verb reads is refused by the tensor's name",
    "ST1": "a standard stream that is closed, full, broken or speaks ASCII stops no verb",
    "TM1": "a control or bidi mark reaches the terminal by no verb",
    "X1": "no secret is printed or written",
}


# Whole commands, a dozen seconds each: `tests/test_terminal.py` and `tests/test_recipe.py` claim their parts.
LONG = ("ST1", "NB1")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in LONG else []) for name in gates.GATES],
    ids=lambda name: f"{name}: {CLAIMS[name]}",
)
def test_the_gate_holds(name: str, made: Path, tmp_path: Path) -> None:
    result = gates.run_gate(name, made, tmp_path, "brief")
    assert result.cases > 0
    assert result.failures == []
