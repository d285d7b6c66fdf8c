"""Kernels of norms and gated products equal torch's: interpreted here, compiled where there is a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("lean_kernel_cases.py")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run_cases(device: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, str(CASES), device], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_interpreted_kernels_equal_torch() -> None:
    assert "63 norms and gated products" in run_cases("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_equal_torch() -> None:
    assert "63 norms and gated products" in run_cases("cuda")
