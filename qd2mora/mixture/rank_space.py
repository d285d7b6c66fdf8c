"""The step in rank space and its gradient: by a kernel pair on a GPU, by the plain twin and autograd elsewhere."""

import functools
import importlib
import importlib.util
import logging
import subprocess
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from qd2mora.mixture.draws import Draws
from qd2mora.routed.ops import RankStep, wide
from qd2mora.routed.routers import Gating

_log = logging.getLogger(__name__)

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


def runs_kernels(u: Tensor) -> bool:
    """Tell whether a tensor lies where kernels run: really on a GPU, not a stand-in for shapes alone."""
    # FakeTensor and DTensor are Tensors on "cuda" as well; a kernel would take their storage for real.
    return u.is_cuda and type(u) in (Tensor, torch.nn.Parameter)


def _kernel_for(step: RankStep, u: Tensor, small: dict[str, Tensor]) -> ModuleType | None:
    if not runs_kernels(u):
        return None
    kernel = working_kernel(u.device)
    if kernel is None or not kernel.covers(step, small, u.dtype):
        return None
    return kernel


@functools.cache
def working_kernel(device: torch.device) -> ModuleType | None:
    """Return the kernels' module where a small launch ends well; why it did not is logged, once.

    Triton comes with torch where there is a GPU, and is not needed elsewhere. It builds its launcher with the machine's
    C compiler and Python's headers, which many machines do not have, and finds that out at the first launch.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        # Imported by name and late: the module needs Triton as soon as it is read.
        kernel = importlib.import_module("qd2mora.mixture.rank_kernel")
        kernel.try_out(device)
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        _log.warning("kernels: Triton does not run here (%s); the same step by PyTorch alone, which is slower", why[-1])
        return None
    return kernel


__all__ = ["Observe", "mix", "runs_kernels", "through", "working_kernel"]
