"""PEFT's linear combination: A = sum_i sqrt(|w_i s_i|) A_i, B = sum_i sign(w_i) sqrt(|w_i s_i|) B_i, at one rank.

Cheap and cross-talking: the product has terms B_i A_j that no LoRA had. Same numbers as PEFT's `add_weighted_adapter`
with combination_type="linear".
"""

import math
from collections.abc import Sequence

import torch

from qd2mora.composition.inputs import all_linears
from qd2mora.errors import InputRefused
from qd2mora.mixture.low_rank import LowRank
from qd2mora.mixture.trained_loras import TrainedLora


def compose(loras: Sequence[TrainedLora], weights: Sequence[float]) -> dict[str, LowRank]:
    """Return the combination; every LoRA must have one and the same rank. Raises InputRefused."""
    ranks = sorted({lora.rank for lora in loras})
    if len(ranks) > 1:
        raise InputRefused(f"linear adds banks of one rank, these have {', '.join(map(str, ranks))}; cat takes any")
    composed = {}
    for name in all_linears(loras):
        parts = [(lora, weight) for lora, weight in zip(loras, weights, strict=True) if name in lora.pairs]
        # The weight is shared between the factors, as PEFT does it; a negative one turns B alone.
        sizes = [math.sqrt(abs(weight) * lora.scaling) for lora, weight in parts]
        downs = [size * lora.pairs[name][0] for size, (lora, _) in zip(sizes, parts, strict=True)]
        ups = [
            math.copysign(size, weight) * lora.pairs[name][1] for size, (lora, weight) in zip(sizes, parts, strict=True)
        ]
        composed[name] = LowRank(torch.stack(downs).sum(0), torch.stack(ups).sum(0), 1.0)
    return composed


__all__ = ["compose"]
