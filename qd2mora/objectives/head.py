"""The head of a reward model: from the last state of a text's last token to one number, in float32.

It is a module of the adapted model, so that it is trained, saved in checkpoints and resumed as the adapter is; beside
the adapter it has a file of its own.
"""

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from qd2mora.adapter_folder import HEAD
from qd2mora.base.passes import IGNORE, device_of, last_states
from qd2mora.disk.tensor_file import stored_tensors
from qd2mora.errors import InputRefused
from qd2mora.mixture import read_rows

NAME = "reward_head"


class RowScore(nn.Module):
    """Wraps a model with a head; its forward gives the score of each row."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the score of each row, (rows,) float32."""
        read_rows(self.model, batch)
        return scores_of(last_states(self.model, batch), batch["labels"], head_of(self.model).weight)


def scores_of(states: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Return the score (rows,) of each row's last learned token; states (rows, length, hidden), weight (1, hidden)."""
    # The first place at which the count of learned tokens is what it will be: that of the last one.
    last = (labels != IGNORE).long().cumsum(1).argmax(1)
    of_last = states[torch.arange(len(states), device=states.device), last]
    return (of_last.float() @ weight.float().T)[:, 0]


def add_head(model: PeftModel, seed: int, start: Path | None = None) -> None:
    """Give an adapted model a head, drawn at random or that of the adapter's folder `start`, where it has one."""
    device, width = device_of(model), width_of(model)
    head = nn.Linear(width, 1, bias=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # As Stiennon et al. draw it: scores begin near zero, and none of the states is without a gradient.
        head.weight.normal_(std=1 / math.sqrt(width + 1), generator=generator)
        if start is not None and (start / HEAD).is_file():
            head.weight.copy_(stored_head(start, width))
    model.add_module(NAME, head.to(device))


def width_of(model: PeftModel) -> int:
    """Return the width of a model's states."""
    base: Any = model.get_base_model()
    return int(base.config.hidden_size)


def head_of(model: PeftModel) -> nn.Linear:
    """Return a model's head."""
    head = dict(model.named_children())[NAME]
    assert isinstance(head, nn.Linear)
    return head


def stored_head(folder: Path, width: int) -> Tensor:
    """Return the weight of a saved head, (1, hidden). Raises InputRefused."""
    if not (folder / HEAD).is_file():
        raise InputRefused(f"'{folder}' holds no {HEAD}: it is no reward model; train one with objective: reward")
    weight = stored_tensors([folder / HEAD])["weight"].read()
    if weight.shape != (1, width) or not weight.isfinite().all():
        raise InputRefused(f"'{folder / HEAD}' is no head of this base: {tuple(weight.shape)} for a width of {width}")
    return weight


__all__ = ["NAME", "RowScore", "add_head", "head_of", "scores_of", "stored_head", "width_of"]
