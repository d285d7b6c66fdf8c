"""Distillation: the static factors learn the routed model's own distributions on training rows.

Minimises KL(routed | static) over labelled tokens, and a little the relative error of the final hidden states of all
tokens, by Adam, from the best closed form, with the rate falling to zero (which averages the last iterates). Training
rows come in random order, each once before any comes twice: on the same few rows a student overfits. Teacher and
student are one model: the frozen base and the routed adapter are there once, and the student's factors stand in for
routing while it runs. They have at most as many parameters as the adapter, so a step takes what a training step takes.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from qd2mora.base.passes import OutputHead, device_of, labelled, output_head
from qd2mora.memory.checkpointing import recompute_layers
from qd2mora.merging.static_updates import replaced
from qd2mora.merging.statistics import decode
from qd2mora.merging.strategy_inputs import Batches, StrategyInputs
from qd2mora.mixture.low_rank import LowRank
from qd2mora.terminal.pace import paced

ROWS_A_STEP = 8
LEARNING_RATE = 5e-4
WARM_UP = 0.05
STATES_WEIGHT = 3.0
"""Of the hidden states' relative error; a dense signal where labelled tokens are few (a sixth less KL for free)."""
CHUNK = 512
"""Tokens whose logits, teacher's and student's, are there at once."""
KEPT_BYTES = 256 << 20


@dataclass
class Teacher:
    """The routed model's final hidden states; `keeps` those of each batch, while they are few."""

    model: PeftModel
    keeps: bool = False
    kept_bytes: int = 0
    kept: dict[int, Tensor] = field(default_factory=dict)

    def states(self, number: int, batch: dict[str, Tensor]) -> Tensor:
        """Return (rows, length, hidden) of batch `number`."""
        if number in self.kept:
            return self.kept[number].to(batch["labels"].device)
        with torch.no_grad():
            states = decode(self.model, batch)
        if self.keeps and self.kept_bytes + states.nbytes <= KEPT_BYTES:
            self.kept_bytes += states.nbytes
            # On the host: the device is as full as in training.
            self.kept[number] = states.cpu()
        return states


def distill(inputs: StrategyInputs, start: Mapping[str, LowRank], steps: int) -> dict[str, LowRank]:
    """Return `start` trained for `steps` steps of about ROWS_A_STEP rows, at least one batch, each."""
    model, batches = inputs.model, inputs.training
    student = {name: _trainable(static) for name, static in start.items()}
    parameters = [nn.Parameter(factor) for static in student.values() for factor in (static.down, static.up)]
    student = {
        name: LowRank(parameters[2 * place], parameters[2 * place + 1], 1.0, static.base_change)
        for place, (name, static) in enumerate(student.items())
    }
    optimizer = _optimizer(parameters, inputs.eight_bit)
    # Batches are of the training's micro batch, which fits; a step gathers as many as make ROWS_A_STEP.
    per_step = max(1, round(ROWS_A_STEP / max(1, len(batches[0]["labels"]))))
    # States are kept only where a batch comes twice.
    teacher = Teacher(model, keeps=steps * per_step > len(batches))
    recompute_layers(model.get_base_model(), inputs.recomputed, False, device_of(model))
    for step in paced("distilling, steps", range(steps)):
        numbers = [place % len(batches) for place in range(step * per_step, (step + 1) * per_step)]
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _factor(step, steps)
        _add_gradients(inputs, student, teacher, numbers)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: _frozen(static) for name, static in student.items()}


