"""No product reads a slot or an input before its copy is there, and the check notices the loss of each wait."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

EVERYTHING_AWAY, IN_TURN = "streamed, recomputed, inputs away", "streamed, inputs away, three in turn"


@cache
def found(*names: str) -> list[dict[str, object]]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("order.py")), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_streaming_and_offload_together_have_no_race() -> None:
    assert [line["races"] for line in found(EVERYTHING_AWAY, IN_TURN) if "case" in line] == [0, 0]


@pytest.mark.long
def test_no_way_to_stream_or_offload_has_a_race() -> None:
    whole = {line["case"]: line["races"] for line in found() if "case" in line}
    assert len(whole) == 6
    assert set(whole.values()) == {0}


def test_each_wait_is_needed() -> None:
    mutants = {line["mutant"]: line["races"] for line in found(EVERYTHING_AWAY, IN_TURN) if "mutant" in line}
    assert len(mutants) == 5
    assert all(mutants.values()), mutants
