"""Odds ratio preference optimisation: imitation of the better answer, and odds above the worse one's. No reference.

    L = -log p(chosen) - beta log sigma(log odds(chosen) / odds(rejected)),   odds(y) = p(y) / (1 - p(y))

Hong et al. 2024 (arXiv 2403.07691), equations 6 and 7; log p is the mean over the answer's tokens, beta their lambda.
The first term is the mean over the answer, as in the paper; TRL's code counts the prompt's tokens in it. An answer's
reward is beta log p.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qd2mora.objectives.objective import Said
from qd2mora.objectives.pairs import OverPairs, apart

MOST = -1e-6
"""The largest log-probability that odds are taken of: at 0 they are infinite, and rounding may reach it."""


class Orpo(OverPairs):
    """Learns the better answer, and sets it apart from the worse."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def losses(self, said: Said) -> Tensor:
        """Return the loss of each pair, (rows,)."""
        means = said.mean_log_probs
        log_odds = means - log_of_rest(means)
        chosen, rejected = apart(log_odds)
        return -apart(means)[0] - self.beta * F.logsigmoid(chosen - rejected)

    def rewards(self, said: Said) -> Tensor:
        """Return beta log p of each line, (lines,)."""
        return self.beta * said.mean_log_probs


def log_of_rest(log_probs: Tensor) -> Tensor:
    """Return log(1 - p) of log p, without loss of digits at either end."""
    log_probs = log_probs.clamp(max=MOST)
    is_likely = log_probs > -math.log(2)
    # Each branch sees numbers that suit it: of the one not taken autograd would else make 0 times infinity.
    likely = torch.where(is_likely, log_probs, -math.log(2))
    unlikely = torch.where(is_likely, -math.log(2), log_probs)
    return torch.where(is_likely, torch.log(-torch.expm1(likely)), torch.log1p(-torch.exp(unlikely)))


__all__ = ["MOST", "Orpo", "log_of_rest"]
