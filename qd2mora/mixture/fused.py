"""The fast form: a frozen linear and the whole mixture beside it as one autograd function.

Forward: y = W x + b, one product u = x [A; routers that read x]^T, a step in rank space v = K_t u, one product
y += s v B^T in place. Backward: dx = dy W, dv = s dy B, the step in rank space again with its gradient (`rank_space`: a
kernel pair on a GPU), then the gradients of A and B as one product each, and dx += du [A; routers] in place. Saved for
the backward pass: x (which the base's own backward does not need) and u. Dropout and noise keep their keys, not their
numbers. Where the base's product is somebody else's (trained, hooked, under autocast), or another adapter came first, y
is given and added into.

`forward` and `backward` are pure functions of tensors and a `FusedCall`; `_FusedMixture` calls them for eager autograd,
`compiled` as operators of torch.library.

Deviation from the plain form in `ops`: none in exact arithmetic; in 16 bits the update is rounded once, with y.

Shapes: T tokens, D d_in, O d_out, F all rows that read x, P all ranks of the up banks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from qd2mora.mixture import frozen, rank_space
from qd2mora.mixture.draws import Draws
from qd2mora.mixture.frozen import WeightLayout, flat
from qd2mora.mixture.rank_space import Observe
from qd2mora.routed import ops
from qd2mora.routed.ops import RankStep


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
class FusedCall:
    """What one adapter of one linear knows beside tensors. Tensors come as downs, then ups, then small ones by name.

    `layout` is the frozen base's, None where y is given. `draws`, `observe` and `watch`, which is shown u and v of the
    forward pass, belong to one call.
    """

    num_downs: int
    num_ups: int
    names: tuple[str, ...]
    step: RankStep
    scaling: float
    layout: WeightLayout | None = None
    dropout: Dropout | None = None
    draws: Draws | None = None
    observe: Observe | None = None
    watch: Callable[[Tensor, Tensor], None] | None = None

    @property
    def num_banks(self) -> int:
        """Down matrices that are not routers."""
        return self.num_downs - len(self.step.router_rows)

    def parts(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        """Return down matrices, up banks and small tensors."""
        ups = self.num_downs + self.num_ups
        small = dict(zip(self.names, tensors[ups:], strict=True))
        return list(tensors[: self.num_downs]), list(tensors[self.num_downs : ups]), small


def forward(call: FusedCall, y: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Add the mixture of x (..., D) into y (..., O), contiguous, in place; return u (..., F) in the dtype of y."""
    downs, ups, small = call.parts(tensors)
    # In the dtype of y, which autocast or a 4-bit base may have made narrower than x.
    u = _features(call, x.to(y.dtype), downs)
    v = rank_space.mix(call.step, u, small, call.draws)
    if call.watch is not None:
        call.watch(u, v)
    # The base's output is the accumulator: no second tensor of tokens x d_out is made, and the sum is rounded once.
    y.view(-1, y.shape[-1]).addmm_(flat(v).to(y.dtype), _columns(ups, y.dtype).T, alpha=call.scaling)
    return u


