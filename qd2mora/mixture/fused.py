"""The fast form: the whole mixture as one autograd function that adds into the base's output.

Forward: one product u = x [A; routers that read x]^T, a step in rank space v = K_t u, one product y += s v B^T.
Backward: dv = s dy B, the step in rank space again with autograd on tensors of tokens x rank, then dA, dB, dx as one
product each. Saved for the backward pass: x (which the base's own backward does not need) and u. Dropout keeps its
seed, not its mask.

Deviation from the plain form in `ops`: none in exact arithmetic; in 16 bits the update is rounded once, with y.

Shapes: T tokens, D d_in, O d_out, R rank, M down, N up; F = M*R + number of router rows that read x.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qd2mora.mixture import ops
from qd2mora.mixture.ops import RankStep


class _AddMixture(torch.autograd.Function):
    """y_TO, x_TD, A_MRD, B_NOR, router_x (rows, D) or None, then the tensors that the rank step alone reads."""

    @staticmethod
    def forward(
        ctx: Any,
        y_TO: Tensor,
        x_TD: Tensor,
        A_MRD: Tensor,
        B_NOR: Tensor,
        router_x: Tensor | None,
        router_z: Tensor | None,
        core: Tensor | None,
        gate_pair: Tensor | None,
        step: RankStep,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        seed = int(torch.randint(1 << 62, ())) if dropout else 0
        u_TF = _features(x_TD, A_MRD, router_x, dropout, seed, y_TO.dtype)
        v = step.mix(ops.wide(u_TF), router_z, core, gate_pair)
        y_TO.addmm_(v.to(y_TO.dtype), ops.stack_columns(B_NOR).to(y_TO.dtype).T, alpha=scaling)
        ctx.mark_dirty(y_TO)
        ctx.save_for_backward(x_TD, u_TF, A_MRD, B_NOR, router_x, router_z, core, gate_pair)
        ctx.step, ctx.scaling, ctx.dropout, ctx.seed = step, scaling, dropout, seed
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, u_TF, A_MRD, B_NOR, router_x, router_z, core, gate_pair = ctx.saved_tensors
        dtype = dy_TO.dtype
        dv = ctx.scaling * (dy_TO @ ops.stack_columns(B_NOR).to(dtype))
        u = ops.wide(u_TF).detach().requires_grad_()
        small = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (router_z, core, gate_pair)]
        with torch.enable_grad():
            v = ctx.step.mix(u, *small)
        inputs = [u, *(tensor for tensor in small if tensor is not None)]
        gradients = iter(torch.autograd.grad(v, inputs, dv.to(v.dtype), allow_unused=True))
        du = next(gradients)
        assert du is not None
        dsmall = [None if tensor is None else next(gradients) for tensor in small]
        dB = None
        if ctx.needs_input_grad[3]:
            dB_OK = ctx.scaling * (dy_TO.T @ v.detach().to(dtype))
            dB = ops.unstack_columns(dB_OK, B_NOR.shape).to(B_NOR.dtype)
        dx, dA, drouter = _feature_gradients(ctx, du.to(dtype), x_TD, A_MRD, router_x)
        return (dy_TO, dx, dA, dB, drouter, *dsmall, None, None, None)


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
) -> Tensor:
    """Add s B K_t A x to y (..., O) in place and return it; `x` is (..., D), `gate_pair` (tokens, E) where paired."""
    flat = _AddMixture.apply(
        y.reshape(-1, y.shape[-1]),
        x.reshape(-1, x.shape[-1]),
        A_MRD,
        B_NOR,
        router_x,
        router_z,
        core,
        gate_pair,
        step,
        scaling,
        dropout,
    )
    return flat.view(y.shape)


def _features(
    x_TD: Tensor, A_MRD: Tensor, router_x: Tensor | None, dropout: float, seed: int, dtype: torch.dtype
) -> Tensor:
    """Return [A; routers] x, (T, F): one product, or two where the experts alone read a dropped x."""
    x = x_TD.to(dtype)
    rows = ops.stack_rows(A_MRD).to(dtype)
    if dropout:
        u = _dropped(x, dropout, seed) @ rows.T
        return u if router_x is None else torch.cat([u, x @ router_x.to(dtype).T], -1)
    if router_x is not None:
        rows = torch.cat([rows, router_x.to(dtype)])
    return x @ rows.T


def _feature_gradients(
    ctx: Any, du_TF: Tensor, x_TD: Tensor, A_MRD: Tensor, router_x: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and the routers that read x."""
    wants_x, wants_A, wants_router = (ctx.needs_input_grad[place] for place in (1, 2, 4))
    width = A_MRD.shape[0] * A_MRD.shape[1]
    dtype = du_TF.dtype
    x = x_TD.to(dtype)
    dropped = _dropped(x, ctx.dropout, ctx.seed) if ctx.dropout else x
    dA = (du_TF[:, :width].T @ dropped).view(A_MRD.shape).to(A_MRD.dtype) if wants_A else None
    drouter = (du_TF[:, width:].T @ x).to(router_x.dtype) if router_x is not None and wants_router else None
    if not wants_x:
        return None, dA, drouter
    rows = ops.stack_rows(A_MRD).to(dtype)
    if ctx.dropout:
        dx = _dropped(du_TF[:, :width] @ rows, ctx.dropout, ctx.seed)
        if router_x is not None:
            dx = dx.addmm_(du_TF[:, width:], router_x.to(dtype))
    else:
        dx = du_TF @ (rows if router_x is None else torch.cat([rows, router_x.to(dtype)]))
    return dx.to(x_TD.dtype), dA, drouter


def _dropped(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Return x with entries dropped by a mask that the seed alone decides, the rest scaled up."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    mask = torch.empty_like(x).bernoulli_(1 - dropout, generator=generator)
    return x * mask.div_(1 - dropout)


__all__ = ["add_mixture"]
