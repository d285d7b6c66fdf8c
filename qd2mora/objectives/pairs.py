"""Two answers to one prompt, the better one first: what all objectives over pairs share.

`accuracy` is the share of pairs whose better answer has the higher reward (equal ones count as wrong), `margin` the
mean difference of the two; what a reward is, each objective says.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from qd2mora.data import Row
from qd2mora.objectives.objective import Said


class OverPairs(ABC):
    """An objective that compares the two lines of a row."""

    lines = 2
    names: tuple[str, ...] = ("accuracy", "margin", "reward_chosen", "reward_rejected")
    has_head = has_reference = has_baseline = has_divergence = False

    def count(self, row: Row) -> int:
        """Return one: every pair counts alike, however long its answers are."""
        return 1

    @abstractmethod
    def losses(self, said: Said) -> Tensor:
        """Return the loss of each pair, (rows,) float32."""

    @abstractmethod
    def rewards(self, said: Said) -> Tensor:
        """Return how good each line's answer is by the model, (lines,) float32."""

    @torch.no_grad()
    def measures(self, said: Said) -> Tensor:
        """Return accuracy, margin and both rewards, (4, 2)."""
        chosen, rejected = apart(self.rewards(said))
        sums = torch.stack([(chosen > rejected).float(), chosen - rejected, chosen, rejected]).sum(1)
        return torch.stack([sums, torch.full_like(sums, len(chosen))], 1)


def apart(of_lines: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers of the better answers, and of the worse, (rows,) each."""
    chosen, rejected = of_lines.view(-1, 2).unbind(1)
    return chosen, rejected


__all__ = ["OverPairs", "apart"]
