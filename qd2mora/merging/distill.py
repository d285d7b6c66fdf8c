"""Distillation: the static factors learn the routed model's own distributions on training rows.

Minimises KL(routed | static) over labelled tokens by Adam, from the best closed form, with the rate falling to zero
(which averages the last iterates). Teacher and student are one model: the frozen base and the routed adapter are
there once, and the student's factors stand in for routing while it runs. The teacher is asked once a row; its final
hidden states at labelled tokens are kept, not its logits. Neither dropout nor routers of the student need memory, so
a step takes what a training step of a LoRA takes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from qd2mora.memory.loss import CHUNK, IGNORE, labelled_states, output_head
from qd2mora.merging.setting import Batches
from qd2mora.merging.static import replaced
from qd2mora.mixture.low_rank import LowRank

LEARNING_RATE = 1e-3
WARM_UP = 0.05
KEPT_BYTES = 256 << 20


@dataclass
class Teacher:
    """The routed model's final hidden states at labelled tokens, kept on the CPU while they are few."""

    model: PeftModel
    kept_bytes: int = 0
    kept: dict[int, Tensor] = field(default_factory=dict)

    def states(self, number: int, batch: dict[str, Tensor]) -> Tensor:
        """Return (labelled, hidden) of batch `number`."""
        if number in self.kept:
            return self.kept[number].to(batch["labels"].device)
        with torch.no_grad():
            states = labelled_states(self.model, batch, _labelled(batch))
        if self.kept_bytes + states.nbytes <= KEPT_BYTES:
            self.kept_bytes += states.nbytes
            self.kept[number] = states.cpu()
        return states


def distill(
    model: PeftModel,
    start: Mapping[str, LowRank],
    batches: Batches,
    steps: int,
    seed: int,
    learning_rate: float = LEARNING_RATE,
) -> dict[str, LowRank]:
    """Return `start` trained for `steps` steps of one batch each, batches in a new order each time round."""
    student = {name: _balanced(static) for name, static in start.items()}
    parameters = [nn.Parameter(factor) for static in student.values() for factor in (static.down, static.up)]
    pairs = zip(student.items(), zip(parameters[::2], parameters[1::2], strict=True), strict=True)
    student = {name: LowRank(down, up, 1.0, static.base_change) for (name, static), (down, up) in pairs}
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    teacher, generator = Teacher(model), np.random.default_rng(seed)
    order: list[int] = []
    for step in range(steps):
        order = order or generator.permutation(len(batches)).tolist()
        number = order.pop()
        wanted = teacher.states(number, batches[number])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _factor(step, steps)
        with replaced(model, student):
            loss = divergence(model, batches[number], wanted)
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: LowRank(each.down.detach(), each.up.detach(), 1.0, each.base_change) for name, each in student.items()
    }


def divergence(model: PeftModel, batch: dict[str, Tensor], wanted: Tensor) -> Tensor:
    """Return the mean KL(teacher | model as it runs) over a batch's labelled tokens; `wanted` are teacher's states."""
    head, states = output_head(model), labelled_states(model, batch, _labelled(batch))
    parts = [
        checkpoint(_divergence, mine, theirs, head, use_reentrant=False)
        if len(states) > CHUNK
        else _divergence(mine, theirs, head)
        for mine, theirs in zip(states.split(CHUNK), wanted.split(CHUNK), strict=True)
    ]
    return torch.stack(parts).sum() / max(1, len(states))


def _divergence(mine: Tensor, theirs: Tensor, head: nn.Module) -> Tensor:
    with torch.no_grad():
        target = head(theirs).float().log_softmax(-1)
    return F.kl_div(head(mine).float().log_softmax(-1), target, reduction="sum", log_target=True)


def _labelled(batch: dict[str, Tensor]) -> Tensor:
    return batch["labels"][:, 1:] != IGNORE


def _factor(step: int, steps: int) -> float:
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _balanced(static: LowRank) -> LowRank:
    """Return the same update with factors of equal size, scaling 1: one learning rate is right for both."""
    q_up, r_up = torch.linalg.qr(static.scaling * static.up)
    q_down, r_down = torch.linalg.qr(static.down.T)
    left, sizes, right = torch.linalg.svd(r_up @ r_down.T)
    root = sizes.sqrt()
    return LowRank(root[:, None] * (right @ q_down.T), (q_up @ left) * root, 1.0, static.base_change)


__all__ = ["Teacher", "distill", "divergence"]
