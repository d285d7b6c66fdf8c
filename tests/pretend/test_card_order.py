"""No product reads a slot or an input before its copy is there, and the check notices the loss of each wait."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path


@cache
def found() -> list[dict[str, object]]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("order.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_streaming_and_offload_have_no_race() -> None:
    whole = {line["case"]: line["races"] for line in found() if "case" in line}
    assert len(whole) == 5
    assert set(whole.values()) == {0}


def test_each_wait_is_needed() -> None:
    mutants = {line["mutant"]: line["races"] for line in found() if "mutant" in line}
    assert len(mutants) == 4
    assert all(mutants.values()), mutants
