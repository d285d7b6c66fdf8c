"""Which expert a method that adds its experts one by one trains now (ScaleZero's DPS).

Without a trigger a run is cut into as many equal parts as there are experts. With `train.growth` the next expert opens
when a task has come to rest: its held-out loss has not fallen by a share of its best for some evaluations in a row. A
task opens one expert, as a task that is solved does in ScaleZero; once all of them have, they are watched anew.

Older experts stay bit for bit what they were: their gradients are zero, and so are their moments from there on, with
which an AdamW step without decay changes nothing. A new expert's up factor is still zero when it opens, so that opening
it changes no output; one that never opened takes no part, and `qd2mora compose prune` leaves it out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from qd2mora.mixture import mixture_layers, routing_of
from qd2mora.recipe.train import Growth
from qd2mora.training.progress import Progress
from qd2mora.training.updates import Updater


def stage_of(update: int, total: int, num_stages: int) -> int:
    """Return the stage of update number `update` of `total`, in equal parts."""
    return min(update * num_stages // total, num_stages - 1)


@dataclass
class Opening:
    """Opens experts; `num_experts` is 1 where a method does not grow, and there is nothing to open."""

    model: nn.Module
    updater: Updater
    progress: Progress
    told: Growth | None
    num_experts: int
    total: int

    def enter(self, update: int) -> None:
        """Tell the layers which expert this update trains."""
        routing = routing_of(self.model)
        if routing is None or self.num_experts == 1:
            return
        if self.told is not None:
            routing.stage = self.progress.opened
            return
        # A function of the step's number, so that a resume stands in the right stage without having saved it.
        routing.stage = stage_of(update, self.total, self.num_experts)
        if update and stage_of(update - 1, self.total, self.num_experts) != routing.stage:
            self._forget(routing.stage)

    def judge(self, losses: Mapping[str, float]) -> tuple[int, dict[str, tuple[float, int]]]:
        """Return how many experts are open beyond the first, and of each task its best loss and how long it rests."""
        assert self.told is not None
        opened, rest, come = self.progress.opened, dict(self.progress.rest), []
        for task, loss in losses.items():
            if not math.isfinite(loss):  # nothing compares with it, later losses neither
                continue
            best, resting = rest.get(task, (float("inf"), 0))
            if loss <= best * (1 - self.told.gain) or best == float("inf"):
                rest[task] = (loss, 0)
                continue
            rest[task] = (min(best, loss), resting + 1)
            come += [task] if resting + 1 == self.told.patience else []
        if come and opened + 1 < self.num_experts:
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
        return f"held-out loss has come to rest: expert {opened + 1} of {self.num_experts} opens"

    def _forget(self, stage: int) -> None:
        """Clear the moments of older experts: Adam's would go on moving one that has no gradient any more."""
        for layer in mixture_layers(self.model).values():
            tensors = layer.tensors("default")
            for name in ("mixture_A", "mixture_B"):
                for moment in self.updater.moments_of(tensors[name]):
                    moment[:stage].zero_()


__all__ = ["Opening", "stage_of"]
