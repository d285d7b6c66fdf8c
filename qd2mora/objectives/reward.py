"""A reward model: one number for each answer, so that better answers have higher ones.

    L = -log sigma(r(chosen) - r(rejected) - margin)

Bradley and Terry 1952; as in Ouyang et al. 2022 (arXiv 2203.02155), with the margin of a row, where it has one, as in
Llama 2 (arXiv 2307.09288, equation 2). r is a linear of the last token's last state (`head`). Only differences are
learned: rewards of different prompts have no common zero.
"""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qd2mora.objectives.objective import Said
from qd2mora.objectives.pairs import OverPairs, apart


class Reward(OverPairs):
    """Learns to score answers."""

    has_head = True

    def losses(self, said: Said) -> Tensor:
        """Return the loss of each pair, (rows,)."""
        chosen, rejected = apart(said.of_lines)
        return -F.logsigmoid(chosen - rejected - apart(said.worths)[0])

    def rewards(self, said: Said) -> Tensor:
        """Return each line's score, (lines,)."""
        return said.of_lines


__all__ = ["Reward"]
