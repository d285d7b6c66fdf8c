"""Which part of an adapter that grows is trained now: an expert, or some of its ranks where ranks are gated.

ScaleZero's DPS without a trigger cuts a run into as many equal parts as there are experts. With `train.growth` the next
part opens when a task has come to rest: its held-out loss has not fallen by a share of its best for some evaluations in
a row. A task opens one part, as a task that is solved does in ScaleZero; once all of them have, they are watched anew.

What is not open gets no gradient, and its moments are zero from there on, with which an AdamW step without decay
changes nothing: older parts stay bit for bit what they were, and later ones what they began as, with an up factor of
zero. So a closed part adds nothing whatever its gate is, and opening it changes no output. What its gate takes of the
others is left to the base, in training as after it: nothing about a run has to be remembered where it is used.
`qd2mora compose prune` takes out what never opened. Routers, shared experts and cores are trained all the time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qd2mora.errors import InputRefused
from qd2mora.mixture import MixtureConfig, mixture_layers
from qd2mora.recipe.train import Growth
from qd2mora.training.progress import Progress
from qd2mora.training.updates import Updater


def stage_of(update: int, total: int, num_stages: int) -> int:
    """Return the stage of update number `update` of `total`, in equal parts."""
    return min(update * num_stages // total, num_stages - 1)


@dataclass(frozen=True)
class Parts:
    """What opens one after the other: `number` parts, each an expert, or so many `ranks` of the `of` that there are.

    `has_scales`: experts have scales of their own, which are trained once they are older (ScaleZero).
    """

    number: int = 1
    ranks: int = 0
    of: int = 0
    has_scales: bool = False

    @classmethod
    def of_run(cls, config: MixtureConfig, told: Growth | None) -> "Parts":
        """Return a run's parts; a single one where nothing opens. Raises InputRefused."""
        if config.row.stages:
            _refuse_ranks(config, told)
            return cls(config.num_down, has_scales=True)
        if told is None:
            return cls()
        reason = _why_not(config)
        if reason:
            raise InputRefused(f"train.growth: {config.method} {reason}; leave it out")
        if "rank" in config.routers:
            ranks, of = told.ranks or config.routers["rank"].top_k or 0, config.rank or 1
            if not 0 < ranks < of:
                raise InputRefused(f"train.growth.ranks: {ranks} will not do: from 1 to {of - 1} of {of}")
            return cls(-(-of // ranks), ranks, of)
        _refuse_ranks(config, told)
        return cls(max(config.num_down, config.num_up))

    def trained(self, name: str, tensor: Tensor, stage: int) -> Tensor | None:
        """Return which entries of a tensor a stage trains, to be broadcast; None: all of them."""
        axes = {"mixture_A": 1, "mixture_B": 2} if self.ranks else {"mixture_A": 0, "mixture_B": 0}
        if self.has_scales and name == "mixture_logits_down":
            return torch.arange(len(tensor), device=tensor.device) < stage
        if name not in axes:
            return None
        size = tensor.shape[axes[name]]
        numbers = torch.arange(size, device=tensor.device)
        # A linear with fewer experts than another opens them as far apart; what there is one of opens first.
        of_each = numbers // self.ranks if self.ranks else numbers * self.number // size
        shape = [1] * tensor.dim()
        shape[axes[name]] = size
        return (of_each == stage).view(shape)

    def words(self, stage: int) -> str:
        """Say what a stage opens."""
        if not self.ranks:
            return f"expert {stage + 1} of {self.number} opens"
        return f"ranks {stage * self.ranks + 1} to {min((stage + 1) * self.ranks, self.of)} of {self.of} open"


def _why_not(config: MixtureConfig) -> str:
    """Say why an adapter cannot open its experts or ranks one after the other; nothing where it can."""
    row, gates = config.row, config.routers
    if row.backend != "ours" or row.placement != "linear" or row.core != "none" or config.experts is not None:
        return "has no experts that are sums of ranks beside a linear"
    if config.ranks is not None or row.given == "needed" or not config.train_experts:
        return "has experts of their own ranks, or given ones"
    if any(gate.select == "fixed" or gate.input == "span" for gate in gates.values()):
        return "has an expert for each task or span, which none stands in for"
    if "rank" not in gates and row.pairing == "chain" and config.num_down > 1:
        return "mixes down experts that are not zero at the start"
    if "rank" not in gates and max(config.num_down, config.num_up) < 2:
        return "has no experts that could open after others"
    return ""


def _refuse_ranks(config: MixtureConfig, told: Growth | None) -> None:
    if told is not None and told.ranks is not None:
        raise InputRefused(f"train.growth.ranks: {config.method} opens experts and gates no ranks; leave it out")


@dataclass
class Opening:
    """Opens the parts of an adapter."""

    model: nn.Module
    updater: Updater
    progress: Progress
    told: Growth | None
    parts: Parts
    total: int

    def stage(self, update: int) -> int:
        """Return the part that an update trains."""
        if self.told is not None:
            return self.progress.opened
        # A function of the step's number, so that a resume stands in the right stage without having saved it.
        return stage_of(update, self.total, self.parts.number)

    def freeze(self, update: int) -> None:
        """Take the gradients of what an update leaves as it is, and its moments where a stage begins."""
        if self.parts.number == 1:
            return
        stage = self.stage(update)
        if self.told is None and update and self.stage(update - 1) != stage:
            self._forget(stage)
        for name, tensor in self._tensors():
            trained = self.parts.trained(name, tensor, stage)
            if trained is not None and tensor.grad is not None:
                tensor.grad.masked_fill_(~trained, 0)

    def judge(self, losses: Mapping[str, float]) -> tuple[int, dict[str, tuple[float, int]]]:
        """Return how many parts are open beyond the first, and of each task its best loss and how long it rests."""
        assert self.told is not None
        opened, rest, come = self.progress.opened, dict(self.progress.rest), []
        for task, loss in losses.items():
            if not math.isfinite(loss):  # nothing compares with it, later losses neither
                continue
            best, resting = rest.get(task, (float("inf"), 0))
            # Rewards are told as losses below zero.
            if loss <= best - abs(best) * self.told.gain or best == float("inf"):
                rest[task] = (loss, 0)
                continue
            rest[task] = (min(best, loss), resting + 1)
            come += [task] if resting + 1 == self.told.patience else []
        if come and opened + 1 < self.parts.number:
            opened += 1
            if all(resting >= self.told.patience for _, resting in rest.values()):
                rest = {task: (best, 0) for task, (best, _) in rest.items()}
        return opened, rest

    def open(self, opened: int, rest: Mapping[str, tuple[float, int]]) -> str:
        """Take what was judged; return what is to be said of it."""
        is_new = opened != self.progress.opened
        self.progress.opened, self.progress.rest = opened, dict(rest)
        if not is_new:
            return ""
        self._forget(opened)
        return f"held-out loss has come to rest: {self.parts.words(opened)}"

    def _forget(self, stage: int) -> None:
        """Clear the moments of what is closed: Adam's would go on moving what has no gradient any more."""
        for name, tensor in self._tensors():
            trained = self.parts.trained(name, tensor, stage)
            if trained is not None:
                for moment in self.updater.moments_of(tensor):
                    moment.masked_fill_(~trained, 0)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        layers = mixture_layers(self.model).values()
        return [pair for layer in layers for pair in layer.tensors("default").items()]


__all__ = ["Opening", "Parts", "stage_of"]
