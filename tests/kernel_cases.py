"""Runs a script of kernels' cases in a process of its own: Triton's interpreter is asked for before it is imported."""

import os
import subprocess
import sys
from pathlib import Path


def run_cases(script: Path, device: str, **environment: str) -> str:
    """Return what a script says of the kernels on a device."""
    run = subprocess.run(
        [sys.executable, str(script), device], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout
