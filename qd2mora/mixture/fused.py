"""The fast form: the whole mixture as one autograd function that adds into the base's output.

Forward: one product u = x [A; routers that read x]^T, a step in rank space v = K_t u, one product y += s v B^T.
Backward: dv = s dy B, the step in rank space again with autograd on tensors of tokens x rank, then the gradients of A,
B and x as one product each. Saved for the backward pass: x (which the base's own backward does not need) and u. Dropout
and noise keep their keys, not their numbers.

Deviation from the plain form in `ops`: none in exact arithmetic; in 16 bits the update is rounded once, with y.

Shapes: T tokens, D d_in, O d_out, F all rows that read x, P all ranks of the up banks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from qd2mora.mixture import ops
from qd2mora.mixture.draws import Draws
from qd2mora.mixture.ops import RankStep
from qd2mora.mixture.routers import Gating

Observe = Callable[[Mapping[str, Gating]], Tensor | None]


@dataclass(frozen=True)
class Dropout:
    """Probability, and the rows that share a mask, from the top: all down ranks, or each expert's."""

    probability: float
    sizes: tuple[int, ...]

    def groups(self, rows: Tensor, num_dropped: int) -> tuple[Tensor, ...]:
        """Split rows (or columns of du) by mask; rows of shared experts past the sizes join the first mask's."""
        sizes = [*self.sizes[:-1], num_dropped - sum(self.sizes[:-1])]
        return rows.split(sizes)


