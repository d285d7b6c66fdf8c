"""Kahneman-Tversky optimisation: answers that were rated good or bad, each by itself.

With r = log p/ref of an answer, a sum over its tokens:

    good   w_good (1 - sigma(beta (r - z0)))      bad   w_bad (1 - sigma(beta (z0 - r)))

Ethayarajh et al. 2024 (arXiv 2402.01306), equation 8. z0 estimates how far the model is from the reference: the mean r
of answers to other rows' prompts, at least 0, no gradient. As in the paper and in TRL each row's prompt takes the next
row's answer; here of the whole step, so that the split into micro batches changes nothing. Taken without dropout. An
answer's reward is beta r; `accuracy` is the share of rows whose r is on its side of z0.
"""

import torch
from torch import Tensor

from qd2mora.data import Row
from qd2mora.objectives.objective import Said


class Kto:
    """Moves answers away from what a reference makes of them, up or down."""

    lines = 1
    names = ("accuracy", "reward_good", "reward_bad", "baseline")
    has_head = has_divergence = False
    has_reference = has_baseline = True

    def __init__(self, beta: float, good_weight: float = 1.0, bad_weight: float = 1.0) -> None:
        self.beta, self.good_weight, self.bad_weight = beta, good_weight, bad_weight

    def count(self, row: Row) -> int:
        """Return one: every rating counts alike."""
        return 1

    def losses(self, said: Said) -> Tensor:
        """Return the loss of each row, (rows,)."""
        is_good = said.worths > 0
        gain = self.beta * (said.log_ratios - said.baseline)
        weights = torch.where(is_good, self.good_weight, self.bad_weight)
        return weights * (1 - torch.sigmoid(torch.where(is_good, gain, -gain)))

    def rewards(self, said: Said) -> Tensor:
        """Return beta log p/ref of each line, (lines,)."""
        return self.beta * said.log_ratios

    @torch.no_grad()
    def measures(self, said: Said) -> Tensor:
        """Return accuracy, both rewards and z0, (4, 2)."""
        is_good, rewards = said.worths > 0, self.rewards(said)
        is_right = (said.log_ratios > said.baseline) == is_good
        every = torch.ones_like(rewards)
        counted = ((is_right, every), (rewards, is_good), (rewards, ~is_good), (every * said.baseline, every))
        return torch.stack([torch.stack([(what * of).sum(), of.float().sum()]) for what, of in counted])


def mismatched(rows: list[Row], longest: int) -> list[Row]:
    """Return each row's prompt with the next row's answer, cut to `longest` tokens."""
    return [row.with_answer_of(other, longest) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]


__all__ = ["Kto", "mismatched"]
