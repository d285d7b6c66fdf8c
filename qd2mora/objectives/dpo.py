"""Direct preference optimisation: the better answer gains more on the reference than the worse.

With h = log p(chosen)/ref(chosen) - log p(rejected)/ref(rejected), sums over an answer's tokens:

    sigmoid   -(1 - e) log sigma(beta h) - e log sigma(-beta h)    Rafailov et al. 2023 (arXiv 2305.18290), equation 7;
                                                                   e, label smoothing: Mitchell's conservative DPO
    hinge     max(0, 1 - beta h)                                   SLiC-HF (arXiv 2305.10425)
    ipo       (h' - 1 / (2 beta))^2                                Azar et al. 2023 (arXiv 2310.12036), equation 17

h' takes means over each answer's tokens in the place of sums, as TRL does: the paper's sums would have long answers'
loss grow with their length. An answer's reward is beta log p/ref.
"""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qd2mora.objectives.objective import Said
from qd2mora.objectives.pairs import OverPairs, apart


class Dpo(OverPairs):
    """Compares two answers by what they gain on a reference."""

    has_reference = True

    def __init__(self, beta: float, loss: str = "sigmoid", label_smoothing: float = 0.0) -> None:
        self.beta, self.loss, self.label_smoothing = beta, loss, label_smoothing

    def losses(self, said: Said) -> Tensor:
        """Return the loss of each pair, (rows,)."""
        if self.loss == "ipo":
            chosen, rejected = apart(said.log_ratios / said.num_tokens)
            return (chosen - rejected - 1 / (2 * self.beta)).square()
        chosen, rejected = apart(said.log_ratios)
        gain = self.beta * (chosen - rejected)
        if self.loss == "hinge":
            return F.relu(1 - gain)
        return -(1 - self.label_smoothing) * F.logsigmoid(gain) - self.label_smoothing * F.logsigmoid(-gain)

    def rewards(self, said: Said) -> Tensor:
        """Return beta log p/ref of each line, (lines,)."""
        return self.beta * said.log_ratios


__all__ = ["Dpo"]
