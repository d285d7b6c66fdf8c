"""Given LoRAs beside a base's linears, each with a weight, without putting an adapter into the model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from qd2mora.errors import InputRefused
from qd2mora.mixture.trained_loras import TrainedLora


@contextmanager
def beside(model: Any, loras: Sequence[TrainedLora], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let every linear give W x + sum_i w_i s_i B_i A_i x while the block runs."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = []
    for name, weight in weights.items():
        linear = linears.get(name)
        parts = [(number, lora) for number, lora in enumerate(loras) if name in lora.pairs]
        down, up = parts[0][1].pairs[name]
        if linear is None or (linear.in_features, linear.out_features) != (down.shape[1], up.shape[0]):
            raise InputRefused(f"the recipe's base has no {name} of {up.shape[0]} x {down.shape[1]}")
        handles.append(linear.register_forward_hook(_update(name, parts, weight)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _update(name: str, parts: list[tuple[int, TrainedLora]], weight_N: Tensor) -> Any:
    """Return a hook that adds the weighted LoRAs of one linear to its output."""
    device = weight_N.device
    # One product for all LoRAs of a linear; each rank is weighed by the number of its LoRA.
    owners = torch.cat([torch.full((lora.pairs[name][0].shape[0],), number) for number, lora in parts]).to(device)
    down = torch.cat([lora.pairs[name][0] for _, lora in parts]).to(device)
    up = torch.cat([lora.scaling * lora.pairs[name][1] for _, lora in parts], 1).to(device)

    def add(linear: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        u = F.linear(inputs[0], down.to(y.dtype)) * weight_N[owners].to(y.dtype)
        return y + F.linear(u, up.to(y.dtype))

    return add


__all__ = ["beside"]
