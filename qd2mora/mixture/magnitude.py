"""DoRA experts: each expert's weight has a trained magnitude for every row of its output.

y = m_e / |W + s B_e A_e|_row (W x + b + s B_e A_e x), m_e = |W|_row at the start, the norm out of the graph (DoRA,
arXiv 2402.09353; as experts of MixLoRA, github mikecovlee/mLoRA, whose code scales the base's bias too, as here). Norms
come from |W|^2 + 2 s <W, B A> + s^2 |B A|^2 row by row: no expert's weight is formed, and at B = 0 the scale is 1 to
the bit.

Kept for the backward pass: what is scaled, in its own dtype, and no scale of a token's own.

Shapes: K slots, ... leading axes (rows, tokens), E experts, D d_in, O d_out, Q ranks of all experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qd2mora.mixture import frozen
from qd2mora.routed.ops import repeated, wide

NAME = "mixture_magnitude"


def start(base: nn.Module, num_experts: int) -> Tensor:
    """Return |W|_row for each expert, (E, O), at least float32."""
    return _squares(_dense(base)).sqrt().expand(num_experts, -1).clone()


def norms(base: nn.Module, rows_QD: Tensor, columns_OQ: Tensor, ranks: tuple[int, ...], scaling: float) -> Tensor:
    """Return |W + s B_e A_e|_row of each expert, (E, O), at least float32, without gradient."""
    with torch.no_grad():
        W_OD, A_QD, B_OQ = _dense(base), wide(rows_QD), wide(columns_OQ)
        owns_QE = repeated(torch.eye(len(ranks), dtype=A_QD.dtype, device=A_QD.device), ranks).T
        cross_OE = (wide(W_OD @ rows_QD.to(W_OD.dtype).T) * B_OQ) @ owns_QE
        own_QQ = (A_QD @ A_QD.T) * (owns_QE @ owns_QE.T)
        own_OE = ((B_OQ @ own_QQ) * B_OQ) @ owns_QE
        squares_OE = _squares(W_OD).unsqueeze(-1) + 2 * scaling * cross_OE + scaling**2 * own_OE
        # A row of zeros, of a base that was pruned, would be 0 / 0.
        return squares_OE.clamp_min(torch.finfo(squares_OE.dtype).tiny).sqrt().T


def magnified(y: Tensor, which: Tensor, magnitude_EO: Tensor, norms_EO: Tensor) -> Tensor:
    """Return y (..., O) times the scale of the expert that `which` (..., E) of 0 and 1 tells, in the dtype of y."""
    scaled: Tensor = _Magnified.apply(y, which, magnitude_EO, norms_EO)
    return scaled


class _Magnified(torch.autograd.Function):
    """y, which, magnitude, norms, as `magnified` takes them; the scale of each token is made again backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, which: Tensor, magnitude: Tensor, norms: Tensor) -> Tensor:
        ctx.save_for_backward(y, which, magnitude, norms)
        return y * _scale(which, magnitude, norms).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Once: where the layer is recomputed, what was unpacked is gone.
        y, which, magnitude, norms = ctx.saved_tensors
        dmagnitude = None
        if ctx.needs_input_grad[2]:
            tokens = (dy * y).flatten(0, -2).to(norms.dtype)
            chosen = which.expand(*dy.shape[:-1], -1).flatten(0, -2).to(norms.dtype)
            dmagnitude = (chosen.T @ tokens / norms).to(magnitude.dtype)
        return dy * _scale(which, magnitude, norms).to(dy.dtype), None, dmagnitude, None


def _scale(which: Tensor, magnitude: Tensor, norms: Tensor) -> Tensor:
    return which.to(norms.dtype) @ (magnitude.to(norms.dtype) / norms)


def _squares(W_OD: Tensor) -> Tensor:
    # Accumulated in float32 without a copy of the weight.
    return torch.linalg.vector_norm(W_OD, dim=1, dtype=torch.promote_types(W_OD.dtype, torch.float32)).square()


def _dense(base: nn.Module) -> Tensor:
    """Return a frozen linear's dense weight (O, D). Raises ValueError where it is not to be had."""
    assert isinstance(base, nn.Linear)
    if base.weight.is_floating_point():
        return base.weight.detach()
    layout = frozen.layout_of(base)
    if layout is None:
        raise ValueError("DoRA experts read the base's weight, which this linear keeps packed or hooked")
    return frozen.weight(layout, frozen.tensors_of(base, layout))


__all__ = ["NAME", "magnified", "norms", "start"]
