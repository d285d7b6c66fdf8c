"""Group-relative policy optimisation: answers that the run wrote itself, by how much better each is than its rivals.

With G answers drawn to one prompt and their rewards r,

    A_i = (r_i - mean r) / (std r + 1e-4)      loss = - mean_i A_i (1/|o_i|) sum_t log p(o_it)

Shao et al. 2024 (arXiv 2402.03300), equation 3 with one update for each set of answers: the ratio to the model that
drew them is then 1, so that its clipping does nothing and its gradient is that of log p. Deviations: no pull to a
reference (beta 0, as in most later work); std over G - 1, and 1e-4 beside it, as in TRL. A group of equal rewards
teaches nothing.
"""

import torch
from torch import Tensor

from qd2mora.data import Row
from qd2mora.objectives.objective import Said


class Grpo:
    """Learns answers by their advantage, which stands in their `worth`."""

    lines = 1
    names = ()
    has_head = has_reference = has_baseline = False

    def count(self, row: Row) -> int:
        """Return one: every answer counts alike, however long."""
        return 1

    def losses(self, said: Said) -> Tensor:
        """Return the loss of each answer, (rows,)."""
        return -said.worths * said.mean_log_probs

    def rewards(self, said: Said) -> Tensor:
        """Return each answer's log-probability."""
        return -said.of_lines

    def measures(self, said: Said) -> Tensor:
        """Return nothing: rewards are known when answers are written."""
        return said.of_lines.new_zeros(0, 2)


def advantages(rewards: list[float]) -> list[float]:
    """Return how much better each answer of a group is than the group, in standard deviations; one alone has none."""
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    values = torch.tensor(rewards, dtype=torch.float64)
    found: list[float] = ((values - values.mean()) / (values.std() + 1e-4)).tolist()
    return found


__all__ = ["Grpo", "advantages"]