def mean_divergence(model: PeftModel, statics: Mapping[str, LowRank], batches: Batches, teacher: Teacher) -> float:
    """Return the mean KL(routed | static) over the labelled tokens of batches, in nats."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for number, batch in enumerate(paced("checking on training rows, batches", batches)):
            wanted = teacher.states(number, batch)
            with replaced(model, statics):
                total += float(divergence(model, batch, decode(model, batch), wanted))
            tokens += int(labelled(batch).sum())
    return total / max(1, tokens)


def divergence(model: PeftModel, batch: dict[str, Tensor], states: Tensor, wanted: Tensor) -> Tensor:
    """Return the summed KL(teacher | student) over a batch's labelled tokens; both come as final hidden states.

    A chunk's logits are made again in the backward pass, so that one chunk's are there at a time.
    """
    head, keep = output_head(model), labelled(batch)
    states, wanted = states[:, :-1][keep], wanted[:, :-1][keep]
    chunks = list(zip(states.split(CHUNK), wanted.split(CHUNK), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return sum((_divergence(*chunk, head) for chunk in chunks), states.new_zeros((), dtype=torch.float32))
    parts = [checkpoint(_divergence, *chunk, head, use_reentrant=False) for chunk in chunks]
    return torch.stack(parts).sum()


def _relative_error(states: Tensor, wanted: Tensor, attended: Tensor) -> Tensor:
    """Return E|h - h'|^2 / E|h'|^2 over attended tokens."""
    # In float32: of nearly equal 16-bit states the difference, and its square, would be rounding.
    error = (states.float() - wanted.float())[attended].square().sum()
    return error / wanted.float()[attended].square().sum().clamp_min(1e-12)


def _divergence(mine: Tensor, theirs: Tensor, head: OutputHead) -> Tensor:
    with torch.no_grad():
        target = head(theirs).log_softmax(-1)
    # torch takes (log q, log p) for KL(p | q): the student's first.
    return F.kl_div(head(mine).log_softmax(-1), target, reduction="sum", log_target=True)


def _add_gradients(
    inputs: StrategyInputs, student: Mapping[str, LowRank], teacher: Teacher, numbers: list[int]
) -> None:
    """Add the gradient of the mean KL over the labelled tokens of some batches."""
    batches = [inputs.training[number] for number in numbers]
    tokens = sum(int(labelled(batch).sum()) for batch in batches)
    for number, batch in zip(numbers, batches, strict=True):
        # Before the student stands in: the routed model is its own teacher.
        wanted = teacher.states(number, batch)
        with replaced(inputs.model, student), _recomputing(inputs):
            states = decode(inputs.model, batch)
            # By the labelled tokens of the whole step, so that its batches make one mean and none counts more for being
            # short.
            loss = divergence(inputs.model, batch, states, wanted) / max(1, tokens)
            loss = loss + STATES_WEIGHT / len(batches) * _relative_error(states, wanted, batch["attention_mask"].bool())
            loss.backward()


@contextmanager
def _recomputing(inputs: StrategyInputs) -> Iterator[None]:
    """Recompute activations where training did; transformers' layers do so in training mode alone."""
    inputs.model.train(inputs.recomputed > 0)
    try:
        yield
    finally:
        inputs.model.eval()


def _optimizer(parameters: list[nn.Parameter], eight_bit: bool) -> torch.optim.Optimizer:
    # 0.98: a few hundred steps are over before Adam's usual memory of squares, a thousand steps long, has filled.
    if not eight_bit:
        return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(parameters, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))


def _factor(step: int, steps: int) -> float:
    """Return the share of the full rate: a short warm-up, then half a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _trainable(static: LowRank) -> LowRank:
    """Return the same update with factors of equal size and scaling 1: one learning rate is right for both."""
    # The SVD of the small product of the two triangular parts, never of B A itself, which is d_out x d_in.
    out_basis, out_part = torch.linalg.qr(static.scaling * static.up.float())
    in_basis, in_part = torch.linalg.qr(static.down.float().T)
    left, sizes, right = torch.linalg.svd(out_part @ in_part.T, full_matrices=False)
    root = sizes.sqrt()
    return LowRank(root.unsqueeze(1) * (right @ in_basis.T), (out_basis @ left) * root, 1.0, static.base_change)


def _frozen(static: LowRank) -> LowRank:
    return LowRank(static.down.detach(), static.up.detach(), static.scaling, static.base_change)


__all__ = ["LEARNING_RATE", "ROWS_A_STEP", "Teacher", "distill", "mean_divergence"]
