"""The kernel pair equals its plain twin: interpreted here, compiled where there is a GPU."""

import importlib.util
from pathlib import Path

import pytest
import torch
from kernel_cases import run_cases

from qd2mora.mixture.kernels import working_kernel

CASES = Path(__file__).with_name("rank_kernel_cases.py")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@needs_triton
def test_interpreted_kernels_equal_the_twin() -> None:
    assert "9 steps and 4 layers" in run_cases(CASES, "cpu", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_equal_the_twin() -> None:
    assert "9 steps and 4 layers" in run_cases(CASES, "cuda")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which Triton launches nothing")
def test_where_triton_cannot_launch_the_twin_is_taken_and_that_is_said_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert working_kernel(torch.device("cpu")) is None
    (record,) = caplog.records
    assert record.getMessage().startswith("kernels: Triton does not run here (")
    assert "\n" not in record.getMessage()
