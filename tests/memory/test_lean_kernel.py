"""Kernels of norms and gated products equal torch's: interpreted here, compiled where there is a GPU."""

import importlib.util
from pathlib import Path

import pytest
import torch
from kernel_cases import run_cases

CASES = Path(__file__).with_name("lean_kernel_cases.py")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def test_interpreted_kernels_equal_torch() -> None:
    assert "63 norms and gated products" in run_cases(CASES, "cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_equal_torch() -> None:
    assert "63 norms and gated products" in run_cases(CASES, "cuda")
