"""CAT (LoRA Soups, arXiv 2410.13025): LoRAs side by side, W + sum_i w_i s_i B_i A_i, exact at rank sum_i r_i."""

from collections.abc import Mapping, Sequence

import torch

from qd2mora.composition.inputs import all_linears
from qd2mora.mixture.low_rank import LowRank
from qd2mora.mixture.trained_loras import TrainedLora


def compose(
    loras: Sequence[TrainedLora], weights: Sequence[float] | Mapping[str, Sequence[float]]
) -> dict[str, LowRank]:
    """Return the weighted sum of LoRAs, each linear at the rank of all that adapt it; weights may differ by linear."""
    composed = {}
    for name in all_linears(loras):
        own = weights[name] if isinstance(weights, Mapping) else weights
        parts = [(lora, weight) for lora, weight in zip(loras, own, strict=True) if name in lora.pairs]
        # Ranks side by side add up and never meet: no term B_i A_j that no LoRA had.
        down = torch.cat([lora.pairs[name][0] for lora, _ in parts])
        up = torch.cat([weight * lora.scaling * lora.pairs[name][1] for lora, weight in parts], 1)
        composed[name] = LowRank(down, up, 1.0)
    return composed


__all__ = ["compose"]
