"""How much host memory a process has taken."""

import subprocess
import sys

import pytest

CHILD = "from qd2mora.base.host_memory import most_resident_bytes as most; print(most())"
PARENT = f"""
import subprocess, sys
taken = b"1" * (2 << 30)
print(subprocess.run([sys.executable, "-c", {CHILD!r}], check=True, capture_output=True, text=True).stdout)
"""


@pytest.mark.long
def test_what_a_large_parent_took_is_not_its_childs() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], check=True, capture_output=True, text=True)
    assert 0 < int(done.stdout) < 2 << 30


def test_what_was_taken_and_given_back_counts() -> None:
    code = f"taken = b'1' * (1 << 30); del taken; {CHILD}"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) >= 1 << 30
