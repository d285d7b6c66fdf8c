"""FlyLoRA's merge (github gfyddha/FlyLoRA): adapters of one frozen sparse A are averaged, B = sum_i w_i B_i.

With one A, sum_i w_i B_i A = (sum_i w_i B_i) A to the last term: there is no B_i A_j that no adapter had, which is what
random frozen projections are for. The ranks that a token takes are chosen by |A x + d|: adapters whose selection biases
d are equal are averaged exactly, and where they moved apart their mean, weighed by |w_i|, chooses. A is the same where
runs share `train.seed`, rank and targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qd2mora.composition.inputs import read_mixture
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.start_folder import alike

_AVERAGED = "mixture_B"
_SELECTION = "mixture_select_bias_"
_COMPARED = ("method", "rank", "alpha", "rank_stabilized", "gates", "shared", "target_modules")


@dataclass(frozen=True)
class Averaged:
    """The one adapter: its configuration, its tensors by linear and name, and how far selection biases were apart."""

    config: MixtureConfig
    tensors: dict[str, Tensor]
    bias_spread: float


def average(folders: Sequence[str], weights: Sequence[float]) -> Averaged:
    """Return the weighted average of adapters that share a frozen A. Raises InputRefused, DamagedFile."""
    read = [read_mixture(folder) for folder in folders]
    config, first = read[0]
    _check(folders, [config for config, _ in read], first)
    tensors, spread = {}, 0.0
    for name, own in first.items():
        for folder, (_, other) in zip(folders, read, strict=True):
            if name not in other or not other[name]["mixture_A"].equal(own["mixture_A"]):
                raise InputRefused(
                    f"average: the frozen A of '{folder}' at {name} is not that of '{folders[0]}'; train both with one "
                    "train.seed, one rank and the same targets"
                )
        tensors[f"{name}.mixture_A"] = own["mixture_A"]
        for kind in own.keys() - {"mixture_A"}:
            # float64 until it is rounded once: equal adapters with weights that sum to one come out to the bit.
            each = torch.stack([other[name][kind] for _, other in read]).double()
            tensors[f"{name}.{kind}"] = _weighed(each, weights, is_mean=kind.startswith(_SELECTION)).float()
            if kind.startswith(_SELECTION):
                spread = max(spread, float((each - each[:1]).abs().max()))
    return Averaged(config, tensors, spread)


def _weighed(each_N: Tensor, weights: Sequence[float], *, is_mean: bool) -> Tensor:
    weight_N = torch.tensor(weights, dtype=torch.float64)
    if is_mean:
        # A bias chooses and never weighs: whatever the weights sum to, it is a mean of biases.
        weight_N = weight_N.abs() / weight_N.abs().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.einsum("n,n...->...", weight_N, each_N)


def _check(folders: Sequence[str], configs: Sequence[MixtureConfig], tensors: dict[str, dict[str, Tensor]]) -> None:
    first = configs[0]
    if "mixture_A" not in first.frozen_tensors or first.init != "sparse":
        raise InputRefused(
            f"average: {first.method} trains its A, so that a mean of B would be of another A; flylora freezes it. "
            "cat adds LoRAs exactly"
        )
    kinds = set().union(*tensors.values()) - {"mixture_A", _AVERAGED}
    trained = sorted(kind for kind in kinds if not kind.startswith(_SELECTION))
    if trained:
        raise InputRefused(f"average: '{folders[0]}' trains more than B: {trained[0]}")
    for folder, config in zip(folders, configs, strict=True):
        for key in _COMPARED:
            if not alike(getattr(config, key), getattr(first, key)):
                one, other = getattr(first, key), getattr(config, key)
                raise InputRefused(f"average: adapter.{key} is {one} in '{folders[0]}' and {other} in '{folder}'")


__all__ = ["Averaged", "average"]
