"""Optimisers, one row each: what builds it, what its moments take, what it costs in time, what they forbid.

The recipe takes the names from here, the planner bytes and cost, the loop the class. A new one is a name and a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
AUTO: tuple[OptimizerName, ...] = ("adamw", "adamw_8bit")
"""What `auto` chooses from, the fastest first."""

MOMENT_BLOCK, SMALLEST_8BIT = 256, 4096
"""bitsandbytes keeps one float32 maximum for each block of moments, and 32-bit moments of smaller tensors."""
MOMENT_TABLES = 2 * 256 * 4


@dataclass(frozen=True)
class Optimizer:
    """One row of the table."""

    kind: Callable[[bool], type]
    """The class, imported when it is asked for; told whether the parameters are on a GPU."""
    state_bytes: Callable[[Sequence[int]], int]
    """Bytes of both moments, given the entries of each tensor."""
    moment_bytes: float
    """About what an entry of one moment takes on the disk."""
    choice: str
    """Why the plan takes it."""
    cost: float = 0.0
    """Share of a step that it takes longer than the fastest."""
    is_blockwise: bool = False
    """Moments share a scale in blocks, which cross experts and shards: neither can be reset or shared out alone."""
    is_paged: bool = False
    """Moments leave the device where memory is short."""
    options: dict[str, bool] = field(default_factory=dict)


def possible(name: OptimizerName | Literal["auto"]) -> tuple[OptimizerName, ...]:
    """Return the optimisers that a recipe's name may stand for."""
    if name == "auto":
        return AUTO
    return (name,)


def may_be_blockwise(name: OptimizerName | Literal["auto"]) -> bool:
    """Tell whether a recipe's name may stand for an optimiser whose moments share scales."""
    return any(OPTIMIZERS[each].is_blockwise for each in possible(name))


def _adamw(on_gpu: bool) -> type:
    import torch

    return torch.optim.AdamW


def _adamw_8bit(on_gpu: bool) -> type:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


def _paged_adamw_8bit(on_gpu: bool) -> type:
    import bitsandbytes

    # Pages are a matter of CUDA's managed memory: a CPU has none, and nowhere to page to.
    if on_gpu:
        return bitsandbytes.optim.PagedAdamW8bit
    return bitsandbytes.optim.AdamW8bit


def _two_of_32_bits(tensors: Sequence[int]) -> int:
    """PyTorch's fused AdamW keeps a float32 step counter for each tensor besides."""
    return 8 * sum(tensors) + 4 * len(tensors)


def _two_of_8_bits(tensors: Sequence[int]) -> int:
    """Paged moments count in full, as they are while there is room."""
    large = [entries for entries in tensors if entries >= SMALLEST_8BIT]
    small = sum(tensors) - sum(large)
    size = 2 * sum(large) + 8 * small
    if large:
        # Of each block a float32 maximum for either moment; one pair of tables serves all tensors.
        size += 8 * sum(-(-entries // MOMENT_BLOCK) for entries in large) + MOMENT_TABLES
    return size


OPTIMIZERS: dict[OptimizerName, Optimizer] = {
    "adamw": Optimizer(_adamw, _two_of_32_bits, 4, "32-bit moments fit", options={"fused": True}),
    "adamw_8bit": Optimizer(
        _adamw_8bit, _two_of_8_bits, 1.1, "moments of two bytes instead of eight", cost=0.001, is_blockwise=True
    ),
    "paged_adamw_8bit": Optimizer(
        _paged_adamw_8bit,
        _two_of_8_bits,
        1.1,
        "moments of two bytes instead of eight",
        cost=0.001,
        is_blockwise=True,
        is_paged=True,
    ),
}

__all__ = ["AUTO", "OPTIMIZERS", "Optimizer", "OptimizerName", "may_be_blockwise", "possible"]