@dataclass(frozen=True)
class _Call:
    """What one call knows beside tensors. Tensors come as downs, then ups, then the small ones by name."""

    num_downs: int
    num_ups: int
    num_banks: int
    names: tuple[str, ...]
    step: RankStep
    scaling: float
    draws: Draws | None
    dropout: Dropout | None
    observe: Observe | None

    def parts(self, tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        """Return down matrices, up banks and small tensors."""
        ups = self.num_downs + self.num_ups
        small = dict(zip(self.names, tensors[ups:], strict=True))
        return list(tensors[: self.num_downs]), list(tensors[self.num_downs : ups]), small


class _AddMixture(torch.autograd.Function):
    """y (..., O), x (..., D), then the call's tensors."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, call: _Call, *tensors: Tensor) -> Tensor:
        downs, ups, small = call.parts(tensors)
        u = _features(call, x.to(y.dtype), downs)
        v = call.step.mix(ops.wide(u), small, call.draws)
        y.view(-1, y.shape[-1]).addmm_(v.flatten(0, -2).to(y.dtype), _columns(ups, y.dtype).T, alpha=call.scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, u, *tensors)
        ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        x, u, *tensors = ctx.saved_tensors
        downs, ups, small = call.parts(tuple(tensors))
        needs = ctx.needs_input_grad
        dy_TO, x_TD = dy.flatten(0, -2), x.flatten(0, -2).to(dy.dtype)
        dv_TP = call.scaling * (dy_TO @ _columns(ups, dy.dtype))
        v, du, dsmall = _through_step(call, u, small, dv_TP.view(*u.shape[:-1], -1), needs[3 + len(downs) + len(ups) :])
        du_TF = du.flatten(0, -2).to(dy.dtype)
        dups: list[Tensor | None] = [None] * len(ups)
        if any(needs[3 + len(downs) : 3 + len(downs) + len(ups)]):
            dB_OP = call.scaling * (dy_TO.T @ v.flatten(0, -2).to(dy.dtype))
            widths = [up.shape[0] * up.shape[2] if up.dim() == 3 else up.shape[1] for up in ups]
            parts = zip(ups, dB_OP.split(widths, -1), strict=True)
            dups = [ops.unstack_columns(part.contiguous(), up.shape).to(up.dtype) for up, part in parts]
        ddowns = (
            _row_gradients(call, du_TF, x_TD, downs, x.shape) if any(needs[3 : 3 + len(downs)]) else [None] * len(downs)
        )
        dx = _input_gradient(call, du_TF, downs, x) if needs[1] else None
        grads = [*ddowns, *dups, *dsmall]
        return (dy, dx, None, *(grad if need else None for grad, need in zip(grads, needs[3:], strict=True)))


def add_mixture(
    y: Tensor,
    x: Tensor,
    downs: list[Tensor],
    ups: list[Tensor],
    small: Mapping[str, Tensor],
    step: RankStep,
    scaling: float,
    *,
    draws: Draws | None = None,
    dropout: Dropout | None = None,
    observer: Observe | None = None,
) -> Tensor:
    """Add s B K_t A x to y (..., O), in place where autograd allows it, and return the sum.

    `x` is (..., D); `downs` are (rows, D) or (M, R, D), banks first, then the routers of `step.router_rows`; `ups` are
    banks (N, O, R) or (O, ranks); `small` is what the step reads besides. Routers read x undropped. Products run in the
    dtype of y.
    """
    num_banks = len(downs) - len(step.router_rows)
    names = tuple(small)
    call = _Call(len(downs), len(ups), num_banks, names, step, scaling, draws, dropout, observer)
    # A 4-bit linear with a bias returns a view made inside its own autograd function (bitsandbytes 0.50); autograd
    # forbids adding into such a view.
    is_locked = y._is_view() and isinstance(y.grad_fn, BackwardCFunction)
    y = y.clone() if is_locked else y.contiguous()
    return _AddMixture.apply(y, x, call, *downs, *ups, *small.values())


def _columns(ups: list[Tensor], dtype: torch.dtype) -> Tensor:
    columns = [ops.stack_columns(up).to(dtype) for up in ups]
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


def _through_step(
    call: _Call, u: Tensor, small: dict[str, Tensor], dv: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Do the step again; return v, the gradient of u, and those of the small tensors."""
    leaf = ops.wide(u).detach().requires_grad_()
    leaves = {
        name: tensor.detach().requires_grad_(need) for (name, tensor), need in zip(small.items(), needs, strict=True)
    }
    with torch.enable_grad():
        v, gatings = call.step.route(leaf, leaves, call.draws)
        extra = call.observe(gatings) if call.observe is not None else None
    wanted = [leaf, *(tensor for tensor in leaves.values() if tensor.requires_grad)]
    outputs, grads = (
        ([v], [dv.to(v.dtype)]) if extra is None else ([v, extra], [dv.to(v.dtype), torch.ones_like(extra)])
    )
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    du = next(found)
    dsmall = [next(found) if tensor.requires_grad else None for tensor in leaves.values()]
    return v.detach(), torch.zeros_like(leaf) if du is None else du, dsmall


def _features(call: _Call, x: Tensor, downs: list[Tensor]) -> Tensor:
    """Return [downs] x, (..., F): one product, or with dropout one for each mask and one for the routers."""
    if call.dropout is None:
        return ops.features(x, downs)
    banks = torch.cat([ops.stack_rows(bank) for bank in downs[: call.num_banks]])
    groups = call.dropout.groups(banks, len(banks))
    parts = [ops.features(_mask(call, x, number).mul_(x), [bank]) for number, bank in enumerate(groups)]
    if call.num_banks < len(downs):
        parts.append(ops.features(x, downs[call.num_banks :]))
    return torch.cat(parts, -1)


def _num_rows(matrices: list[Tensor]) -> int:
    return sum(matrix.numel() // matrix.shape[-1] for matrix in matrices)


def _mask(call: _Call, like: Tensor, number: int) -> Tensor:
    assert call.dropout is not None and call.draws is not None
    return call.draws.keep(like, call.dropout.probability, number)


def _row_gradients(
    call: _Call, du_TF: Tensor, x_TD: Tensor, downs: list[Tensor], shape: torch.Size
) -> list[Tensor | None]:
    """Return the gradients of the down matrices."""
    if call.dropout is None:
        d_FD = du_TF.T @ x_TD
    else:
        num = _num_rows(downs[: call.num_banks])
        parts = []
        for number, du in enumerate(call.dropout.groups(du_TF[:, :num].T, num)):
            parts.append(du @ _mask(call, x_TD.view(shape), number).flatten(0, -2).mul_(x_TD))
        d_FD = torch.cat([*parts, du_TF[:, num:].T @ x_TD])
    pieces = d_FD.split([_num_rows([matrix]) for matrix in downs])
    return [piece.view(matrix.shape).to(matrix.dtype) for piece, matrix in zip(pieces, downs, strict=True)]


def _input_gradient(call: _Call, du_TF: Tensor, downs: list[Tensor], x: Tensor) -> Tensor:
    """Return dx in the shape and dtype of x."""
    rows = torch.cat([ops.stack_rows(matrix).to(du_TF.dtype) for matrix in downs])
    if call.dropout is None:
        return (du_TF @ rows).view(x.shape).to(x.dtype)
    num = _num_rows(downs[: call.num_banks])
    dx_TD = None
    duos = zip(call.dropout.groups(du_TF[:, :num].T, num), call.dropout.groups(rows[:num], num), strict=True)
    for number, (du, bank) in enumerate(duos):
        part = (du.T @ bank).view(x.shape)
        part.mul_(_mask(call, part, number))
        dx_TD = part.flatten(0, -2) if dx_TD is None else dx_TD.add_(part.flatten(0, -2))
    assert dx_TD is not None
    if num < len(rows):
        dx_TD.addmm_(du_TF[:, num:], rows[num:])
    return dx_TD.view(x.shape).to(x.dtype)


__all__ = ["Dropout", "add_mixture"]
