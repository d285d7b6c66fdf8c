"""What an export does to each weight, rows in, new rows out: no update is ever dense as a whole."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from qd2mora.merging.static import Statics
from qd2mora.mixture.low_rank import LowRank

Fold = Callable[[Tensor, int], Tensor]
"""Takes rows of W (n, d_in) float32 and the number of the first; returns the new rows, fresh."""


def folds_of(model: PeftModel, statics: Statics, adapter_name: str = "default") -> dict[str, Fold]:
    """Return the folds of every adapted linear by its name; they hold copies on the CPU and not the model."""
    folds = {name: _low_rank(static.to(torch.device("cpu"))) for name, static in statics.items()}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.use_dora:
            folds[name.removeprefix("base_model.model.")] = _dora(module, adapter_name)
    return folds


def _low_rank(static: LowRank) -> Fold:
    """Return W + s B A, or a_0 W + s B A where the method scales its base."""

    def fold(rows: Tensor, start: int) -> Tensor:
        up = static.up[start : start + len(rows)]
        return torch.addmm(rows, up, static.down, beta=1 + static.base_change, alpha=static.scaling)

    return fold


def _dora(layer: Any, adapter_name: str) -> Fold:
    """Return m (W + s B A) / |W + s B A|_row of one of PEFT's DoRA linears."""
    down, up = (bank[adapter_name].weight.detach().float().cpu() for bank in (layer.lora_A, layer.lora_B))
    magnitude, scaling = (
        layer.lora_magnitude_vector[adapter_name].weight.detach().float().cpu(),
        layer.scaling[adapter_name],
    )

    def fold(rows: Tensor, start: int) -> Tensor:
        at = slice(start, start + len(rows))
        moved = torch.addmm(rows, up[at], down, alpha=scaling)
        return (magnitude[at] / moved.norm(dim=1)).unsqueeze(1) * moved

    return fold


__all__ = ["Fold", "folds_of"]
