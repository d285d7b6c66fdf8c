"""Optimisers by name, and the learning rate as a pure function of the applied update."""

import math
from typing import Any

import torch
from torch import nn

from qd2mora.recipe import Train


def build_optimizer(train: Train, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser of a recipe over the trainable parameters, in their order."""
    options: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    import bitsandbytes as bnb

    paged = train.optimizer == "paged_adamw_8bit" and parameters[0].is_cuda
    return (bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit)(parameters, **options)


def learning_rate(train: Train, update: int, total: int) -> float:
    """Return the rate of update number `update` (from 0) of `total`: linear warm-up, then the schedule down to zero."""
    if update < train.warmup_steps:
        return train.learning_rate * (update + 1) / train.warmup_steps
    progress = (update - train.warmup_steps) / max(1, total - train.warmup_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[train.schedule]
    return train.learning_rate * factor


__all__ = ["build_optimizer", "learning_rate"]
