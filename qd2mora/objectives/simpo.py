"""Simple preference optimisation: the better answer is likelier a token, by a target margin. No reference.

    L = -log sigma(beta (log p(chosen) - log p(rejected)) - gamma)

Meng et al. 2024 (arXiv 2405.14734), equation 6; log p is the mean over the answer's tokens. An answer's reward is
beta log p, so that the margin is to reach gamma.
"""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qd2mora.objectives.objective import Said
from qd2mora.objectives.pairs import OverPairs, apart


class Simpo(OverPairs):
    """Compares two answers by their likelihood a token."""

    def __init__(self, beta: float, gamma: float) -> None:
        self.beta, self.gamma = beta, gamma

    def losses(self, said: Said) -> Tensor:
        """Return the loss of each pair, (rows,)."""
        chosen, rejected = apart(self.rewards(said))
        return -F.logsigmoid(chosen - rejected - self.gamma)

    def rewards(self, said: Said) -> Tensor:
        """Return beta log p of each line, (lines,)."""
        return self.beta * said.mean_log_probs


__all__ = ["Simpo"]
