"""Growth in stages: a run is cut into as many equal parts as there are experts; in part s expert s alone is trained.

Older experts stay bit for bit what they were: their gradients are zero and their moments are set to zero when the next
stage begins, and an AdamW step without decay then changes nothing. A new expert's up factor is still zero when its
stage begins, so entering a stage changes no output (ScaleZero's DPS; equal parts replace its trigger, tasks solved).
"""

import torch
from torch import nn

from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig, mixture_layers, routing_of
from qd2mora.recipe import Train
from qd2mora.training.zero import ZeroOptimizer


def check_stages(config: MixtureConfig, train: Train) -> None:
    """Refuse what would move frozen experts. Raises InputRefused."""
    if not config.row.stages:
        return
    if train.weight_decay:
        raise InputRefused(
            f"train.weight_decay: {train.weight_decay:g} would move frozen experts of {config.method}; 0"
        )
    if train.optimizer != "adamw":
        raise InputRefused(
            f"train.optimizer: {train.optimizer} keeps moments in blocks that cross experts; adamw for {config.method}"
        )


def stage_of(update: int, total: int, num_stages: int) -> int:
    """Return the stage that update number `update` of `total` belongs to."""
    return min(update * num_stages // total, num_stages - 1)


def enter_stage(
    model: nn.Module, optimizer: torch.optim.Optimizer | ZeroOptimizer, config: MixtureConfig, update: int, total: int
) -> None:
    """Tell the layers which expert this update trains; where a stage begins, forget the moments of older experts."""
    routing = routing_of(model)
    if routing is None or not config.row.stages:
        return
    routing.stage = stage_of(update, total, config.num_down)
    if update == 0 or stage_of(update - 1, total, config.num_down) == routing.stage:
        return
    for layer in mixture_layers(model).values():
        tensors = layer.tensors("default")
        for name in ("mixture_A", "mixture_B"):
            for moment in optimizer.state.get(tensors[name], {}).values():
                if moment.shape == tensors[name].shape:
                    moment[: routing.stage].zero_()


__all__ = ["check_stages", "enter_stage", "stage_of"]
