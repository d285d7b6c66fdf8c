"""How tensors start. At step 0 the adapted model is the base for any router, because routed up experts are zero.

Initialisers that make B A differ from zero go to the shared expert alone, and its start is subtracted again (`start`),
so that even there nothing changes at step 0, on any base, 4-bit included. The one exception is LoftQ's: it starts at
what 4-bit quantisation lost, so the adapted model starts nearer to the 16-bit base than its 4-bit base does.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from qd2mora.mixture.config import MixtureConfig
    from qd2mora.mixture.spec import LinearSpec


def initial_tensor(name: str, shape: tuple[int, ...], config: "MixtureConfig", spec: "LinearSpec") -> Tensor:
    """Return the start of one tensor, from torch's generator; B zero, the rest as each method's code does."""
    row, tensor = config.row, torch.empty(shape)
    if name in ("mixture_B", "mixture_shared_B", "mixture_start_A", "mixture_start_B", "mixture_base_scale"):
        return tensor.zero_()
    if name.startswith(("mixture_select_bias", "mixture_bias")):
        return tensor.zero_()
    if name == "mixture_A":
        return initial_down(tensor, config.init or "kaiming", row.init_std or 1 / shape[-2], spec)
    if name == "mixture_core":
        return _initial_core(tensor, row.core, row.scales)
    if name == "mixture_task_embedding":
        return nn.init.normal_(tensor)
    if name.startswith("mixture_logits"):
        return tensor.normal_() if row.base_scale is False else tensor.zero_()
    if name.startswith("mixture_router") and row.router_std is not None:
        return nn.init.normal_(tensor, std=row.router_std)
    return kaiming(tensor)


def initial_down(tensor: Tensor, kind: str, std: float, spec: "LinearSpec") -> Tensor:
    """Start down experts: kaiming, gaussian with `std`, orthogonal rows over the whole bank, or frozen sparse rows."""
    match kind:
        case "gaussian":
            return nn.init.normal_(tensor, std=std)
        case "orthogonal" if not tensor.is_meta:
            # Rows of all experts orthogonal to each other, at Kaiming's size: experts start as different as can be.
            rows = nn.init.orthogonal_(tensor.flatten(0, -2))
            return rows.mul_(1 / math.sqrt(3)).view(tensor.shape)
        case "sparse" if not tensor.is_meta:
            return sparse(tensor, _active_share(spec))
    return kaiming(tensor)


def kaiming(tensor: Tensor) -> Tensor:
    """Kaiming uniform with a = sqrt(5) over the last axis: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(tensor.shape[-1])
    return nn.init.uniform_(tensor, -bound, bound)


def sparse(tensor: Tensor, share: float) -> Tensor:
    """Give each row floor(share * d) entries ~ N(0, 1/r^2) at random places, the rest zero (FlyLoRA; r its rank)."""
    rank, d_in = tensor.shape[-2], tensor.shape[-1]
    number = max(1, int(share * d_in))
    places = torch.rand(tensor.shape).topk(number, -1).indices
    return tensor.zero_().scatter_(-1, places, torch.randn(*tensor.shape[:-1], number) / rank)


def _active_share(spec: "LinearSpec") -> float:
    gate = spec.gate("rank")
    return 1.0 if gate is None or gate.top_k is None else gate.top_k / spec.step.width_down


def _initial_core(tensor: Tensor, kind: str, scales: tuple[int, ...]) -> Tensor:
    if kind == "diagonal":
        # Near one, so that a bank of modulations starts near plain LoRA and its experts differ.
        return nn.init.normal_(tensor, mean=1.0, std=0.1)
    if kind == "kron":
        kernels = [nn.init.normal_(torch.empty(scale, scale, device=tensor.device), std=1 / scale) for scale in scales]
        return torch.cat([kernel.flatten() for kernel in kernels])
    return kaiming(tensor)


__all__ = ["initial_down", "initial_tensor", "kaiming", "sparse"]
