"""The Triton kernels of norms and gated products against `lean`, as a script: interpreted on a CPU, or on a GPU.

The interpreter (TRITON_INTERPRET=1) must be asked for before Triton is imported, so this runs in a process of its own.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from qd2mora.base.families import NormForm
from qd2mora.memory import lean
from qd2mora.mixture import kernels

FORMS: tuple[NormForm, ...] = ("rounded first", "weighed first", "one more than its weight")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def both_ways(run: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a function gives with the kernels and without."""
    found = []
    for is_used in (True, False):
        kernels.runs_kernels = lambda tensor, is_used=is_used: is_used
        found.append(run())
    return found[0], found[1]


def check(run: Any, dtype: torch.dtype) -> None:
    # Float32 sums differ in their last bits, so that one of two roundings to 16 bits may fall
    # otherwise, in few entries.
    tolerance = max(2e-6, 2.1 * torch.finfo(dtype).eps)
    for made, wanted in zip(*both_ways(run), strict=True):
        assert made.dtype is wanted.dtype and made.shape == wanted.shape
        torch.testing.assert_close(made, wanted, rtol=tolerance, atol=tolerance)
        # Triton's interpreter cuts to bfloat16 where cards round: there alone most entries differ.
        if dtype is torch.float16 or (made.is_cuda and dtype is torch.bfloat16):
            assert (made != wanted).float().mean() < 0.02


def check_norm(shape: tuple[int, ...], form: NormForm, dtype: torch.dtype, device: str) -> None:
    x = (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    weight, dy = torch.randn(shape[-1], device=device).to(dtype), torch.randn(shape, device=device).to(dtype)

    def run() -> list[Tensor]:
        y = lean._Norm.apply(x, weight, 1e-5, form)
        return [y.detach(), *torch.autograd.grad(y, x, dy)]

    check(run, dtype)


def check_gated(shape: tuple[int, ...], is_gelu: bool, is_chunked: bool, dtype: torch.dtype, device: str) -> None:
    both = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)
    gate, up = both.chunk(2, -1)
    if not is_chunked:
        gate, up = gate.contiguous(), up.contiguous()
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    dy = torch.randn(shape, device=device).to(dtype)

    def run() -> list[Tensor]:
        y = lean.gated(gate, up, is_gelu=is_gelu)
        return [y.detach(), *torch.autograd.grad(y, [gate, up], dy)]

    check(run, dtype)


def main(device: str) -> None:
    torch.manual_seed(0)
    number = 0
    for dtype in DTYPES:
        for shape in ((2, 3, 24), (5, 100), (2, 2, 3, 1030)):
            for form in FORMS:
                check_norm(shape, form, dtype, device)
            for is_gelu in (False, True):
                for is_chunked in (False, True):
                    check_gated(shape, is_gelu, is_chunked, dtype, device)
            number += 7
    print(f"{number} norms and gated products equal their twins on {device}")


if __name__ == "__main__":
    main(sys.argv[1])
