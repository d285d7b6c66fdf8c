"""The head of a reward model: from the last state of a text's last token to one number, in float32.

It is a module of the adapted model, so that it is trained, saved in checkpoints and resumed as the adapter is; beside
the adapter it has a file of its own. Two kinds: a linear, s = w h; or, over the scores s_e of the same text under each
of a trained adapter's experts, which stay as they are, a small network for each task t:

    r = mean_e s_e + v_t PReLU(U_t s + b_t)

DMoERM (arXiv 2403.01197): experts by capability are trained first, then frozen under a small network, and which one
depends on the kind of task. Deviations: all capabilities share one linear, and the network reads the scores that it
makes, not the states that it reads; it begins as their mean; the task is told, where DMoERM classifies the prompt.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from qd2mora.adapter_folder import HEAD
from qd2mora.base.passes import IGNORE, device_of, last_states
from qd2mora.disk.tensor_file import stored_tensors
from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig, read_rows
from qd2mora.recipe.objective import HEAD_WIDTH

NAME = "reward_head"
Batch = Mapping[str, Tensor]


class OverExperts(nn.Module):
    """The network over the scores of E experts, one for each of T tasks; `weight` (1, hidden) makes those, frozen."""

    def __init__(self, weight: Tensor, num_tasks: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.inner = nn.Parameter(torch.zeros(num_tasks, HEAD_WIDTH, num_experts))
        self.bias = nn.Parameter(torch.zeros(num_tasks, HEAD_WIDTH))
        self.slope = nn.Parameter(torch.full((num_tasks,), 0.25))
        self.outer = nn.Parameter(torch.zeros(num_tasks, HEAD_WIDTH))

    def forward(self, scores_RE: Tensor, task_R: Tensor) -> Tensor:
        """Return the reward of each row, (rows,) float32."""
        # Products and sums, no matrix product, which autocast would do in 16 bits.
        inner = (self.inner[task_R] * scores_RE.unsqueeze(1)).sum(-1) + self.bias[task_R]
        hidden = torch.where(inner > 0, inner, self.slope[task_R].unsqueeze(1) * inner)
        return scores_RE.mean(-1) + (self.outer[task_R] * hidden).sum(-1)


Head = nn.Linear | OverExperts


class RowScore(nn.Module):
    """Wraps a model with a head; its forward gives the score of each row."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the score of each row, (rows,) float32."""
        return scored(head_of(self.model), self._states, batch)

    def _states(self, batch: Batch) -> Tensor:
        read_rows(self.model, batch)
        if not isinstance(head_of(self.model), OverExperts):
            return last_states(self.model, batch)
        is_training = self.model.training
        self.model.eval()  # experts that are not trained are what they will be: without dropout
        states = last_states(self.model, batch)
        self.model.train(is_training)
        return states


def scored(head: Head, states: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """Return what a head scores the rows of a batch, (rows,); `states` are a model's last ones, routed by the batch."""
    if isinstance(head, OverExperts):
        task, num_experts = batch["task_index"], head.inner.shape[-1]
        with torch.no_grad():
            each = [
                scores_of(states({**batch, "task_index": torch.full_like(task, expert)}), batch["labels"], head.weight)
                for expert in range(num_experts)
            ]
        over: Tensor = head(torch.stack(each, -1), task)
        return over
    return scores_of(states(batch), batch["labels"], head.weight)


def scores_of(states: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Return the score (rows,) of each row's last learned token; states (rows, length, hidden), weight (1, hidden)."""
    # The first place at which the count of learned tokens is what it will be: that of the last one.
    last = (labels != IGNORE).long().cumsum(1).argmax(1)
    of_last = states[torch.arange(len(states), device=states.device), last]
    return (of_last.float() @ weight.float().T)[:, 0]


def add_head(model: PeftModel, seed: int, start: Path | None = None, over_tasks: int | None = None) -> None:
    """Give an adapted model a head, drawn at random or that of the adapter's folder `start`, where it has one.

    over_tasks: of how many tasks a head over experts tells networks apart, which alone is trained then. Raises
    InputRefused where the adapter has no experts of tasks' own, or its own head is over experts and this is not to be.
    """
    device, width = device_of(model), width_of(model)
    head = nn.Linear(width, 1, bias=False)
    generator = torch.Generator().manual_seed(seed)
    has_start = start is not None and (start / HEAD).is_file()
    with torch.no_grad():
        # As Stiennon et al. draw it: scores begin near zero, and none of the states is without a gradient.
        head.weight.normal_(std=1 / math.sqrt(width + 1), generator=generator)
        if start is not None and has_start:
            there = stored_head(start, width)
            if isinstance(there, OverExperts) and over_tasks is None:
                raise InputRefused(f"adapter.start: '{start}' scores by a head over experts; objective.head: experts")
            head.weight.copy_(there.weight)
    if over_tasks is None:
        model.add_module(NAME, head.to(device))
        return
    if start is not None and not has_start:
        raise InputRefused(f"objective.head: experts, but '{start}' holds no {HEAD}: it is no reward model")
    over = OverExperts(head.weight.detach(), over_tasks, num_own_experts(model))
    with torch.no_grad():
        over.inner.normal_(std=1 / math.sqrt(over.inner.shape[-1]), generator=generator)
    model.requires_grad_(False)
    model.add_module(NAME, over.to(device))


def num_own_experts(model: PeftModel) -> int:
    """Return how many tasks have an expert of their own. Raises InputRefused where they have none."""
    config = model.peft_config["default"]
    is_own = isinstance(config, MixtureConfig) and any(each.select == "fixed" for each in config.routers.values())
    number = config.num_tasks if is_own and isinstance(config, MixtureConfig) else None
    if number is None or number < 2:
        raise InputRefused(
            "objective.head: experts, but adapter.start has no experts of several tasks; train one with method: peam "
            "and objective: reward, a task for each capability"
        )
    return number


def width_of(model: PeftModel) -> int:
    """Return the width of a model's states."""
    base: Any = model.get_base_model()
    return int(base.config.hidden_size)


def head_of(model: PeftModel) -> Head:
    """Return a model's head."""
    head = dict(model.named_children())[NAME]
    assert isinstance(head, nn.Linear | OverExperts)
    return head


def head_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return the tensors of a model's head by name; none where it has none."""
    head = dict(model.named_children()).get(NAME)
    return {} if head is None else {name: tensor.detach() for name, tensor in head.named_parameters()}


def stored_head(folder: Path, width: int) -> Head:
    """Return a saved head. Raises InputRefused."""
    if not (folder / HEAD).is_file():
        raise InputRefused(f"'{folder}' holds no {HEAD}: it is no reward model; train one with objective: reward")
    tensors = {name: each.read() for name, each in stored_tensors([folder / HEAD]).items()}
    made: Head = nn.Linear(width, 1, bias=False)
    if "inner" in tensors and tensors["inner"].dim() == 3:
        made = OverExperts(torch.zeros(1, width), tensors["inner"].shape[0], tensors["inner"].shape[2])
    wanted = {name: tensor.shape for name, tensor in made.named_parameters()}
    there = {name: tensor.shape for name, tensor in tensors.items()}
    if wanted != there or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise InputRefused(f"'{folder / HEAD}' is no head of this base: {_shapes(there)} for a width of {width}")
    made.load_state_dict(tensors)
    return made


def _shapes(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())


__all__ = [
    "NAME",
    "Head",
    "OverExperts",
    "RowScore",
    "add_head",
    "head_of",
    "head_tensors",
    "num_own_experts",
    "scored",
    "scores_of",
    "stored_head",
    "width_of",
]
