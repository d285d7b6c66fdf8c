"""The fast form: the whole mixture as one autograd function that adds into the base's output.

Forward: one product u = x [A; routers that read x]^T, a step in rank space v = K_t u, one product y += s v B^T.
Backward: dv = s dy B, the step in rank space again with autograd on tensors of tokens x rank, then dA, dB, dx as one
product each. Saved for the backward pass: x (which the base's own backward does not need) and u. Dropout keeps its
seed, not its mask.

Deviation from the plain form in `ops`: none in exact arithmetic; in 16 bits the update is rounded once, with y.

Shapes: T tokens, D d_in, O d_out, R rank, M down, N up; F = M*R + number of router rows that read x.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from qd2mora.mixture import ops
from qd2mora.mixture.ops import RankStep


@dataclass(frozen=True)
class _Dropout:
    """Probability, seed, and how many masks there are: one for all down experts, or one for each."""

    probability: float
    seed: int
    num_masks: int

    def apply(self, x: Tensor, mask: int) -> Tensor:
        """Return x with entries dropped by mask number `mask`, the rest scaled up; the seed alone decides."""
        generator = torch.Generator(device=x.device).manual_seed(self.seed + mask)
        kept = torch.empty_like(x).bernoulli_(1 - self.probability, generator=generator)
        return x * kept.div_(1 - self.probability)


class _AddMixture(torch.autograd.Function):
    """y (..., O), x (..., D), A_MRD, B_NOR, router_x (rows, D), then the tensors that the rank step alone reads."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A_MRD: Tensor,
        B_NOR: Tensor,
        router_x: Tensor | None,
        router_z: Tensor | None,
        core: Tensor | None,
        gate_pair: Tensor | None,
        step: RankStep,
        scaling: float,
        dropout: _Dropout | None,
    ) -> Tensor:
        u_TF = _features(x.flatten(0, -2).to(y.dtype), A_MRD, router_x, dropout)
        v = step.mix(ops.wide(u_TF), router_z, core, gate_pair)
        columns = ops.stack_columns(B_NOR).to(y.dtype)
        y.view(-1, y.shape[-1]).addmm_(v.to(y.dtype), columns.T, alpha=scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, u_TF, A_MRD, B_NOR, router_x, router_z, core, gate_pair)
        ctx.step, ctx.scaling, ctx.dropout = step, scaling, dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u_TF, A_MRD, B_NOR, router_x, router_z, core, gate_pair = ctx.saved_tensors
        dy_TO = dy.flatten(0, -2)
        dv = ctx.scaling * (dy_TO @ ops.stack_columns(B_NOR).to(dy.dtype))
        u = ops.wide(u_TF).detach().requires_grad_()
        small = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (router_z, core, gate_pair)]
        with torch.enable_grad():
            v = ctx.step.mix(u, *small)
        inputs = [u, *(tensor for tensor in small if tensor is not None)]
        gradients = iter(torch.autograd.grad(v, inputs, dv.to(v.dtype)))
        du_TF = next(gradients).to(dy.dtype)
        dsmall = [None if tensor is None else next(gradients) for tensor in small]
        dB = None
        if ctx.needs_input_grad[3]:
            dB_OK = ctx.scaling * (dy_TO.T @ v.detach().to(dy.dtype))
            dB = ops.unstack_columns(dB_OK, B_NOR.shape).to(B_NOR.dtype)
        x_TD = x.flatten(0, -2).to(dy.dtype)
        dA, drouter = _row_gradients(ctx, du_TF, x_TD, A_MRD, router_x)
        dx = _input_gradient(ctx, du_TF, A_MRD, router_x).view(x.shape).to(x.dtype) if ctx.needs_input_grad[1] else None
        return (dy, dx, dA, dB, drouter, *dsmall, None, None, None)


def add_mixture(
    y: Tensor,
    x: Tensor,
    A_MRD: Tensor,
    B_NOR: Tensor,
    step: RankStep,
    scaling: float,
    *,
    router_x: Tensor | None = None,
    router_z: Tensor | None = None,
    core: Tensor | None = None,
    gate_pair: Tensor | None = None,
    dropout: float = 0.0,
    num_masks: int = 1,
) -> Tensor:
    """Add s B K_t A x to y (..., O), in place where autograd allows it, and return the sum.

    `x` is (..., D); `router_x` holds the rows of the down router, then those of an up router that reads x; `gate_pair`
    broadcasts to (..., E) where experts are paired. Routers read x undropped. The products run in the dtype of y.
    """
    if gate_pair is not None:
        gate_pair = gate_pair.expand(*x.shape[:-1], -1).flatten(0, -2)
    masks = _Dropout(dropout, int(torch.randint(1 << 62, ())), num_masks) if dropout else None
    # A 4-bit linear with a bias returns a view made inside its own autograd function (bitsandbytes 0.50); autograd
    # forbids adding into such a view.
    is_locked = y._is_view() and isinstance(y.grad_fn, BackwardCFunction)
    y = y.clone() if is_locked else y.contiguous()
    return _AddMixture.apply(y, x, A_MRD, B_NOR, router_x, router_z, core, gate_pair, step, scaling, masks)


def _features(x_TD: Tensor, A_MRD: Tensor, router_x: Tensor | None, dropout: _Dropout | None) -> Tensor:
    """Return [A; routers] x, (T, F): one product, or with dropout one for each mask and one for the routers."""
    if dropout is None:
        return ops.features(x_TD, A_MRD, router_x)
    banks = A_MRD.unflatten(0, (dropout.num_masks, -1))
    parts = [ops.features(dropout.apply(x_TD, mask), bank) for mask, bank in enumerate(banks)]
    if router_x is not None:
        parts.append(x_TD @ router_x.to(x_TD.dtype).T)
    return torch.cat(parts, -1)


def _row_gradients(
    ctx: Any, du_TF: Tensor, x_TD: Tensor, A_MRD: Tensor, router_x: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of A and of the routers that read x."""
    width = A_MRD.shape[0] * A_MRD.shape[1]
    dA = drouter = None
    if ctx.needs_input_grad[2]:
        if ctx.dropout is None:
            dA_KD = du_TF[:, :width].T @ x_TD
        else:
            parts = du_TF[:, :width].chunk(ctx.dropout.num_masks, -1)
            dA_KD = torch.cat([part.T @ ctx.dropout.apply(x_TD, mask) for mask, part in enumerate(parts)])
        dA = dA_KD.view(A_MRD.shape).to(A_MRD.dtype)
    if router_x is not None and ctx.needs_input_grad[4]:
        drouter = (du_TF[:, width:].T @ x_TD).to(router_x.dtype)
    return dA, drouter


def _input_gradient(ctx: Any, du_TF: Tensor, A_MRD: Tensor, router_x: Tensor | None) -> Tensor:
    """Return dx, (T, D), in the dtype of du."""
    rows = ops.stack_rows(A_MRD).to(du_TF.dtype)
    if ctx.dropout is None:
        return du_TF @ (rows if router_x is None else torch.cat([rows, router_x.to(du_TF.dtype)]))
    parts = zip(du_TF[:, : len(rows)].chunk(ctx.dropout.num_masks, -1), rows.chunk(ctx.dropout.num_masks), strict=True)
    dx = sum(ctx.dropout.apply(part @ bank, mask) for mask, (part, bank) in enumerate(parts))
    return dx if router_x is None else dx.addmm_(du_TF[:, len(rows) :], router_x.to(du_TF.dtype))


__all__ = ["add_mixture"]
