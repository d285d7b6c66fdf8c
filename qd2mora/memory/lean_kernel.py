"""Norms and gated products as Triton kernels: one launch each forward and backward, where torch takes three to nine.

The arithmetic of `lean`, which is their twin, with its roundings in its order; sums of a row are added up in another
order, so that a norm differs by float32 rounding. One program holds a row, or a block of entries; no atomics.

Shapes: T rows (tokens, or tokens x heads), D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qd2mora.base.families import NormForm
from qd2mora.mixture.kernels import OPTIONS

WIDEST = 1 << 16
"""Entries of the longest row that one program holds."""
BLOCK = 1024
_FORMS: dict[NormForm, int] = {"rounded first": 0, "weighed first": 1, "one more than its weight": 2}


def try_out(device: torch.device) -> None:
    """Launch the smallest of each once. Raises what Triton raises where it cannot compile or launch."""
    x = torch.ones(1, 16, device=device)
    _, factor = norm(x, x[0], 1e-5, "rounded first", x.dtype)
    norm_back(x, x, factor, x[0], "rounded first")
    gated_back(gated(x, x, is_gelu=False), x, x, is_gelu=False)


def norm(x: Tensor, weight: Tensor, eps: float, form: NormForm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return w x f (T, D) in `dtype` and f (T, 1) float32, f = 1 / sqrt(mean(x^2) + eps), of x (T, D) contiguous."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    factor = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    _norm[(len(x),)](x, weight, out, factor, eps, **norm_constants(x.shape[1], form))
    return out, factor


def norm_back(dy: Tensor, x: Tensor, factor: Tensor, weight: Tensor, form: NormForm) -> Tensor:
    """Return the gradient of x (T, D) in its dtype; dy is (T, D) contiguous."""
    dx = torch.empty_like(x)
    _norm_back[(len(x),)](dy, x, factor, weight, dx, **norm_constants(x.shape[1], form))
    return dx


def gated(gate: Tensor, up: Tensor, *, is_gelu: bool) -> Tensor:
    """Return act(gate) up, (T, D) in their dtype; each row of gate and up lies together."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gated[_grid(gate)](
        gate, up, out, gate.stride(0), up.stride(0), gate.shape[1], GELU=is_gelu, BLOCK=BLOCK, **OPTIONS
    )
    return out


def gated_back(dy: Tensor, gate: Tensor, up: Tensor, *, is_gelu: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, (T, D) contiguous; dy is (T, D) contiguous."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    strides = gate.stride(0), up.stride(0), gate.shape[1]
    _gated_back[_grid(gate)](dy, gate, up, dgate, dup, *strides, GELU=is_gelu, BLOCK=BLOCK, **OPTIONS)
    return dgate, dup


def _grid(rows: Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1], BLOCK)


def norm_constants(width: int, form: NormForm) -> dict[str, int | bool]:
    """Return what a norm's kernels are compiled for."""
    power = triton.next_power_of_2(width)
    # A warp for each 512 entries, within what a block may have.
    warps = min(16, max(1, power // 512))
    return {"D": width, "DP": power, "FORM": _FORMS[form], "num_warps": warps, **OPTIONS}


@triton.jit
def _weight(weight_ptr, d, is_there, FORM: tl.constexpr):  # type: ignore[no-untyped-def]
    w = tl.load(weight_ptr + d, mask=is_there, other=0.0).to(tl.float32)
    if FORM == 2:
        w = w + 1.0  # Gemma stores it less one
    return w


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, out_ptr, factor_ptr, eps, D: tl.constexpr, DP: tl.constexpr, FORM: tl.constexpr
):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    is_there = d < D
    x = tl.load(x_ptr + row * D + d, mask=is_there, other=0.0)
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    normed, w = wide * factor, _weight(weight_ptr, d, is_there, FORM)
    if FORM == 0:
        # LLaMA rounds what is normed to the dtype of x before its weight.
        normed = normed.to(x.dtype).to(tl.float32)
    tl.store(out_ptr + row * D + d, normed * w, mask=is_there)
    tl.store(factor_ptr + row, factor)


@triton.jit
def _norm_back(  # type: ignore[no-untyped-def]
    dy_ptr, x_ptr, factor_ptr, weight_ptr, dx_ptr, D: tl.constexpr, DP: tl.constexpr, FORM: tl.constexpr
):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    is_there = d < D
    dy = tl.load(dy_ptr + row * D + d, mask=is_there, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * D + d, mask=is_there, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + row)
    # With n = x f: dx = f (w dy - n mean(w dy n)).
    dnormed, normed = dy * _weight(weight_ptr, d, is_there, FORM), x * factor
    along = tl.sum(dnormed * normed, 0) / D
    tl.store(dx_ptr + row * D + d, (dnormed - normed * along) * factor, mask=is_there)


@triton.jit
def _activated(gate, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return act(gate) and its slope, float32; the tanh gelu is x sigmoid(2 z) with z = sqrt(2 / pi) (x + a x^3)."""
    if GELU:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        share = tl.sigmoid(inner)
        slope = share + gate * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
    else:
        share = tl.sigmoid(gate)
        slope = share * (1.0 + gate * (1.0 - share))
    return gate * share, slope


@triton.jit
def _gated(  # type: ignore[no-untyped-def]
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, D, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + d, mask=d < D, other=0.0)
    up = tl.load(up_ptr + row * up_stride + d, mask=d < D, other=0.0)
    active, _ = _activated(gate.to(tl.float32), GELU)
    # Rounded as the activation's own kernel does, before the product.
    product = active.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * D + d, product, mask=d < D)


@triton.jit
def _gated_back(  # type: ignore[no-untyped-def]
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    gate_stride,
    up_stride,
    D,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + d, mask=d < D, other=0.0)
    up = tl.load(up_ptr + row * up_stride + d, mask=d < D, other=0.0).to(tl.float32)
    active, slope = _activated(gate.to(tl.float32), GELU)
    dactive = (dy * up).to(gate.dtype).to(tl.float32)
    tl.store(dgate_ptr + row * D + d, dactive * slope, mask=d < D)
    tl.store(dup_ptr + row * D + d, active.to(gate.dtype).to(tl.float32) * dy, mask=d < D)


__all__ = ["WIDEST", "gated", "gated_back", "norm", "norm_back", "norm_constants", "try_out"]
