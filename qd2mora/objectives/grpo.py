"""Group-relative policy optimisation: answers that the run wrote itself, by how much better each is than its rivals.

With G answers drawn to one prompt and their rewards r,

    A_i = (r_i - mean r) / (std r + 1e-4)      loss = mean_i (1/|o_i|) sum_t (kl D_it - A_i log p(o_it))

D_it is how far a token is from the reference (`objective.divergence`); kl is 0 where nothing else is said. Shao et al.
2024 (arXiv 2402.03300), equation 3 with one update for each set of answers: the ratio to the model that drew them is
then 1, so that its clipping does nothing and its gradient is that of log p. Deviations: kl, their beta, is 0 by itself,
as in most later work; std over G - 1, and 1e-4 beside it, as in TRL. A group of equal rewards teaches nothing but the
pull to the reference.
"""

import torch
from torch import Tensor

from qd2mora.data import Row
from qd2mora.objectives.objective import Said


class Grpo:
    """Learns answers by their advantage, which stands in their `worth`."""

    lines = 1
    has_head = has_reference = has_baseline = False

    def __init__(self, kl: float = 0.0) -> None:
        self.kl, self.has_divergence = kl, kl > 0
        self.names: tuple[str, ...] = ("kl",) if kl else ()

    def count(self, row: Row) -> int:
        """Return one: every answer counts alike, however long."""
        return 1

    def losses(self, said: Said) -> Tensor:
        """Return the loss of each answer, (rows,)."""
        losses = -said.worths * said.mean_log_probs
        return losses if said.divergence is None else losses + self.kl * said.divergence / said.num_tokens

    def rewards(self, said: Said) -> Tensor:
        """Return each answer's log-probability."""
        return -said.of_lines

    @torch.no_grad()
    def measures(self, said: Said) -> Tensor:
        """Return how far tokens are from the reference, where that counts; rewards are known before."""
        if said.divergence is None:
            return said.of_lines.new_zeros(0, 2)
        apart = (said.divergence / said.num_tokens).sum()
        return torch.stack([apart, torch.full_like(apart, len(said.lines))]).unsqueeze(0)


def advantages(rewards: list[float]) -> list[float]:
    """Return how much better each answer of a group is than the group, in standard deviations; one alone has none."""
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    found: list[float] = in_deviations(torch.tensor(rewards, dtype=torch.float64)).tolist()
    return found


def in_deviations(values: Tensor) -> Tensor:
    """Return (v - mean) / (std + 1e-4) along the first axis, over which a group lies; zero where all are the same."""
    return (values - values.mean(0)) / (values.std(0) + 1e-4)


__all__ = ["Grpo", "advantages", "in_deviations"]
