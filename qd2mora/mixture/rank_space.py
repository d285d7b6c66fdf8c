"""The step in rank space and its gradient: by a kernel pair on a GPU, by the plain twin and autograd elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from qd2mora.mixture.draws import Draws
from qd2mora.mixture.kernels import kernels_for
from qd2mora.routed.ops import RankStep, wide
from qd2mora.routed.routers import Gating

Observe = Callable[[Mapping[str, Gating]], Tensor | None]


def mix(step: RankStep, u: Tensor, small: dict[str, Tensor], draws: Draws | None) -> Tensor:
    """Return v (..., P + S) in at least float32 of u (..., F)."""
    kernel = _kernel_for(step, u, small)
    if kernel is None:
        return step.mix(wide(u), small, draws)
    return kernel.mix(step, u, small)


def through(
    step: RankStep,
    u: Tensor,
    small: dict[str, Tensor],
    dv: Tensor,
    needs: Sequence[bool],
    draws: Draws | None,
    observe: Observe | None,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Do the step again; return v, the gradient of u, and those of the small tensors that need one.

    What `observe` makes of the gates (penalties on routing) joins the loss here; it needs the twin's autograd.
    """
    kernel = _kernel_for(step, u, small)
    # Penalties want gradients of probabilities and logits, which the kernels do not hand out.
    if kernel is not None and observe is None:
        v, du, drouter = kernel.through(step, u, small, dv.float())
        return v, du, [drouter if need else None for need in needs]
    # A graph of its own, for tensors of rank width alone: the outer one never sees the step's many small operations.
    leaf = wide(u).detach().requires_grad_()
    leaves = {
        name: tensor.detach().requires_grad_(need) for (name, tensor), need in zip(small.items(), needs, strict=True)
    }
    # A backward pass runs with autograd off.
    with torch.enable_grad():
        v, gatings = step.route(leaf, leaves, draws)
        outputs, grads = [v], [dv.to(v.dtype)]
        extra = None
        if observe is not None:
            extra = observe(gatings)
    if extra is not None:
        outputs.append(extra)
        grads.append(torch.ones_like(extra))
    wanted = [leaf, *(tensor for tensor in leaves.values() if tensor.requires_grad)]
    # A tensor that this step does not read has no gradient, which is no error.
    du, *found = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
    if du is None:  # autograd found no way from v to u
        du = torch.zeros_like(leaf)
    of_leaf = iter(found)
    return v.detach(), du, [next(of_leaf) if tensor.requires_grad else None for tensor in leaves.values()]


def _kernel_for(step: RankStep, u: Tensor, small: dict[str, Tensor]) -> ModuleType | None:
    kernel = kernels_for(u, "mixture.rank_kernel")
    if kernel is None or not kernel.covers(step, small, u.dtype):
        return None
    return kernel


__all__ = ["Observe", "mix", "through"]