def backward(
    call: FusedCall,
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    base: list[Tensor],
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x through the mixture (and the base that `call.layout` names), and those of the tensors.

    `needs`: whether x, and then each of the tensors, needs one.
    """
    needs_x, *needs = needs
    downs, ups, small = call.parts(tensors)
    num_downs, num_large = call.num_downs, call.num_downs + call.num_ups
    dy_TO = flat(dy)
    # The scale goes into the narrow tensor, P wide, and not into dy, O wide.
    dv_TP = (dy_TO @ _columns(ups, dy.dtype)).mul_(call.scaling)
    dv = dv_TP.view(*u.shape[:-1], -1)
    # v is made again from u: keeping it would cost P numbers a token in every linear.
    v, du, dsmall = rank_space.through(call.step, u, small, dv, needs[num_large:], call.draws, call.observe)
    # Gates were differentiated in float32; the large products run in the dtype of y again.
    du_TF = flat(du).to(dy.dtype)
    dups: list[Tensor | None] = [None] * len(ups)
    # Banks that are frozen (given experts, FlyLoRA's A) cost no product.
    if any(needs[num_downs:num_large]):
        dups = _column_gradients(call, dy_TO, flat(v).to(dy.dtype), ups)
    ddowns: list[Tensor | None] = [None] * num_downs
    if any(needs[:num_downs]):
        ddowns = _row_gradients(call, du_TF, flat(x).to(dy.dtype), downs, x.shape)
    # Linears of the first layer read states that need no gradient: the weight is then not dequantised again.
    dx = None
    if needs_x:
        dx = _input_gradient(call, base, dy_TO, du_TF, downs, x)
    grads = [*ddowns, *dups, *dsmall]
    return dx, [grad if need else None for grad, need in zip(grads, needs, strict=True)]


class Watch(Protocol):
    """Shown u = [A; routers of x] x (..., Q + S + E) and v = K_t u (..., P + S); `small`: what gates read beside u."""

    def __call__(self, u: Tensor, v: Tensor, *, small: dict[str, Tensor]) -> None: ...


class _FusedMixture(torch.autograd.Function):
    """y (..., O) or None, x (..., D), the call, the base's tensors, then the call's tensors."""

    @staticmethod
    def forward(ctx: Any, y: Tensor | None, x: Tensor, call: FusedCall, base: list[Tensor], *tensors: Tensor) -> Tensor:
        if y is None:
            assert call.layout is not None
            y = frozen.product(call.layout, base, x)
        else:
            # Written into below: without the mark autograd would go on with the graph of y as it was before.
            ctx.mark_dirty(y)
        u = forward(call, y, x, tensors)
        ctx.save_for_backward(x, u, *tensors)
        # Frozen, so not among what is saved: hooks that move saved tensors away would move weights.
        # Who watches the forward pass may hold x, which a layer that is recomputed must let go of.
        ctx.call, ctx.base = replace(call, watch=None), base
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        # y is the base's output plus ours, so its gradient goes on to the base as it is.
        dx, grads = backward(ctx.call, dy, x, u, ctx.base, tensors, (needs[1], *needs[4:]))
        return (dy if needs[0] else None, dx, None, None, *grads)


def mixed_linear(
    call: FusedCall, base: list[Tensor], x: Tensor, downs: list[Tensor], ups: list[Tensor], small: Mapping[str, Tensor]
) -> Tensor:
    """Return W x + b + s B K_t A x (..., O), W frozen and described by `call.layout`, in the dtype of x.

    `x` is (..., D); `downs` are (rows, D) or (M, R, D), banks first, then the routers of `step.router_rows`; `ups` are
    banks (N, O, R) or (O, ranks); `small` is what the step reads besides. Routers read x undropped.
    """
    y: Tensor = _FusedMixture.apply(None, x, call, base, *downs, *ups, *small.values())
    return y


def add_mixture(
    call: FusedCall, y: Tensor, x: Tensor, downs: list[Tensor], ups: list[Tensor], small: Mapping[str, Tensor]
) -> Tensor:
    """Add s B K_t A x to y (..., O), in place where autograd allows it, and return the sum; else as `mixed_linear`.

    Products run in the dtype of y.
    """
    # A 4-bit linear with a bias returns a view made inside its own autograd function (bitsandbytes 0.50); autograd
    # forbids adding into such a view.
    is_locked = y._is_view() and isinstance(y.grad_fn, BackwardCFunction)
    y = y.clone() if is_locked else y.contiguous()
    added: Tensor = _FusedMixture.apply(y, x, call, [], *downs, *ups, *small.values())
    return added


def _columns(ups: list[Tensor], dtype: torch.dtype) -> Tensor:
    # Adapters are float32; one cast of their few columns is cheaper than products in float32.
    columns = [ops.stack_columns(up).to(dtype) for up in ups]
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


def _features(call: FusedCall, x: Tensor, downs: list[Tensor]) -> Tensor:
    """Return [downs] x, (..., F): one product, or with dropout one for each mask and one for the routers."""
    if call.dropout is None:
        return ops.features(x, downs)
    banks = torch.cat([ops.stack_rows(bank) for bank in downs[: call.num_banks]])
    # A product for each mask. It is drawn, and x dropped in its memory, because the backward pass reads x as it was.
    groups = call.dropout.groups(banks, len(banks))
    # Routers read x undropped, as in the authors' code: dropout regularises experts and must not shake their choice.
    parts = [ops.features(_mask(call, x, number).mul_(x), [bank]) for number, bank in enumerate(groups)]
    if call.num_banks < len(downs):
        parts.append(ops.features(x, downs[call.num_banks :]))
    return torch.cat(parts, -1)


def _rows(matrices: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([ops.stack_rows(matrix).to(dtype) for matrix in matrices])


def _num_rows(matrices: list[Tensor]) -> int:
    return sum(matrix.numel() // matrix.shape[-1] for matrix in matrices)


def _mask(call: FusedCall, like: Tensor, number: int) -> Tensor:
    assert call.dropout is not None and call.draws is not None
    return call.draws.keep(like, call.dropout.probability, number)


def _row_gradients(
    call: FusedCall, du_TF: Tensor, x_TD: Tensor, downs: list[Tensor], shape: torch.Size
) -> list[Tensor | None]:
    """Return the gradients of the down matrices."""
    if call.dropout is None:
        d_FD = du_TF.T @ x_TD
    else:
        num = _num_rows(downs[: call.num_banks])
        parts = []
        for number, du in enumerate(call.dropout.groups(du_TF[:, :num].T, num)):
            # The mask is drawn anew from its key, and x dropped into it: nothing of either was kept.
            parts.append(du @ flat(_mask(call, x_TD.view(shape), number)).mul_(x_TD))
        d_FD = torch.cat([*parts, du_TF[:, num:].T @ x_TD])
    pieces = d_FD.split([_num_rows([matrix]) for matrix in downs])
    return [piece.view(matrix.shape).to(matrix.dtype) for piece, matrix in zip(pieces, downs, strict=True)]


def _column_gradients(call: FusedCall, dy_TO: Tensor, v_TP: Tensor, ups: list[Tensor]) -> list[Tensor | None]:
    """Return the gradients of the up banks."""
    # One product for all banks, laid out as B's columns are; cut and turned by bank afterwards.
    dB_OP = (dy_TO.T @ v_TP).mul_(call.scaling)
    widths = [up.numel() // len(dB_OP) for up in ups]  # N R of a bank (N, O, R), the ranks of one (O, ranks)
    parts = zip(ups, dB_OP.split(widths, -1), strict=True)
    return [ops.unstack_columns(part.contiguous(), up.shape).to(up.dtype) for up, part in parts]


def _input_gradient(
    call: FusedCall, base: list[Tensor], dy_TO: Tensor, du_TF: Tensor, downs: list[Tensor], x: Tensor
) -> Tensor:
    """Return dx in the shape and dtype of x: what was dropped first, so that no mask lives beside the dense weight."""
    dx_TD, num, rest = None, 0, downs
    if call.dropout is not None:
        # Dropped experts' part of dx lies under their masks, so it is made apart, before anything else is added.
        num, rest = _num_rows(downs[: call.num_banks]), downs[call.num_banks :]
        banks = _rows(downs[: call.num_banks], du_TF.dtype)
        duos = zip(call.dropout.groups(du_TF[:, :num].T, num), call.dropout.groups(banks, num), strict=True)
        for number, (du, bank) in enumerate(duos):
            # Mask by mask, drawn again from its key, so that one of them is there at a time.
            part = (du.T @ bank).view(x.shape)
            part.mul_(_mask(call, part, number))
            if dx_TD is None:
                dx_TD = flat(part)
            else:
                dx_TD = dx_TD.add_(flat(part))
    if call.layout is not None:
        dx_TD = frozen.input_gradient(call.layout, base, dy_TO, dx_TD)
    if dx_TD is None:
        dx_TD = du_TF @ _rows(rest, du_TF.dtype)
    elif rest:
        # What read x undropped: the routers, and without dropout the banks too.
        dx_TD.addmm_(du_TF[:, num:], _rows(rest, du_TF.dtype))
    return dx_TD.view(x.shape).to(x.dtype)


__all__ = ["Dropout", "FusedCall", "Observe", "Watch", "add_mixture", "backward", "forward", "mixed_linear"]
