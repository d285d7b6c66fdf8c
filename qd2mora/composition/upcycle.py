"""Upcycling: a trained LoRA becomes a routed mixture of its own ranks with the same function, to be trained on.

Expert e takes every m-th rank. Routers start at zero, so that each gate is exactly 1 / m, and B is multiplied by m to
make up for it (after Dynamic-DINO's splitting of a trained MLP, arXiv 2507.17436).
"""

import torch
from torch import Tensor

from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig
from qd2mora.mixture.presets import find_method
from qd2mora.mixture.trained_loras import TrainedLora

METHOD = "loramoe"


def upcycle(lora: TrainedLora, experts: int) -> tuple[MixtureConfig, dict[str, Tensor]]:
    """Return the configuration and the tensors, by linear and name, of a mixture of `experts` pairs.

    Raises InputRefused where the rank cannot be shared out.
    """
    if experts < 2 or lora.rank % experts:
        raise InputRefused(f"--experts: {lora.rank} ranks do not share out among {experts} experts, of at least 2")
    rank = lora.rank // experts
    # Its balance steers rows by a group that they seldom have: without, the mixture trains on any rows.
    without = {penalty.kind: 0.0 for penalty in find_method(METHOD).penalties}
    config = MixtureConfig(
        method=METHOD,
        penalties=without,
        rank=rank,
        alpha=lora.scaling * rank,
        down={"experts": experts},
        up={"experts": experts},
        target_modules=sorted(lora.pairs),
        task_type="CAUSAL_LM",
    )
    tensors = {}
    for name, (down, up) in lora.pairs.items():
        # Every m-th rank, not m blocks: where ranks are sorted by size, each expert gets large and small ones.
        tensors[f"{name}.mixture_A"] = torch.stack([down[expert::experts] for expert in range(experts)])
        tensors[f"{name}.mixture_B"] = torch.stack([experts * up[:, expert::experts] for expert in range(experts)])
        tensors[f"{name}.mixture_router_down"] = torch.zeros(experts, down.shape[1])
    return config, tensors


__all__ = ["upcycle"]
