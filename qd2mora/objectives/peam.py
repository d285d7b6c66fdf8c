"""Failures and their corrections: a correction is imitated and set apart from its failure, as far as that is worth it.

    L = w (-log p(correction) - c log sigma(beta h)),   w = ref(failure) / (ref(failure) + ref(correction))

log p a mean over the correction's tokens, h as in `dpo`, ref(.) the reference's probability of the whole answer. PEAM
(arXiv 2605.27762) has behaviour cloning, a loss like DPO's and a score of what is worth learning, without formulas that
were published: a reconstruction. Its score weighs savings against redundancy; here the worth w is the chance that the
reference, if it gives one of the two answers, repeats the failure. That has no threshold and no unit: a failure that it
would not repeat teaches little, one that it would teaches all. At least 1e-6, so that no step is without a gradient.

When a task is due is decided without a threshold too (`is_due`). PEAM triggers by failures' own statistics, scale-free.
With d_i = log ref(failure) - log ref(correction) of a task's pairs, it is due where

    sum_i d_i > 0   and   sum_i d_i sum_{j != i} d_j > 0

that is where failures are likelier, and what the other pairs say of a pair that is left out is right on average: the
mean is larger than its own standard error. One pair alone is never due.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qd2mora.objectives.objective import Said
from qd2mora.objectives.pairs import OverPairs, apart

LEAST = 1e-6


class Peam(OverPairs):
    """Imitates corrections, and moves away from failures that the reference would repeat."""

    names = (*OverPairs.names, "worth")
    has_reference = True

    def __init__(self, beta: float, contrast: float = 1.0) -> None:
        self.beta, self.contrast = beta, contrast

    def losses(self, said: Said) -> Tensor:
        """Return the loss of each pair, (rows,)."""
        correction, failure = apart(said.log_ratios)
        apart_from_failure = -F.logsigmoid(self.beta * (correction - failure))
        return _worths(said) * (self.contrast * apart_from_failure - apart(said.mean_log_probs)[0])

    def rewards(self, said: Said) -> Tensor:
        """Return beta log p/ref of each line, (lines,)."""
        return self.beta * said.log_ratios

    @torch.no_grad()
    def measures(self, said: Said) -> Tensor:
        """Return accuracy, margin, both rewards and the mean worth, (5, 2)."""
        worths = _worths(said)
        of_worth = torch.stack([worths.sum(), torch.full_like(worths[0], len(worths))])
        return torch.cat([super().measures(said), of_worth.unsqueeze(0)])


def is_due(margins: Sequence[float]) -> bool:
    """Tell whether pairs of such margins, log ref(failure) - log ref(correction), are evidence of a failing."""
    total = math.fsum(margins)
    return total > 0 and total * total > math.fsum(margin * margin for margin in margins)


def _worths(said: Said) -> Tensor:
    """Return what each pair is worth, (rows,)."""
    assert said.reference is not None
    # Losses are minus log-probabilities: the correction's is the larger one where the failure is likelier.
    correction, failure = apart(said.reference)
    return torch.sigmoid(correction - failure).clamp_min(LEAST)


__all__ = ["Peam", "is_due"]
