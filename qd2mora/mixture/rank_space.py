"""The step in rank space and its gradient: by a kernel pair on a GPU, by the plain twin and autograd elsewhere."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from qd2mora.mixture.draws import Draws
from qd2mora.mixture.ops import RankStep, wide
from qd2mora.mixture.routers import Gating

Observe = Callable[[Mapping[str, Gating]], Tensor | None]


def mix(step: RankStep, u: Tensor, small: dict[str, Tensor], draws: Draws | None) -> Tensor:
    """Return v (..., P + S) in at least float32 of u (..., F)."""
    kernel = _kernel_for(step, u, small)
    return step.mix(wide(u), small, draws) if kernel is None else kernel.mix(step, u, small)


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
    kernel = None if observe is not None else _kernel_for(step, u, small)
    if kernel is not None:
        v, du, drouter = kernel.through(step, u, small, dv.float())
        return v, du, [drouter if need else None for need in needs]
    leaf = wide(u).detach().requires_grad_()
    leaves = {
        name: tensor.detach().requires_grad_(need) for (name, tensor), need in zip(small.items(), needs, strict=True)
    }
    with torch.enable_grad():
        v, gatings = step.route(leaf, leaves, draws)
        extra = observe(gatings) if observe is not None else None
    wanted = [leaf, *(tensor for tensor in leaves.values() if tensor.requires_grad)]
    outputs, grads = (
        ([v], [dv.to(v.dtype)]) if extra is None else ([v, extra], [dv.to(v.dtype), torch.ones_like(extra)])
    )
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    du = next(found)
    dsmall = [next(found) if tensor.requires_grad else None for tensor in leaves.values()]
    return v.detach(), torch.zeros_like(leaf) if du is None else du, dsmall


def runs_kernels(u: Tensor) -> bool:
    """Tell whether a tensor lies where kernels run: really on a GPU, not a stand-in for shapes alone."""
    return u.is_cuda and type(u) in (Tensor, torch.nn.Parameter)


def _kernel_for(step: RankStep, u: Tensor, small: dict[str, Tensor]) -> ModuleType | None:
    if not runs_kernels(u):
        return None
    kernel = _kernel()
    return kernel if kernel is not None and kernel.covers(step, small, u.dtype) else None


@functools.cache
def _kernel() -> ModuleType | None:
    """Return the kernels' module; Triton comes with torch where there is a GPU, and is not needed elsewhere."""
    found = importlib.util.find_spec("triton") is not None
    return importlib.import_module("qd2mora.mixture.rank_kernel") if found else None


__all__ = ["Observe", "mix", "runs_kernels", "through"]
